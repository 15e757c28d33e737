import numpy as np
import pytest

from mlx_turboquant.measure.paired import paired


def covered(experiments: int, draw) -> float:
    """The share of experiments whose interval has the true difference in it."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(experiments):
        exact, other, passages, truth = draw(rng)
        result = paired(exact, other, passages)
        hits += result.low <= truth <= result.high
    return hits / experiments


def test_answers_are_counted_by_who_is_right():
    result = paired([1, 1, 1, 0, 0], [1, 0, 0, 1, 0])
    assert result[:4] == (1, 2, 1, 1)
    assert result.difference == pytest.approx(-20)
    assert result.low < -20 < result.high


@pytest.mark.parametrize("prompts", [40, 200])
@pytest.mark.parametrize("lost, won", [(0.0, 0.0), (0.02, 0.02), (0.1, 0.02), (0.3, 0.1)])
def test_the_interval_covers_the_truth(prompts, lost, won):
    def draw(rng):
        kinds = rng.choice(4, prompts, p=[0.6 - lost, lost, won, 0.4 - won])
        return kinds <= 1, (kinds == 0) | (kinds == 2), None, 100 * (won - lost)

    assert covered(2000, draw) >= 0.93


@pytest.mark.parametrize("count, least", [(25, 0.91), (50, 0.93)])
def test_the_interval_covers_the_truth_where_prompts_of_a_passage_fail_together(count, least):
    """Most passages fail whole or not at all; few of them tell little of how they vary."""

    def draw(rng):
        fails = rng.random(8 * count) < np.repeat(rng.beta(0.05, 0.45, count), 8)
        return np.ones(8 * count), ~fails, np.repeat(range(count), 8), -10

    def alone(rng):
        exact, other, _, truth = draw(rng)
        return exact, other, None, truth

    assert covered(2000, draw) >= least
    assert covered(500, alone) < 0.7  # as if all prompts were independent


@pytest.mark.parametrize(
    "lost, won, verdict",
    [
        (0, 0, "4 bits: no difference found, at most 1.4 points lost with 95 % confidence."),
        (40, 0, "4 bits: loses 20.0 points, 14.1 to 25.5 with 95 % confidence."),
        (0, 40, "4 bits: gains 20.0 points, 14.1 to 25.5 with 95 % confidence."),
    ],
)
def test_a_verdict_says_what_was_found_and_how_surely(lost, won, verdict):
    exact = [True] * lost + [False] * won + [True] * (200 - lost - won)
    other = [False] * lost + [True] * won + [True] * (200 - lost - won)
    assert paired(exact, other).verdict("4 bits") == verdict


def test_what_holds_for_all_prompts_is_within_possible_points():
    result = paired([True] * 3, [False] * 3)
    assert result.low == -100 and result.difference == -100


def test_few_passages_get_no_verdict():
    exact, other = [True] * 40, [True] * 32 + [False] * 8
    verdict = paired(exact, other, np.repeat(range(5), 8)).verdict("2 bits")
    assert verdict.startswith("2 bits: -20.0 points (")
    assert verdict.endswith(", too few for a verdict, which needs 160 prompts.")
