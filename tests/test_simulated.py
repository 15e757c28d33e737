import copy

import mlx.core as mx
import pytest
from conftest import logits, variant
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import METHODS, make_method
from other_methods import ALL_METHODS
from simulated import (
    MethodRounding,
    SimulatedCache,
    method_roundings,
    simulated_preset,
)
from tiny_families import tiny_model

from mlx_turboquant import cache_report, make_prompt_cache, save_prompt_cache
from mlx_turboquant.kernels import storage
from mlx_turboquant.kernels.tokens import BLOCK
from mlx_turboquant.lm import texts
from mlx_turboquant.lm.compressible import flat_caches, plain_caches
from mlx_turboquant.lm.settings import Settings
from mlx_turboquant.measure.cache_specs import token_size
from mlx_turboquant.measure.evaluate import Comparison

HEADS, DIM = 2, 64


def tokens(count: int, seed: int = 0) -> list[mx.array]:
    shape = (1, HEADS, count, DIM)
    return [mx.random.normal(shape, key=key) for key in mx.random.split(mx.random.key(seed))]


def filled(sizes, codec: str, window: int = 16, sink_tokens: int = 4) -> SimulatedCache:
    """A cache of 4 bits after chunks of these sizes."""
    roundings = method_roundings(codec, Settings(key_bits=4, value_bits=4), (DIM, DIM))
    cache = SimulatedCache(*roundings, window, sink_tokens)
    keys, values = tokens(sum(sizes))
    start = 0
    for size in sizes:
        chunk = slice(start, start + size)
        mx.eval(cache.update_and_fetch(keys[:, :, chunk], values[:, :, chunk]))
        start += size
    return cache


@pytest.mark.parametrize("name", METHODS)
def test_tokens_come_back_as_the_method_restores_them(name):
    """They lie between the exact sinks and window; blocks have any length, numbers are bfloat16."""
    cache = filled([100, 1, 8, 150], name, sink_tokens=3)
    fetched = cache.update_and_fetch(*tokens(1, seed=1))
    rounded = cache.rounded
    assert rounded % BLOCK == 0 and rounded > 200
    for restored, x in zip(fetched, tokens(259)):
        assert mx.array_equal(restored[:, :, :3], x[:, :, :3])
        assert mx.array_equal(restored[:, :, 3 + rounded : 259], x[:, :, 3 + rounded :])
        method = make_method(name, x, 4)
        x = x[:, :, 3 : 3 + rounded]
        expected = method.dequantize(method.quantize(x))
        error = mx.linalg.norm(restored[:, :, 3 : 3 + rounded] - expected, axis=-1)
        # bfloat16 rounds a number by at most 0.4 %, two of them by 0.8 %; QJL restores vectors
        # that are longer than the original.
        assert (error < 0.012 * mx.linalg.norm(expected, axis=-1)).all()


@settings(max_examples=10)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=5),
    st.integers(0, 40),
    st.integers(0, 5),
    st.sampled_from(list(METHODS)),
)
def test_all_tokens_are_there_after_any_chunks(sizes, window, sinks, name):
    cache = filled(sizes, name, window, sinks)
    assert cache.offset == cache.size() == sum(sizes)
    fetched = cache.update_and_fetch(*tokens(1, seed=1))
    assert [x.shape for x in fetched] == [(1, HEADS, sum(sizes) + 1, DIM)] * 2
    assert mx.isfinite(fetched[0]).all()
    left = sum(sizes) - sinks - window
    assert cache.rounded == max(0, left // BLOCK * BLOCK)


def test_a_chunk_sees_itself_and_what_was_exact_before_it_exactly():
    cache = SimulatedCache(mx.zeros_like, mx.ones_like, window=16, sink_tokens=4)
    keys, values = tokens(500)
    for start, stop in ((0, 40), (40, 400), (400, 500)):
        chunk = slice(start, stop)
        seen = cache.update_and_fetch(keys[:, :, chunk], values[:, :, chunk])
        rounded = cache.rounded
        assert rounded == max(0, start - 20) // BLOCK * BLOCK
        for x, original, number in zip(seen, (keys, values), (0, 1)):
            assert mx.array_equal(x[:, :, :4], original[:, :, :4])
            assert (x[:, :, 4 : 4 + rounded] == number).all()
            assert mx.array_equal(x[:, :, 4 + rounded :], original[:, :, 4 + rounded : stop])


@pytest.mark.parametrize(
    "name, bits, expected",
    [
        ("turboquant", 4, 4.125),
        ("mse", 3, 3.125),
        ("prod", 4, 4.25),
        ("qjl", 2, 2.125),
        ("affine", 4, 4.5),
    ],
)
def test_a_vector_takes_what_the_method_would_store_with_numbers_in_16_bits(name, bits, expected):
    assert 8 * MethodRounding(name, bits, 128).vector_nbytes == expected * 128


def test_a_token_takes_the_bytes_of_its_key_and_its_value(random_model):
    cache = simulated_preset("qjl+affine:2").make_cache(random_model)
    logits(random_model, cache)
    # A norm for the 64 values of a key, a scale and an offset for those of a value.
    bits = (2 + 16 / 64 + 2 + 32 / 64) / 2
    values = 2 * 2 * HEADS * DIM
    assert token_size(cache) == (values, values * bits / 8)


def test_outlier_channels_are_those_of_the_first_tokens_of_each_head(monkeypatch):
    monkeypatch.setitem(METHODS, "split", ALL_METHODS["split"])
    keys = mx.random.normal((1, HEADS, 64, DIM), key=mx.random.key(0))
    keys[:, 0, :, :16] *= 10
    keys[:, 1, :, 40:56] *= 10
    rounding = MethodRounding("split", 2, DIM)
    rounding(keys)
    rounding(keys[:, :, :32, ::-1])
    channels = rounding.method.channels
    assert channels[0, :, 0].tolist() == [list(range(16)), list(range(40, 56))]


def test_our_codec_simulated_is_our_cache(random_model, monkeypatch):
    """Without the mean of keys, which simulated methods do not remove."""
    monkeypatch.setattr(storage, "removable_mean", lambda x, _: mx.zeros((*x.shape[:2], 1, DIM)))
    ours = make_prompt_cache(random_model, key_bits=3, value_bits=2, window=16)
    expected = logits(random_model, ours)
    cache = simulated_preset("turboquant:K3V2", Settings(window=16)).make_cache(random_model)
    measured = logits(random_model, cache)
    assert [type(layer) for layer in cache] == [SimulatedCache] * 2
    assert cache[0].rounded == ours[0].packed_tokens > 100
    assert mx.allclose(measured, expected, atol=1e-4)  # float32 sums in another order, two layers


def test_trimmed_tokens_are_forgotten_and_others_kept():
    cache = filled([200], "prod")
    before = cache.update_and_fetch(*tokens(1, seed=1))
    mx.eval(before)
    assert cache.trim(101) == 101
    after = cache.update_and_fetch(*tokens(3, seed=2))
    for one, other, new in zip(after, before, tokens(3, seed=2)):
        assert mx.array_equal(one[:, :, :100], other[:, :, :100])
        assert mx.array_equal(one[:, :, 100:], new)


def test_a_copy_goes_on_by_itself():
    cache = filled([200], "prod")
    other = copy.deepcopy(cache)
    mx.eval(cache.update_and_fetch(*tokens(60, seed=1)))
    fetched = other.update_and_fetch(*tokens(1, seed=2))
    assert other.offset == 201 and fetched[0].shape[2] == 201
    assert cache.offset == 260


def test_all_layers_have_the_bits_that_were_asked_for(random_model):
    """There is no allocation: half bits give keys one more, and all layers are alike."""
    for name, bits in (("mse:3", (3, 3)), ("qjl+affine:2.5", (3, 2)), ("qjl:K4V1", (4, 1))):
        cache = simulated_preset(name).make_cache(random_model)
        assert [tuple(each.bits for each in layer.roundings) for layer in cache] == [bits] * 2


@pytest.mark.parametrize("name", ["affine:4", "turboquant+affine:4"])
def test_a_head_dim_that_a_codec_cannot_have_is_refused_before_anything_runs(random_model, name):
    model = variant(random_model, head_dim=40)
    with pytest.raises(ValueError, match="40 values"):
        simulated_preset(name).make_cache(model)


@pytest.mark.parametrize("family", ["deepseek_v2", "gemma3n", "falcon_h1"])
def test_keys_of_another_width_shared_layers_and_lists_of_caches_can_have_a_codec(family):
    model = tiny_model(family)
    prompt = mx.random.randint(0, 500, (1, 101), key=mx.random.key(1))
    cache = simulated_preset("turboquant:8", Settings(window=0, sink_tokens=0)).make_cache(model)
    simulated = [part for part in flat_caches(cache) if isinstance(part, SimulatedCache)]
    assert simulated
    outputs = []
    for used in (cache, plain_caches(model)):
        model(prompt[:, :90], cache=used)
        model(prompt[:, 90:100], cache=used)
        outputs.append(model(prompt[:, 100:], cache=used))
    assert all(part.rounded == 96 for part in simulated)
    # 8 bits: 0.6 % of every key and value.
    assert mx.linalg.norm(outputs[0] - outputs[1]) < 0.05 * mx.linalg.norm(outputs[1])


def test_latent_attention_has_no_choice_of_codecs():
    with pytest.raises(ValueError, match="Codec qjl does not support latent attention"):
        simulated_preset("qjl:4").make_cache(tiny_model("deepseek_v3"))


def test_a_model_without_a_layer_that_could_be_compressed_is_refused():
    with pytest.raises(ValueError, match="No layer of this model can be compressed"):
        simulated_preset("qjl:4").make_cache(tiny_model("deepseek_v32"))


def test_such_a_cache_is_neither_batched_nor_saved_nor_called_compressed(random_model, tmp_path):
    cache = simulated_preset("qjl:4").make_cache(random_model)
    assert not hasattr(cache[0], "merge")
    with pytest.raises(ValueError, match="SimulatedCache is not a kind of cache that is saved"):
        save_prompt_cache(tmp_path / "cache", cache, random_model)
    assert list(tmp_path.iterdir()) == []
    logits(random_model, cache)
    assert cache_report(cache).compressed_layers == 0


@pytest.mark.parametrize(
    "name", [":4", "prod:", "quip:4", "prod:K1V1", "affine:K7V4", "prod:auto", "prod+:4"]
)
def test_unknown_methods_and_bits_are_refused(name):
    with pytest.raises(ValueError, match="use "):
        simulated_preset(name)


def test_presets_of_other_codecs_have_no_budget_of_layers():
    spec = simulated_preset("qjl+affine:k3v2", Settings(uniform=True, window=16))
    assert (spec.name, spec.codec) == ("qjl+affine K3V2", "qjl+affine")
    assert spec.settings == Settings(key_bits=3, value_bits=2, window=16)


def test_qjl_hurts_attention(tiny_lm):
    """QJL is used for keys alone, with values of our codec at the same bits."""
    model, tokenizer = tiny_lm
    [tokens] = texts.contexts(tokenizer, texts.bundled_texts()[1:2], 600, 1)
    names = ("K3V3", "prod+turboquant:3", "qjl+turboquant:3")
    comparison = Comparison(model, [simulated_preset(name, Settings(window=16)) for name in names])
    comparison.text(tokens, 128)
    ours, prod, qjl = (scores.summary()["kl_mean"] for scores in comparison.scores[1:])
    # The variances of a product, and to second order the divergences, are as 1 : 5.6 : 16.
    assert 2 * ours < prod < qjl / 1.5
    assert [scores.bits for scores in comparison.scores[1:]] == [3.125, 3.1875, 3.125]
