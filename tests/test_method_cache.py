import copy

import mlx.core as mx
import pytest
from conftest import logits, variant
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import tiny_model
from tokens import append_in_chunks, keys_and_values, normal, random_tokens

from mlx_turboquant import (
    cache_size,
    disable,
    enable,
    make_prompt_cache,
    save_prompt_cache,
    storage,
)
from mlx_turboquant.integration import plain_caches
from mlx_turboquant.method_cache import MethodKVCache, MethodTokens
from mlx_turboquant.methods import METHODS, make_method
from mlx_turboquant.report import bits_per_value, cache_report, flat_caches
from mlx_turboquant.storage import BLOCK

HEADS, DIM = 2, 64


def filled(sizes, codec: str, bits: int = 4, **settings) -> MethodKVCache:
    """A cache after chunks of these sizes."""
    cache = MethodKVCache(bits, bits, codec=codec, **settings)
    append_in_chunks(cache, keys_and_values(sum(sizes)), sizes)
    return cache


@pytest.mark.parametrize("name", METHODS)
def test_tokens_come_back_as_the_method_restores_them(name):
    """Between the exact sinks and window; blocks of any length, numbers rounded to bfloat16."""
    cache = filled([100, 1, 8, 150], name, window=16, sink_tokens=3)
    fetched = cache.update_and_fetch(*keys_and_values(1, seed=1))
    packed = cache.packed_tokens
    assert packed % BLOCK == 0 and packed > 200
    for restored, x in zip(fetched, keys_and_values(259)):
        assert mx.array_equal(restored[:, :, :3], x[:, :, :3])
        assert mx.array_equal(restored[:, :, 3 + packed : 259], x[:, :, 3 + packed :])
        # The first block to be packed is that of the first chunk, from which channels are chosen.
        first = x[:, :, 3:67]
        method = make_method(name, first, 4)
        x = x[:, :, 3 : 3 + packed]
        expected = method.dequantize(method.quantize(x))
        error = mx.linalg.norm(restored[:, :, 3 : 3 + packed] - expected, axis=-1)
        # Rounding to bfloat16 moves a number by .4 % at most, two of them by .8 %; QJL of few bits
        # and its outliers restore vectors that are longer than the original.
        assert (error < 0.012 * mx.linalg.norm(expected, axis=-1)).all()


@settings(max_examples=10)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=5),
    st.integers(0, 40),
    st.integers(0, 5),
    st.sampled_from(list(METHODS)),
)
def test_all_tokens_are_there_after_any_chunks(sizes, window, sinks, name):
    cache = filled(sizes, name, window=window, sink_tokens=sinks)
    assert cache.offset == cache.size() == cache.packed_tokens + cache.exact_tokens == sum(sizes)
    fetched = cache.update_and_fetch(*keys_and_values(1, seed=1))
    assert [x.shape for x in fetched] == [(1, HEADS, sum(sizes) + 1, DIM)] * 2
    assert mx.isfinite(fetched[0]).all()


@pytest.mark.parametrize(
    "codec, bits, expected",
    [
        ("turboquant", 4, 4.125),
        ("mse", 3, 3.125),
        ("prod", 4, 4.25),
        ("qjl", 2, 2.125),
        ("qjl-outliers", 2, (8 * 32 + 8 * 8 + 32) / 128),  # 120 * 2 signs in 8 words
        ("split", 2, 2.5),
        ("split", 3, 3.5),
        ("polar", 4, 3.875),
        ("affine", 4, 4.5),
        ("qjl+affine", 2, (2.125 + 2.5) / 2),
    ],
)
def test_numbers_are_stored_in_16_bits_and_everything_is_counted(codec, bits, expected):
    cache = MethodKVCache(bits, bits, codec=codec, window=0, sink_tokens=0)
    x = normal((1, HEADS, 512, 128))
    mx.eval(cache.update_and_fetch(x, x))
    assert bits_per_value([cache]) == expected
    arrays = sum(array.nbytes for store in cache._packed for array in store.arrays)
    assert 8 * arrays / (2 * x.size) == expected
    channels = 2 * HEADS * 4 * 32 if codec == "split" else 2 * HEADS * 4 * 8
    learned = channels if codec in ("split", "qjl-outliers") else 0
    exact = sum(array.nbytes for array in cache._exact)
    assert cache.nbytes == arrays + learned + exact


def test_outlier_channels_are_those_of_the_first_tokens_of_each_head():
    keys = normal((1, HEADS, 64, DIM))
    keys[:, 0, :, :16] *= 10
    keys[:, 1, :, 40:56] *= 10
    store = MethodTokens("split", 2, seed=0)
    store.append(keys)
    store.append(keys[:, :, :32, ::-1])
    channels = store.method.channels
    assert channels[0, :, 0].tolist() == [list(range(16)), list(range(40, 56))]


def test_our_codec_through_the_reference_path_is_the_default_one(random_model, monkeypatch):
    """But for the mean of keys, which methods leave to those that have one of their own."""
    monkeypatch.setattr(storage, "removable_mean", lambda x, _: mx.zeros((*x.shape[:2], 1, DIM)))
    ours = make_prompt_cache(random_model, key_bits=3, value_bits=2, window=16)
    expected = logits(random_model, ours)
    cache = make_prompt_cache(random_model, key_bits=3, value_bits=2, window=16, codec="turboquant")
    measured = logits(random_model, cache)
    assert [type(layer) for layer in cache] == [MethodKVCache] * 2
    assert cache[0].packed_tokens == ours[0].packed_tokens > 100
    assert mx.allclose(measured, expected, atol=1e-4)  # float32 sums in another order, two layers


def test_trimmed_tokens_are_forgotten_and_others_kept():
    cache = filled([200], "prod", window=16)
    before = cache.update_and_fetch(*keys_and_values(1, seed=1))
    mx.eval(before)
    cache.trim(101)
    after = cache.update_and_fetch(*keys_and_values(3, seed=2))
    for one, other in zip(after, before):
        assert one.shape[2] == 103
        # Products of fewer tokens may sum their float32 values of size 1 in another order.
        assert mx.allclose(one[:, :, :100], other[:, :, :100], atol=1e-5)


def test_a_copy_goes_on_by_itself():
    cache = filled([200], "polar", window=16)
    other = copy.deepcopy(cache)
    mx.eval(cache.update_and_fetch(*keys_and_values(60, seed=1)))
    fetched = other.update_and_fetch(*keys_and_values(1, seed=2))
    assert other.offset == 201 and fetched[0].shape[2] == 201
    assert cache.offset == 260


def test_enabled_models_use_the_codec_everywhere(random_model):
    enable(random_model, 2.5, codec="qjl+affine", window=16)
    cache = random_model.make_cache()
    assert [(layer.codec, layer.key_bits, layer.value_bits) for layer in cache] == [
        ("qjl+affine", 3, 2)
    ] * 2
    logits(random_model, cache)
    assert "MethodKVCache" in str(cache_report(cache))
    assert cache_size(cache).tokens == 200
    disable(random_model)


def test_all_layers_have_the_bits_that_were_asked_for(random_model):
    """No preset: neither uneven splits nor more bits in the last layers."""
    cache = make_prompt_cache(random_model, 3, codec="mse")
    assert [(layer.key_bits, layer.value_bits) for layer in cache] == [(3, 3)] * 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"codec": "quip"}, "Codec 'quip' is not known: use one of affine, eden"),
        ({"codec": "qjl+"}, "Codec '' is not known"),
        ({"codec": "prod", "bits": 1}, "1 bit has no first stage"),
        ({"codec": "polar", "bits": 3}, "PolarQuant with 3 bits is not defined: use 4"),
        ({"codec": "affine", "value_bits": 7}, "Affine rounding to 7 bits is not supported"),
        ({"codec": "qjl", "max_size": 1000}, "codec qjl cannot be limited to 1000 tokens"),
        ({"codec": "qjl", "window": -1}, "window of -1"),
    ],
)
def test_settings_that_a_codec_cannot_have_are_refused(random_model, settings, message):
    with pytest.raises(ValueError, match=message):
        make_prompt_cache(random_model, **settings)


@pytest.mark.parametrize("codec", ["polar", "affine", "turboquant+affine"])
def test_a_head_dim_that_a_codec_cannot_have_is_refused_before_anything_runs(random_model, codec):
    model = variant(random_model, head_dim=40)
    with pytest.raises(ValueError, match="40 values"):
        make_prompt_cache(model, codec=codec)


@pytest.mark.parametrize("family", ["deepseek_v2", "gemma3n", "falcon_h1"])
def test_keys_of_another_width_shared_layers_and_lists_of_caches_can_have_a_codec(family):
    model = tiny_model(family)
    prompt = random_tokens(1, 100, seed=1, vocabulary=500)
    cache = make_prompt_cache(model, 8, codec="turboquant", window=0, sink_tokens=0)
    compressed = [part for part in flat_caches(cache) if isinstance(part, MethodKVCache)]
    assert compressed
    outputs = []
    for used in (cache, plain_caches(model)):
        model(prompt[:, :90], cache=used)
        outputs.append(model(prompt[:, 90:], cache=used))
    assert all(part.packed_tokens == 96 for part in compressed)
    # 8 bits: .6 % of every key and value.
    assert mx.linalg.norm(outputs[0] - outputs[1]) < 0.05 * mx.linalg.norm(outputs[1])


def test_latent_attention_has_no_choice_of_codecs():
    with pytest.raises(ValueError, match="Codec qjl is not for latent attention: leave it out"):
        make_prompt_cache(tiny_model("deepseek_v3"), codec="qjl")


def test_such_a_cache_is_neither_batched_nor_saved(random_model, tmp_path):
    cache = make_prompt_cache(random_model, codec="qjl")
    assert not hasattr(cache[0], "merge")
    with pytest.raises(ValueError, match="MethodKVCache is not a kind of cache that is saved"):
        save_prompt_cache(tmp_path / "cache", cache, random_model)
    assert list(tmp_path.iterdir()) == []
