import copy
import gc

import mlx.core as mx
import mlx_lm
import pytest
from adapters import adapter_folder
from conftest import PROMPT, logits, variant
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models import llama, mamba
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.tuner.utils import load_adapters, remove_lora_layers
from tiny_families import tiny_model
from tokens import continuation

from mlx_turboquant import (
    TurboQuantKVCache,
    cache_size,
    disable,
    enable,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_turboquant.cache.batch import BatchTurboQuantKVCache
from mlx_turboquant.kernels import runtime
from mlx_turboquant.lm.compression import compression_of
from mlx_turboquant.lm.profile import Profile, fingerprint, save_profile
from mlx_turboquant.lm.settings import Settings


def test_eight_bits_change_the_logits_by_less_than_a_percent(random_model):
    exact = logits(random_model, mlx_lm_cache.make_prompt_cache(random_model))
    cache = make_prompt_cache(random_model, 8, window=16)
    compressed = logits(random_model, cache)
    assert cache[0].packed_tokens > 100
    # The codec's error is 0.6 % of a vector, and softmax averages it.
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


def test_a_bad_setting_leaves_the_backend(random_model):
    before = runtime.backend()
    with pytest.raises(ValueError, match="99 bits are not supported"):
        make_prompt_cache(random_model, 99, backend="cuda")
    assert runtime.backend() == before


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


def test_the_codec_reaches_every_kind_of_cache_and_is_named():
    settings = Settings(key_bits=3, value_bits=2, codec="trellis")
    for family in ("llama", "deepseek_v3"):
        model = enable(tiny_model(family), settings)
        for cache in (make_prompt_cache(model, settings), model.make_cache()):
            assert {layer.codec for layer in cache} == {"trellis"}
            assert {x.codec for layer in cache for x in layer._packed.layouts} == {"trellis"}
        disable(model)
    assert f"{settings}" == "K3V2 in trellis codes"
    assert str(Settings(3, codec="trellis")) == "3 bits per value in trellis codes"


def test_a_disabled_model_gets_arrays_from_caches_that_it_has(random_model):
    """Even in a run of steps that is under way, because the caches ask their link."""
    cache = make_prompt_cache(random_model, 4, window=0, sink_tokens=0)
    random_model(mx.ones((1, 64), mx.int32), cache=cache)
    new = mx.random.normal((1, 2, 1, 64))
    assert not isinstance(cache[0].update_and_fetch(new, new)[0], mx.array)
    disable(random_model)
    cache[0].trim(1)
    assert isinstance(cache[0].update_and_fetch(new, new)[0], mx.array)


def test_the_limit_that_mlx_lm_is_given_limits_our_caches(random_model):
    enable(random_model, 4, window=16)
    for limit in (300, 4096):
        cache = mlx_lm_cache.make_prompt_cache(random_model, max_kv_size=limit)
        assert [layer.max_size for layer in cache] == [limit] * 2
    assert mlx_lm_cache.make_prompt_cache(random_model)[0].max_size is None
    assert random_model.make_cache()[0].max_size is None
    enable(random_model, 4, window=16, max_size=256)
    assert mlx_lm_cache.make_prompt_cache(random_model)[0].max_size == 256
    assert mlx_lm_cache.make_prompt_cache(random_model, 300)[0].max_size == 300
    with pytest.raises(ValueError, match="A cache of 40 tokens is too small for 4 sinks"):
        mlx_lm_cache.make_prompt_cache(random_model, 40)


def test_generation_with_a_limit_holds_no_more_tokens(tiny_lm):
    """Alone and in mlx-lm's batches; both make their caches themselves."""
    model, tokenizer = tiny_lm
    enable(model, 4, uniform=True, window=16)
    prompt = tokenizer.encode("import os\n" * 150)

    others = [x for x in gc.get_objects() if isinstance(x, TurboQuantKVCache)]  # of other tests

    def held(kind):
        caches = (x for x in gc.get_objects() if type(x) is kind)
        return max((x.size() for x in caches if not any(x is y for y in others)), default=0)

    for _ in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=9, max_kv_size=300):
        assert held(TurboQuantKVCache) <= 300 < len(prompt)
    generator = BatchGenerator(model, max_tokens=9, max_kv_size=300)
    generator.insert([prompt, prompt[:400]])
    sizes = [held(BatchTurboQuantKVCache) for _ in iter(generator.next_generated, [])]
    assert 200 < max(sizes) <= 300
    generator.close()


def profile_of(model, *key_weights: float) -> Profile:
    keys = tuple({2: (weight,), 3: (0.3 * weight,)} for weight in key_weights)
    return Profile(fingerprint(model), ("text",), 24, keys, ({1: (1e-3,), 2: (1e-4,)},) * 2)


def key_bits(cache) -> list[int]:
    return [layer.key_bits for layer in cache]


def test_enabling_again_finds_a_profile_that_was_written_since(random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    enable(random_model, 4)
    save_profile(profile_of(random_model, 1e-5, 1.0))
    enable(random_model, 4)
    first, second = key_bits(random_model.make_cache())
    assert first < second


def test_a_given_profile_stays_until_another_is_given(random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_profile(profile_of(random_model, 1e-5, 1.0))
    enable(random_model, 4, profile=profile_of(random_model, 1.0, 1e-5))
    enable(random_model, 3.5)
    first, second = key_bits(random_model.make_cache())
    assert first > second


def test_nothing_is_measured_for_bits_that_are_fixed(tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = tiny_lm
    for fixed in ({"uniform": True}, {"key_bits": 5, "value_bits": 3}):
        enable(model, tokenizer=tokenizer, **fixed)
        assert compression_of(model).profile is None
    assert not list(tmp_path.rglob("*.json"))
    enable(model, tokenizer=tokenizer)
    assert compression_of(model).profile is not None and list(tmp_path.rglob("*.json"))


def test_a_copy_of_an_enabled_model_lives_on_its_own(random_model):
    enable(random_model, 3, window=16)
    expected = logits(random_model, random_model.make_cache())
    copied = copy.deepcopy(random_model)
    original = llama.scaled_dot_product_attention
    disable(random_model)
    mx.eval(expected)
    random_model.update(copied.parameters())  # only the shell of the original is left
    cache = copied.make_cache()
    assert mx.array_equal(logits(copied, cache), expected)
    assert type(llama.scaled_dot_product_attention) is type(original)
    twice = copy.deepcopy(copied)
    del copied, cache
    gc.collect()
    assert mx.array_equal(logits(twice, twice.make_cache()), expected)
    disable(twice)
    assert [type(layer) for layer in twice.make_cache()] == [KVCache] * 2


def test_a_profile_serves_adapters_of_its_model_and_says_so(
    random_model, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = adapter_folder(tmp_path / "adapter", random_model)
    save_profile(profile_of(random_model, 1e-5, 1.0))
    enable(random_model, 4)
    expected = key_bits(random_model.make_cache())
    assert "adapters" not in caplog.text
    load_adapters(random_model, folder)
    enable(random_model, 4)
    assert key_bits(random_model.make_cache()) == expected
    [line] = [each.message for each in caplog.records]
    assert line == "The model has adapters: bits follow the profile of the model without them."
    own = profile_of(random_model, 1.0, 1e-5)
    save_profile(own)
    enable(random_model, 4)
    assert key_bits(random_model.make_cache()) == expected[::-1]
    remove_lora_layers(random_model)
    enable(random_model, 4)
    assert key_bits(random_model.make_cache()) == expected


def test_a_cache_of_before_an_adapter_goes_on_without_the_fast_path(random_model, tmp_path):
    enable(random_model, 4, window=16)
    cache = random_model.make_cache()
    random_model(PROMPT[None, :100], cache=cache)
    load_adapters(random_model, adapter_folder(tmp_path / "adapter", random_model))
    assert random_model.make_cache()[0].link.is_hooked and not cache[0].link.is_hooked
    dense = mlx_lm_cache.make_prompt_cache(random_model)
    assert continuation(random_model, PROMPT[:9].tolist(), dense, 5)
    assert len(continuation(random_model, PROMPT[100:103].tolist(), cache, 5)) == 5


def test_a_shallow_copy_is_another_model(random_model, tmp_path):
    enable(random_model, 4, window=16)
    file = save_prompt_cache(tmp_path / "cache", random_model.make_cache(), random_model)
    copied = copy.copy(random_model)
    copied.model = copy.deepcopy(random_model.model)
    load_adapters(copied, adapter_folder(tmp_path / "adapter", random_model))
    with pytest.raises(ValueError, match="belongs to another model"):
        load_prompt_cache(file, copied)
    assert compression_of(copied) is not compression_of(random_model)
    disable(copied)
    assert [type(layer) for layer in copied.make_cache()] == [KVCache] * 2
    assert [type(layer) for layer in random_model.make_cache()] == [TurboQuantKVCache] * 2
    enable(copied, 4)
    assert [type(layer) for layer in copied.make_cache()] == [TurboQuantKVCache] * 2
    disable(copied)


def test_caches_of_different_weights_are_not_batched(random_model, tmp_path):
    other = copy.deepcopy(random_model)
    load_adapters(other, adapter_folder(tmp_path / "adapter", random_model))
    caches = [make_prompt_cache(model, 4)[0] for model in (random_model, other)]
    with pytest.raises(ValueError, match="made with different weights cannot be batched"):
        TurboQuantKVCache.merge(caches)
    again = make_prompt_cache(copy.deepcopy(random_model), 4)[0]
    assert len(TurboQuantKVCache.merge([caches[0], again]).lengths) == 2
    disable(other)
