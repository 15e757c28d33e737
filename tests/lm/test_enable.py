import gc

import mlx.core as mx
import pytest
from conftest import logits, variant
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models import llama, mamba
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_turboquant import TurboQuantKVCache, cache_size, disable, enable, make_prompt_cache
from mlx_turboquant.kernels import runtime
from mlx_turboquant.lm.settings import Settings


def test_eight_bits_change_the_logits_by_less_than_a_percent(random_model):
    exact = logits(random_model, mlx_lm_cache.make_prompt_cache(random_model))
    cache = make_prompt_cache(random_model, 8, window=16)
    compressed = logits(random_model, cache)
    assert cache[0].packed_tokens > 100
    # The codec's error is .6 % of a vector and softmax averages it.
    assert mx.linalg.norm(compressed - exact) < 0.01 * mx.linalg.norm(exact)


def test_the_fast_path_and_the_dense_one_agree(random_model):
    cache = make_prompt_cache(random_model, 3, window=16)
    fast = logits(random_model, cache)
    dense_cache = make_prompt_cache(random_model, 3, window=16)
    disable(random_model)
    dense = logits(random_model, dense_cache)
    assert not mx.array_equal(fast, dense)
    assert mx.allclose(fast, dense, atol=1e-4)  # float32 sums in another order, two layers


def test_an_enabled_model_is_compressed_everywhere_in_mlx_lm(random_model):
    assert enable(random_model, 3, window=16) is random_model
    cache = mlx_lm_cache.make_prompt_cache(random_model)
    assert [type(layer) for layer in cache] == [TurboQuantKVCache] * 2
    assert cache[0].window == 16
    bits = [bits for layer in cache for bits in (layer.key_bits, layer.value_bits)]
    assert sum(bits) == 3 * len(bits)


def test_enabling_twice_takes_the_last_settings_and_disabling_undoes_both(random_model):
    original = llama.scaled_dot_product_attention
    enable(enable(random_model, 3), value_bits=1)
    assert mlx_lm_cache.make_prompt_cache(random_model)[0].value_bits == 1
    assert llama.scaled_dot_product_attention is not original
    disable(random_model)
    assert [type(layer) for layer in random_model.make_cache()] == [KVCache] * 2
    assert llama.scaled_dot_product_attention is original


def test_disabling_one_model_leaves_another_one_compressed(random_model):
    original = llama.scaled_dot_product_attention
    other = enable(variant(random_model), 4)
    enable(random_model, 4)
    hook = llama.scaled_dot_product_attention
    disable(random_model)
    assert llama.scaled_dot_product_attention is hook
    disable(other)
    assert llama.scaled_dot_product_attention is original


def test_a_model_that_is_gone_does_not_keep_the_hook(random_model):
    original = llama.scaled_dot_product_attention
    other = enable(variant(random_model), 4)
    enable(random_model, 4)
    del other
    gc.collect()
    disable(random_model)
    assert llama.scaled_dot_product_attention is original


def test_sliding_window_layers_are_left_as_they_are(random_model):
    layer_types = ["sliding_attention", "full_attention"]
    model = variant(random_model, layer_types=layer_types, sliding_window=64)
    cache = make_prompt_cache(model, 4)
    assert [type(layer) for layer in cache] == [RotatingKVCache, TurboQuantKVCache]


def test_a_model_without_kv_layers_is_refused():
    arguments = mamba.ModelArgs(
        model_type="mamba",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        state_size=4,
        num_hidden_layers=1,
        conv_kernel=4,
        use_bias=False,
        use_conv_bias=False,
        time_step_rank=2,
    )
    with pytest.raises(ValueError, match="No layer of this model.*ArraysCache"):
        enable(mamba.Model(arguments))


def test_the_backend_can_be_forced(random_model):
    make_prompt_cache(random_model, backend="reference")
    assert runtime.backend() == "reference"
    runtime.force_backend(None)


@pytest.mark.parametrize(
    "settings", [{"bits": 9}, {"key_bits": 0}, {"window": -1}, {"backend": "fpga"}]
)
def test_enable_refuses_a_bad_setting_at_once(random_model, settings):
    with pytest.raises(ValueError):
        enable(random_model, **settings)
    assert "make_cache" not in vars(random_model)


def test_sizes_count_tokens_and_bytes_of_all_layers(random_model):
    cache = make_prompt_cache(random_model, 4)
    logits(random_model, cache)
    size = cache_size(cache)
    assert size.tokens == 200
    assert size.nbytes == sum(layer.nbytes for layer in cache)
    assert (
        size.fp16_nbytes == 200 * 2 * 2 * 64 * 2 * 2
    )  # heads, keys and values, dim, bytes, layers
    assert str(size).startswith("200 tokens, ")


def test_settings_can_be_given_as_one_object(random_model):
    settings = Settings(3, window=16, seed=5)
    for cache in (
        make_prompt_cache(random_model, settings),
        make_prompt_cache(random_model, settings.bits, window=16, seed=5),
    ):
        assert [(layer.window, layer.seed) for layer in cache] == [(16, 5)] * 2
    assert make_prompt_cache(random_model, settings, window=0)[0].window == 0


def test_a_disabled_model_gets_arrays_from_caches_that_it_has(random_model):
    """Of the same step as before: the link is told, and nothing else is asked."""
    cache = make_prompt_cache(random_model, 4, window=0, sink_tokens=0)
    random_model(mx.ones((1, 64), mx.int32), cache=cache)
    new = mx.random.normal((1, 2, 1, 64))
    assert not isinstance(cache[0].update_and_fetch(new, new)[0], mx.array)
    disable(random_model)
    cache[0].trim(1)
    assert isinstance(cache[0].update_and_fetch(new, new)[0], mx.array)
