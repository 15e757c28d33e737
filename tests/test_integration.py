import gc

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models import llama, mamba
from mlx_lm.models.cache import KVCache, RotatingKVCache
from safetensors.numpy import load_file, save_file

import mlx_turboquant
from mlx_turboquant import (
    TurboQuantKVCache,
    cache_size,
    disable,
    enable,
    kernels,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_turboquant.integration import CODEC_VERSION, split_bits

PROMPT = mx.random.randint(0, 128, (200,), key=mx.random.key(3))


def logits(model, cache, chunks=(150, 40, 1, 1, 8)) -> mx.array:
    """Logits of the last tokens of a prompt that is read in chunks, then token by token."""
    start, rows = 0, []
    for size in chunks:
        rows.append(model(PROMPT[None, start : start + size], cache=cache)[0])
        start += size
    return mx.concatenate(rows[1:])


def variant(model, **arguments) -> llama.Model:
    """A model like ``model`` with other arguments and other random weights."""
    return llama.Model(llama.ModelArgs(**{**vars(model.args), **arguments}))


@pytest.mark.parametrize(
    "bits, sides",
    [
        (8, (8, 8)),
        (4.5, (5, 4)),
        (4, (4, 4)),
        (3.5, (4, 3)),
        (3, (4, 2)),
        (2.5, (3, 2)),
        (2, (3, 1)),
    ],
)
def test_bits_are_split_between_keys_and_values(bits, sides):
    assert split_bits(bits) == sides


@pytest.mark.parametrize("bits", [half / 2 for half in range(3, 17)])
def test_every_half_step_has_its_number_as_the_average(bits):
    assert sum(split_bits(bits)) == 2 * bits


def test_explicit_sides_override_the_preset():
    assert split_bits(4, key_bits=8) == (8, 4)
    assert split_bits(4, value_bits=2) == (4, 2)
    assert split_bits(key_bits=6, value_bits=3) == (6, 3)


@pytest.mark.parametrize("bits", [0, 0.5, 3.3, 9, -1, float("nan")])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 8 in steps of a half"):
        split_bits(bits)


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
    assert (cache[0].key_bits, cache[0].value_bits, cache[0].window) == (4, 2, 16)


def test_enabling_twice_takes_the_last_settings_and_disabling_undoes_both(random_model):
    original = llama.scaled_dot_product_attention
    enable(enable(random_model, 3), 2)
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
    assert kernels.backend() == "reference"
    kernels.force_backend(None)


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


def test_a_saved_cache_goes_on_with_the_same_bytes_and_logits(random_model, tmp_path):
    cache = make_prompt_cache(random_model, 3, window=16)
    logits(random_model, cache)
    file = save_prompt_cache(tmp_path / "cache", cache, random_model, {"note": "hello"})
    assert file == tmp_path / "cache.safetensors"
    loaded, metadata = load_prompt_cache(tmp_path / "cache", random_model, return_metadata=True)
    assert metadata["note"] == "hello"
    for saved, restored in zip(cache, loaded):
        for a, b in zip(saved.state, restored.state):
            assert mx.array_equal(a, b) if isinstance(a, mx.array) else a == b
    token = PROMPT[None, :1]
    assert mx.array_equal(random_model(token, cache=cache), random_model(token, cache=loaded))


def test_a_file_is_as_small_as_what_the_cache_holds(random_model, tmp_path):
    cache = make_prompt_cache(random_model, 3, window=16)
    logits(random_model, cache)
    file = save_prompt_cache(tmp_path / "cache", cache, random_model)
    held = sum(part.nbytes for layer in cache for part in layer.state[10:])
    assert held < file.stat().st_size < held + 5000  # the header


def test_mlx_lm_loads_the_file_with_its_own_function(random_model, tmp_path):
    cache = make_prompt_cache(random_model, 4)
    logits(random_model, cache)
    file = save_prompt_cache(tmp_path / "cache", cache, random_model)
    loaded = mlx_lm_cache.load_prompt_cache(str(file))
    assert [type(layer) for layer in loaded] == [TurboQuantKVCache] * 2
    assert loaded[0].offset == 200


@pytest.fixture
def saved(random_model, tmp_path):
    cache = make_prompt_cache(random_model, 4)
    logits(random_model, cache)
    return save_prompt_cache(tmp_path / "cache", cache, random_model)


def test_a_cache_of_another_model_is_refused(random_model, saved):
    for other in (variant(random_model), variant(random_model, rope_theta=5.0)):
        other.update(random_model.parameters() if other.args.rope_theta == 5.0 else {})
        norm = other.model.norm
        norm.weight = norm.weight + (other.args.rope_theta != 5.0)
        with pytest.raises(ValueError, match="belongs to another model"):
            load_prompt_cache(saved, other)


def test_a_cache_of_another_codec_version_is_refused(random_model, saved, monkeypatch):
    monkeypatch.setattr(mlx_turboquant.integration, "CODEC_VERSION", "99")
    with pytest.raises(ValueError, match=f"codec version {CODEC_VERSION}, this is version 99"):
        load_prompt_cache(saved, random_model)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_refused(random_model, saved, kept):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(kept * len(data)) if kept == 0.5 else kept])
    with pytest.raises(ValueError, match="is not a complete safetensors file|is damaged"):
        load_prompt_cache(saved, random_model)


def test_foreign_files_are_refused(random_model, tmp_path):
    weights, text = tmp_path / "weights.safetensors", tmp_path / "text.safetensors"
    save_file({"weight": np.zeros(3, np.float32)}, weights)
    text.write_text("not a safetensors file, but long enough to hold a header length")
    plain = tmp_path / "plain.safetensors"
    mlx_lm_cache.save_prompt_cache(str(plain), [KVCache()])
    for file, message in (
        (weights, "not a prompt cache of mlx_turboquant"),
        (text, "not a complete safetensors file"),
        (plain, "not a prompt cache of mlx_turboquant"),
    ):
        with pytest.raises(ValueError, match=message):
            load_prompt_cache(file, random_model)
    with pytest.raises(ValueError, match="does not exist"):
        load_prompt_cache(tmp_path / "missing.safetensors", random_model)


def test_saving_never_overwrites_another_kind_of_file(random_model, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file({"weight": np.ones(3, np.float32)}, weights)
    cache = make_prompt_cache(random_model, 4)
    with pytest.raises(ValueError, match="exists and is not a prompt cache"):
        save_prompt_cache(weights, cache, random_model)
    assert load_file(weights)["weight"].tolist() == [1, 1, 1]


def test_saving_needs_a_folder(random_model, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        save_prompt_cache(tmp_path / "nowhere" / "c", make_prompt_cache(random_model), random_model)


def test_a_failed_save_leaves_the_old_file_and_no_other(random_model, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(mx, "save_safetensors", fail)
    cache = make_prompt_cache(random_model, 4)
    with pytest.raises(OSError, match="disk full"):
        save_prompt_cache(saved, cache, random_model)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
