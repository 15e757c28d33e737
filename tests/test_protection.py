import copy
import math

import mlx.core as mx
import pytest
from broken_models import add_key_offsets, add_outlier_channels
from conftest import PROMPT, logits
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import tiny_model

from mlx_turboquant import (
    TurboQuantKVCache,
    cache_report,
    enable,
    make_prompt_cache,
)
from mlx_turboquant.evaluate import Comparison, preset
from mlx_turboquant.integration import is_last
from mlx_turboquant.protection import (
    Demands,
    Limits,
    error_demands,
    relative_error,
    single_precision,
)
from mlx_turboquant.quantizer import TurboQuantizer
from mlx_turboquant.texts import bundled_texts

DIM = 64
LIMITS = Limits(single_precision(0.05), single_precision(0.05), key_bits=3, value_bits=2)


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_bit_more_leaves_a_third_to_a_fifth_of_the_error(dim):
    errors = [relative_error(dim, bits) for bits in range(1, 9)]
    assert all(3 < before / after < 5 for before, after in zip(errors, errors[1:]))


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_the_demands_are_what_quantizing_does(bits):
    """Averaged over rotations; of second order in the error, which is small but not nothing."""
    queries, keys, values = (
        random(1, 4, 8, DIM),
        random(1, 2, 200, DIM, seed=1),
        random(1, 2, 200, DIM, seed=2),
    )
    squared = tuple((x * x).sum(axis=-1) for x in (keys, values))
    demands = Demands(*error_demands(queries, keys, values, squared, DIM**-0.5, None).tolist())

    def attend(keys, values):
        grouped = mx.unflatten(queries, 1, (2, 2)) * DIM**-0.5
        weights = mx.softmax(grouped @ keys[:, :, None].swapaxes(-1, -2), axis=-1)
        return weights, weights @ values[:, :, None]

    weights, outputs = attend(keys, values)
    divergence, error, seeds = 0.0, 0.0, 12
    for seed in range(seeds):
        quantizer = TurboQuantizer(DIM, bits, seed=seed, scale="none", gain_search=False)
        moved, _ = attend(quantizer.dequantize(quantizer.quantize(keys)), values)
        divergence += (weights * mx.log(weights / moved)).sum(axis=-1).mean().item() / seeds
        _, wrong = attend(keys, quantizer.dequantize(quantizer.quantize(values)))
        error += ((wrong - outputs) ** 2).sum().item() / (outputs**2).sum().item() / seeds
    assert divergence == pytest.approx(demands.keys * relative_error(DIM, bits), rel=0.15)
    assert error == pytest.approx(demands.values * relative_error(DIM, bits), rel=0.3)


@given(st.integers(1, 20), st.integers(0, 30))
def test_a_causal_mask_is_the_same_in_every_form(rows, before):
    count = rows + before
    arrays = random(1, 4, rows, DIM), random(1, 2, count, DIM), random(1, 2, count, DIM, seed=1)
    squared = (random(1, 2, count) ** 2,) * 2
    visible = mx.arange(count) <= mx.arange(before, count)[:, None]
    masks = ["causal", visible, mx.where(visible, 0, -mx.inf), visible[None, None]]
    first, *others = (error_demands(*arrays, squared, 0.1, mask).tolist() for mask in masks)
    assert all(other == pytest.approx(first) for other in others)


def test_what_is_masked_or_exact_demands_nothing():
    queries, keys, values = (random(1, 2, 10, DIM, seed=i) for i in range(3))
    none = mx.zeros((1, 2, 10))
    assert error_demands(queries, keys, values, (none, none), 0.1, None).tolist() == [0, 0]
    hidden = mx.where(mx.arange(10) < 5, 1e6, 0) * mx.ones((1, 2, 10))
    mask = mx.broadcast_to(mx.arange(10) >= 5, (10, 10))
    assert error_demands(queries, keys, values, (hidden, hidden), 0.1, mask).tolist() == [0, 0]


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 8), st.integers(1, 8))
def test_the_bits_are_the_fewest_within_the_limits(keys, values, key_bits, value_bits):
    limits = LIMITS._replace(key_bits=key_bits, value_bits=value_bits)
    chosen = limits.bits(Demands(keys, values), DIM, DIM)
    for bits, least, demand, limit in zip(
        chosen, (key_bits, value_bits), (keys, values), (LIMITS.keys, LIMITS.values)
    ):
        assert least <= bits <= 8
        assert bits == 8 or demand * relative_error(DIM, bits) <= limit
        assert bits == least or demand * relative_error(DIM, bits - 1) > limit


def test_a_demand_that_is_not_a_number_raises_nothing():
    assert LIMITS.bits(Demands(math.nan, math.nan), DIM, DIM) == (3, 2)


def filled(count: int, size: float = 1.0, **settings) -> TurboQuantKVCache:
    """A cache that was given keys of this size and then a look at the queries."""
    cache = TurboQuantKVCache(3, 2, window=16, limits=LIMITS, **settings)
    cache.update_and_fetch(size * random(1, 2, count, DIM), random(1, 2, count, DIM, seed=1))
    assert cache.packed_tokens == 0
    cache.protect(random(1, 4, count, DIM, seed=2), DIM**-0.5, "causal")
    return cache


def test_large_keys_get_more_bits_and_small_ones_do_not():
    small, large, huge = (filled(100, size) for size in (0.1, 4, 1000))
    assert small.key_bits == 3 < large.key_bits < huge.key_bits == 8
    assert [x.packed_tokens for x in (small, large, huge)] == [64, 64, 64]


def test_a_protected_cache_is_packed_like_one_of_its_bits():
    """Though keys and values are looked at together, and their means long before they are used."""
    protected = filled(100, 4)
    plain = TurboQuantKVCache(protected.key_bits, protected.value_bits, window=16)
    plain.update_and_fetch(4 * random(1, 2, 100, DIM), random(1, 2, 100, DIM, seed=1))
    pairs = zip(protected.state[-6:], plain.state[-6:])
    assert all(mx.array_equal(*pair) for pair in pairs)


def test_after_everything_was_taken_back_other_tokens_are_the_first():
    cache = filled(100)
    assert cache.packed_tokens == 64 and cache.trim(100) == 100
    assert cache_report([cache]).size.tokens == 0
    cache.update_and_fetch(random(1, 2, 100, DIM) + 50, random(1, 2, 100, DIM))
    assert mx.abs(cache._packed[0].mean - 50).max() < 1


def test_attention_that_does_not_show_its_queries_gets_the_bits_asked_for():
    cache = TurboQuantKVCache(3, 2, window=16, limits=LIMITS)
    for count in (100, 40):
        cache.update_and_fetch(100 * random(1, 2, count, DIM), random(1, 2, count, DIM))
    assert (cache.key_bits, cache.value_bits, cache.packed_tokens) == (3, 2, 96)


@pytest.mark.parametrize("prompt", [5, 30, 200])
def test_bits_are_chosen_once_however_short_the_prompt_is(random_model, prompt):
    """Whether the first tokens leave the window while the prompt is read or long after."""
    cache = make_prompt_cache(random_model, 2, window=32)
    random_model(PROMPT[None, :prompt], cache=cache)
    for i in range(prompt, 200, 3):
        before = [(layer.demands, layer.key_bits, layer.packed_tokens) for layer in cache]
        random_model(PROMPT[None, i : i + 3], cache=cache)
        for layer, (demands, bits, packed) in zip(cache, before):
            assert demands is None or (layer.demands, layer.key_bits) == (demands, bits)
            assert (layer.demands is None) == (layer.packed_tokens == 0)
            assert layer.packed_tokens >= packed
    assert all(layer.exact_tokens <= 4 + 32 + 31 + 3 for layer in cache)


@pytest.mark.parametrize("decided", [False, True])
def test_a_restored_cache_goes_on_as_the_original(decided):
    cache = filled(100, 4) if decided else TurboQuantKVCache(3, 2, window=16, limits=LIMITS)
    restored = TurboQuantKVCache.from_state(cache.state)
    for each in (cache, restored):
        each.update_and_fetch(4 * random(1, 2, 90, DIM), random(1, 2, 90, DIM, seed=3))
        each.protect(random(1, 4, 90, DIM, seed=2), DIM**-0.5, "causal")
    assert restored.key_bits == cache.key_bits > 3
    assert (restored.limits, restored.demands) == (cache.limits, cache.demands)
    assert all(mx.array_equal(a, b) for a, b in zip(restored.state[-6:], cache.state[-6:]))


def mean_divergence(model, tokenizer, *codecs) -> list[float]:
    tokens = tokenizer.encode(bundled_texts()[1], verbose=False)[:701]
    comparison = Comparison(model, [preset(codec) for codec in codecs])
    comparison.text(tokens, 128)
    return [scores.summary()["kl_mean"] for scores in comparison.scores[1:]]


def test_offsets_of_keys_cost_nothing(tiny_lm):
    model, tokenizer = tiny_lm
    [divergence] = mean_divergence(add_key_offsets(copy.deepcopy(model), 80), tokenizer, "4")
    assert divergence < 0.003


def test_outliers_raise_the_layers_that_suffer_and_the_report_says_why(tiny_lm):
    tokens = mx.array(tiny_lm[1].encode(bundled_texts()[1], verbose=False)[:700])[None]
    model = add_outlier_channels(copy.deepcopy(tiny_lm[0]), variance=300)
    caches = [make_prompt_cache(model, 4, protect=protect) for protect in (True, False)]
    for cache in caches:
        model(tokens, cache=cache)
    protected, plain = caches
    raised = [i for i, layer in enumerate(protected) if layer.key_bits > plain[i].key_bits]
    assert 0 < len(raised) < len(protected)
    report = cache_report(protected)
    keys = [line for line in report.raised if "keys have" in line]
    assert [int(line.split()[1].rstrip(":")) for line in keys] == raised
    assert all("expected divergence of the weights is" in line for line in keys)
    more = sum(float(line.split()[-3]) for line in report.raised)
    assert more == pytest.approx(
        (report.size.nbytes - cache_report(plain).size.nbytes) / 1e6, abs=0.02
    )
    assert str(report).splitlines()[-len(keys) :] == report.raised
    assert cache_report(plain).raised == []


def test_the_report_says_where_no_number_of_bits_is_enough():
    enough, strict = filled(100, 4), filled(100, 4)
    strict.limits = LIMITS._replace(keys=single_precision(1e-6))
    assert not any("either" in line for line in cache_report([enough]).raised)
    more, not_enough = cache_report([strict]).raised[:2]
    assert "layer 0: keys have 8 bits, not 3" in more
    assert "layer 0: keys are not good enough at 8 bits either" in not_enough
    assert "`mlx_turboquant evaluate`" in not_enough


def test_auto_stays_within_its_budget_and_takes_more_bits_for_a_smaller_one(tiny_lm):
    model, tokenizer = tiny_lm
    tokens = tokenizer.encode(bundled_texts()[1], verbose=False)[:701]
    budgets = (0.05, 0.005, 0.0005)
    comparison = Comparison(model, [preset("auto", kl_budget=budget) for budget in budgets])
    comparison.text(tokens, 128)
    scores = comparison.scores[1:]
    assert all(each.summary()["kl_mean"] < budget for each, budget in zip(scores, budgets))
    assert scores[0].bits < scores[1].bits < scores[2].bits < 7


def test_the_last_eighth_of_the_layers_are_the_last():
    assert [i for i in range(4) if is_last(i, 4)] == [3]
    assert [i for i in range(32) if is_last(i, 32)] == [28, 29, 30, 31]


def test_attention_of_a_models_own_has_no_limits_and_eight_bits_with_auto():
    model = tiny_model("gemma2")
    assert all(layer.limits is None for layer in make_prompt_cache(model, 4))
    automatic = make_prompt_cache(model, "auto")
    assert {(layer.key_bits, layer.value_bits) for layer in automatic} == {(8, 8)}


def test_a_batch_decides_with_its_longest_sequence(random_model):
    batch = TurboQuantKVCache.merge.fget(TurboQuantKVCache())(
        [TurboQuantKVCache(3, 2, window=16, limits=LIMITS) for _ in range(2)]
    )
    batch.prepare(lengths=[60, 100], right_padding=[40, 0])
    x = mx.concatenate([random(1, 2, 100, DIM), 1000 * random(1, 2, 100, DIM, seed=4)])
    batch.update_and_fetch(x, random(2, 2, 100, DIM, seed=1))
    assert batch.packed_tokens == 0
    batch.protect(random(2, 4, 100, DIM, seed=2), DIM**-0.5, "causal")
    batch.finalize()
    assert batch.key_bits == 8 and batch.packed_tokens == 64 + 32
    assert batch.extract(0).demands == batch.demands


def test_sequences_of_different_bits_join_at_the_most_of_them():
    few, many, new = (
        filled(100, 0.1),
        filled(100, 4),
        TurboQuantKVCache(3, 2, window=16, limits=LIMITS),
    )
    assert few.key_bits < many.key_bits
    expected = [cache._packed[0].dense(mx.float32) for cache in (few, many)]
    batch = few.merge([few, many, new])
    assert batch.key_bits == many.key_bits
    for row, before in enumerate(expected):
        after = batch.extract(row)._packed[0].dense(mx.float32)
        error = mx.square(after - before).sum() / mx.square(before).sum()
        # Nothing is quantized twice but what had fewer bits, and that nearly without a loss.
        assert error <= (0 if row else 2 * relative_error(DIM, many.key_bits))


def test_enable_and_batches_take_the_settings(random_model):
    enable(random_model, "auto", kl_budget=0.1)
    cache = random_model.make_cache()
    assert cache[0].limits.keys > make_prompt_cache(random_model, "auto")[0].limits.keys
    assert logits(random_model, cache).shape[0] == 50


@pytest.mark.parametrize(
    "bits, settings, message",
    [
        ("auto", {"key_bits": 4}, "leave them out"),
        ("auto", {"protect": False}, "leave out the option"),
        ("auto", {"kl_budget": 0}, "use a positive number of nats with auto"),
        (4, {"kl_budget": 0.1}, "use a positive number of nats with auto"),
        ("best", {}, "use a number or 'auto'"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(random_model, bits, settings, message):
    with pytest.raises(ValueError, match=message):
        make_prompt_cache(random_model, bits, **settings)
