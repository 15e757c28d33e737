from dataclasses import replace
from itertools import islice

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import variant
from tiny_families import FAMILIES, tiny_model
from tokens import random_tokens

from mlx_turboquant import disable
from mlx_turboquant.lm.settings import Settings
from mlx_turboquant.measure.cache_specs import EXACT, MLX_LM, preset
from mlx_turboquant.measure.evaluate import (
    Comparison,
    divergence,
    following_tokens,
    read_first_chunk,
    read_prompt,
)
from mlx_turboquant.measure.scores import Generation, Scores

TOKENS = random_tokens(301, seed=5).tolist()
SHORT = Settings(window=16)
UNPROTECTED = Settings(window=0, sink_tokens=0)


def compare(model, *specs, scored=100, greedy=0) -> list[Scores]:
    comparison = Comparison(model, list(specs))
    comparison.text(TOKENS, scored, greedy)
    return comparison.scores


def test_the_divergence_is_that_of_the_formula():
    logits = np.random.default_rng(0).normal(size=(2, 5, 40))
    exact, other = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = (np.exp(exact) * (exact - other)).sum(axis=-1)
    measured = divergence(mx.array(exact), mx.array(other))
    assert np.allclose(measured, expected, atol=1e-6)  # rounding of float32


def test_the_exact_cache_has_the_perplexity_of_the_model_without_a_cache(random_model):
    exact, *_ = compare(random_model)
    losses = nn.losses.cross_entropy(
        random_model(mx.array(TOKENS[:-1])[None]), mx.array([TOKENS[1:]])
    )
    expected = mx.exp(losses[0, -100:].mean()).item()
    assert exact.summary()["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert exact.positions == list(range(201, 301))
    assert max(exact.divergences) == 0 and all(exact.agreements)


def test_fewer_bits_are_farther_away(random_model):
    presets = [preset(name, SHORT) for name in ("8", "4", "2", "K1V1")]
    scores = compare(random_model, *presets)
    means = [each.summary()["kl_mean"] for each in scores]
    assert means == sorted(means) and means[0] == 0 and means[1] > 0
    assert [each.bits for each in scores] == [16, 8.25, 4.25, 2.25, 1.25]
    values = 2 * 2 * 2 * 64  # keys and values of two heads in two layers
    assert [each.token_nbytes for each in scores] == [values * each.bits / 8 for each in scores]
    assert all(each.bits_in_all > each.bits for each in scores[1:])


def test_tokens_are_seen_quantized_as_soon_as_they_leave_the_window(random_model):
    """A window for the whole text changes nothing; without a window the first tokens change."""
    specs = [preset("2", Settings(window=window)) for window in (400, 0)]
    whole, none = compare(random_model, *specs)[1:]
    assert max(whole.divergences) < 1e-6 < min(none.divergences)


def test_the_caches_of_mlx_lm_are_quantized(random_model):
    eight, four = compare(random_model, *MLX_LM)[1:]
    assert 0 < eight.summary()["kl_mean"] < four.summary()["kl_mean"]
    assert [eight.bits, four.bits] == [8.5, 4.5]
    assert [eight.token_nbytes, four.token_nbytes] == [512 * 8.5 / 8, 512 * 4.5 / 8]


def test_a_model_that_mlx_lm_cannot_quantize_fails_in_its_line_only(random_model):
    model = variant(random_model, head_dim=40)
    exact, eight, ours = compare(model, MLX_LM[0], preset("4"))
    assert eight.failure and "kl_mean" not in eight.summary()
    assert exact.failure is None and ours.failure is None


def test_the_first_departure_is_where_generation_differs(tiny_lm):
    model, tokenizer = tiny_lm
    tokens = tokenizer.encode("import os\n\nclass A:\n    def f(self, x):\n" * 30)
    spec = preset("K1V1", UNPROTECTED)
    comparison = Comparison(model, [spec])
    comparison.text(tokens, 1, 24)
    texts = []
    for cache in (None, spec.make_cache(model)):
        replies = mlx_lm.stream_generate(
            model, tokenizer, tokens, max_tokens=24, prompt_cache=cache
        )
        texts.append([reply.token for reply in replies])
    expected = next(i for i, (one, other) in enumerate(zip(*texts)) if one != other)
    exact, ours = comparison.scores
    assert exact.departures == [None] and ours.departures == [expected]


def test_the_tail_of_divergences_is_that_of_the_scored_tokens():
    scores = Scores(preset("4"), divergences=[0.0] * 999 + [2.0] * 2, losses=[0.0])
    scores.agreements, scores.overlaps = [True], [1.0]
    summary = scores.summary()
    assert summary["kl_p99"] == 0 and summary["kl_p999"] == summary["kl_max"] == 2


def test_stretches_of_positions_cover_what_was_scored():
    scores = Scores(preset("4"), positions=[10, 11, 12, 13] * 2)
    scores.divergences, scores.losses = [1, 1, 3, 3] * 2, [0.0] * 8
    assert scores.by_position(bins=2) == [
        {"first": 10, "last": 11, "kl_mean": 1, "perplexity": 1},
        {"first": 12, "last": 13, "kl_mean": 3, "perplexity": 1},
    ]


def test_the_overlap_is_one_less_the_total_variation(random_model):
    exact, ours = compare(random_model, preset("K1V1", Settings(window=0)))
    assert exact.overlaps == pytest.approx([1.0] * 100, abs=1e-5)  # float32 sums of 128 numbers
    # Pinsker's inequality: the total variation is at most the root of half the divergence.
    bounds = [1 - (kl / 2) ** 0.5 for kl in ours.divergences]
    assert all(bound <= overlap < 1 for bound, overlap in zip(bounds, ours.overlaps))
    assert ours.summary()["overlap"] == pytest.approx(np.mean(ours.overlaps))


@pytest.mark.parametrize("is_sampled", [False, True])
def test_what_a_cache_writes_is_scored_with_the_exact_one(random_model, is_sampled):
    comparison = Comparison(random_model, [preset("8"), preset("K1V1", UNPROTECTED)])
    comparison.generation(TOKENS, 50, seed=3 if is_sampled else None)
    exact, eight, one = (scores.generations[0] for scores in comparison.scores)
    assert exact.departure is None and len(exact.tokens) == len(one.losses) == 50
    assert eight.tokens == exact.tokens
    # In greedy decoding this model repeats a few tokens with any cache.
    assert (one.tokens != exact.tokens) == is_sampled
    assert one.departure == next((i for i in range(50) if one.tokens[i] != exact.tokens[i]), None)
    logits = random_model(mx.array([TOKENS + one.tokens[:-1]]))[0, len(TOKENS) - 1 :]
    losses = nn.losses.cross_entropy(logits, mx.array(one.tokens))
    assert mx.allclose(losses, mx.array(one.losses), atol=1e-3)  # float32, sums in another order
    assert one.summary(bins=5)["losses"] == pytest.approx(
        losses.reshape(5, 10).mean(1).tolist(), 1e-3
    )


def test_a_second_exact_run_shows_what_the_order_of_sums_changes(random_model):
    counted = []
    comparison = Comparison(random_model, [preset("8")], counted.append)
    comparison.generation(TOKENS, 50)
    exact, [noise] = comparison.scores[0].generations[0], comparison.noise.generations
    assert noise.losses == pytest.approx(exact.losses, abs=1e-3)  # float32
    assert sum(counted) == 3 * (len(TOKENS) - 1 + 50)


def test_a_generated_text_has_an_end_and_a_share_that_repeats():
    written = Generation(False, [1, 2, 3, 4, 1, 2, 3, 4, 0, 1, 2, 3, 4], [0.0], None, end=8)
    summary = written.summary()
    assert summary["end"] == 8 and summary["repetition"] == pytest.approx(1 / 5)
    assert written._replace(end=None).summary()["repetition"] == pytest.approx(2 / 10)
    assert written._replace(tokens=[1, 2, 3]).summary()["repetition"] == 0


def test_the_end_is_the_first_token_that_ends_a_text(random_model):
    comparison = Comparison(random_model, [])
    comparison.generation(TOKENS, 10)
    [unending] = comparison.scores[0].generations
    comparison.generation(TOKENS, 10, ends=[unending.tokens[6]])
    written = comparison.scores[0].generations[1]
    assert unending.end is None and written.end == written.tokens.index(unending.tokens[6])


def test_samples_follow_the_distribution_of_the_model(random_model):
    """The next tokens after the same one, out of 128, with different random numbers."""
    logits = random_model(mx.array([[5]]))[0, -1]
    first = [next(following_tokens(random_model, None, 5, seed)) for seed in range(400)]
    counts = np.bincount(first, minlength=128)
    expected = 400 * np.array(mx.softmax(logits))
    # A chi-squared statistic with 127 degrees of freedom: mean 127, standard deviation 16.
    assert ((counts - expected) ** 2 / expected).sum() < 127 + 5 * 16


def test_progress_counts_every_token_of_a_text(random_model):
    counted = []
    comparison = Comparison(random_model, [preset("4")], counted.append)
    comparison.text(TOKENS, 100, 7)
    assert sum(counted) == 2 * (len(TOKENS) - 1 + 7)


@pytest.mark.parametrize(
    "name",
    ["", "four", "K4", "K9V4", "K0V4", "9", "4.3", "K44V4", "nan", "prod:4", ":4", "scalar:"],
)
def test_unknown_presets_are_refused(name):
    with pytest.raises(ValueError, match="use "):
        preset(name)


@pytest.mark.parametrize("name, bits", [("4", 4), ("3.5", 3.5), ("k5v3", None)])
def test_presets_are_bits_or_a_split(name, bits):
    expected = Settings(bits) if bits else Settings(key_bits=5, value_bits=3)
    assert preset(name).settings == expected


def test_a_preset_names_the_codec_that_it_or_the_settings_bring():
    trellis = replace(SHORT, codec="trellis")
    names = ("3.5", "scalar:3.5", "trellis:3.5", "trellis:k3v2")
    specs = [preset(name, settings) for settings in (SHORT, trellis) for name in names]
    assert [spec.name for spec in specs[1:]] == [
        *("3.5 bits", "trellis 3.5 bits", "trellis K3V2"),
        *("trellis 3.5 bits", "3.5 bits", "trellis 3.5 bits", "trellis K3V2"),
    ]
    assert specs[2].settings == replace(trellis, bits=3.5) == specs[4].settings
    assert specs[3].settings == replace(trellis, key_bits=3, value_bits=2)


def test_trellis_codes_are_compared_with_scalar_ones_in_one_run(random_model):
    specs = (preset(name, UNPROTECTED) for name in ("K2V2", "trellis:K2V2"))
    _, scalar, trellis = (each.summary()["kl_mean"] for each in compare(random_model, *specs))
    assert trellis < 0.85 * scalar


@pytest.mark.parametrize("family", FAMILIES)
def test_a_first_chunk_that_is_read_once_for_all_caches_leaves_what_each_would_have_read(family):
    model = tiny_model(family)
    tokens = random_tokens(90, seed=1, vocabulary=512)
    specs = [EXACT, *([preset("4", SHORT)] if family != "deepseek_v32" else [])]
    together = read_first_chunk(model, specs, tokens[:80])
    for spec, shared in zip(specs, together):
        alone = spec.make_cache(model)
        model(tokens[None, :80], cache=alone)
        expected, logits = (model(tokens[None, 80:], cache=cache) for cache in (alone, shared))
        assert mx.array_equal(logits, expected)
    disable(model)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("name", [None, "4"])
def test_a_draft_changes_no_token(random_model, seed, name):
    def written(draft):
        spec = preset(name, SHORT) if name else EXACT
        cache = read_prompt(random_model, spec, mx.array(TOKENS[:-1]))
        return list(islice(following_tokens(random_model, cache, TOKENS[-1], seed, draft), 40))

    expected = written([])
    for right in (0, 5, 7, 8, 30, 40):
        assert written(expected[:right] + [(expected[right - 1] + 1) % 128] * 10) == expected


def test_a_right_draft_is_computed_several_tokens_at_once(random_model):
    steps = []

    def counting(tokens, cache):
        steps.append(tokens.shape[1])
        return random_model(tokens, cache=cache)

    cache = read_prompt(random_model, EXACT, mx.array(TOKENS[:-1]))
    expected = list(islice(following_tokens(random_model, cache, TOKENS[-1]), 20))
    cache = read_prompt(random_model, EXACT, mx.array(TOKENS[:-1]))
    drafted = following_tokens(counting, cache, TOKENS[-1], draft=expected)
    assert list(islice(drafted, 20)) == expected and steps == [8, 8, 5]
