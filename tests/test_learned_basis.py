import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compare_codecs import turboquant
from learned_basis import LearnedRounding, learned

from mlx_turboquant.lm.axes import Moments, turns

HEADS, DIM, TOKENS = 2, 64, 512


def keys_of(deviations: np.ndarray, seed: int = 0) -> mx.array:
    """Keys (1, HEADS, TOKENS, DIM), Gaussian with these deviations along random axes."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(np.random.default_rng(9).standard_normal((HEADS, DIM, DIM)))[0]
    x = rng.standard_normal((HEADS, TOKENS, DIM)) * deviations
    return mx.array((x @ axes)[None].astype(np.float32))


def moments_of(keys: mx.array, queries: np.ndarray | None = None) -> Moments:
    x = np.array(keys[0], np.float64)
    x = x - x.mean(axis=1, keepdims=True)
    second = x.swapaxes(1, 2) @ x / x.shape[1]
    identity = np.broadcast_to(np.eye(DIM), second.shape)
    return Moments(second, 0 * second, identity if queries is None else queries)


def relative_error(rounded: mx.array, keys: mx.array) -> float:
    centred = keys - keys.mean(axis=2, keepdims=True)
    return (mx.square(rounded - keys).sum() / mx.square(centred).sum()).item()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_equal_variances_have_the_error_of_a_random_rotation(bits):
    """Rotations differ by some percent on 1,024 vectors of 64 values, and so do the gains."""
    keys = keys_of(np.ones(DIM))
    own = LearnedRounding(learned(moments_of(keys), 0, DIM, bits, 0))(keys)
    random = turboquant(bits, DIM, are_keys=True)(keys)
    assert relative_error(own, keys) == pytest.approx(relative_error(random, keys), rel=0.1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_unequal_variances_are_worth_more_than_a_bit(bits):
    """Deviations from 8 to 1/8: the coding gain of their variances is above 10."""
    deviations = 2 ** np.linspace(3, -3, DIM)
    found = moments_of(keys_of(deviations))
    keys = keys_of(deviations, seed=1)  # others of the same kind
    own = LearnedRounding(learned(found, 0, 16, bits, 0))(keys)
    random = turboquant(bits + 1, DIM, are_keys=True)(keys)
    assert relative_error(own, keys) < relative_error(random, keys)


def test_a_metric_moves_the_error_to_directions_that_queries_ignore():
    keys = keys_of(np.ones(DIM))
    looked_at = np.diag([1.0] * 16 + [1e-3] * (DIM - 16))
    found = moments_of(keys, np.broadcast_to(looked_at, (HEADS, DIM, DIM)))
    plain, weighted = (
        LearnedRounding(learned(found, metric, 16, 2, 0))(keys) - keys for metric in (0, 0.5)
    )
    assert mx.square(weighted[..., :16]).sum() < mx.square(plain[..., :16]).sum() / 4


@pytest.mark.parametrize("word", ["", "layer", "few", "shared"])
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_bits_have_their_mean_in_every_head(bits, word):
    found = moments_of(keys_of(2 ** np.linspace(4, -4, DIM)))
    chosen = learned(found, 0.25, 16, bits, 0, [word]).bits
    assert (chosen.mean(axis=1) == bits).all() and 0 <= chosen.min() and chosen.max() <= 8
    assert (np.diff(chosen, axis=1) <= 0).all()  # the largest variance comes first


@pytest.mark.parametrize("rank", [0, 1, 8])
def test_keys_that_fill_few_dimensions_stay_finite(rank):
    deviations = np.where(np.arange(DIM) < rank, 1.0, 0.0)
    basis = learned(moments_of(keys_of(deviations)), 0.25, 16, 3, 0)
    keys = keys_of(np.ones(DIM), seed=1)  # a text that fills all
    assert mx.isfinite(LearnedRounding(basis)(keys)).all()


def test_turned_moments_are_those_of_keys_at_other_places():
    """Rounding of float32 in the embedding."""
    rope = nn.RoPE(DIM, base=100)
    tokens, places = keys_of(np.ones(DIM)) + 1, np.array([3, 70])
    found = moments_of(tokens)
    mean = np.array(tokens[0].mean(axis=1, keepdims=True), np.float64)
    found = found._replace(means=mean.swapaxes(1, 2) @ mean)
    expected = []
    for place in places.tolist():
        # One token a sequence, so that all are turned alike.
        x = rope(tokens[0].reshape(-1, 1, 1, DIM), offset=place)
        x = np.array(x.reshape(HEADS, TOKENS, DIM), np.float64) - mean
        expected.append(x.swapaxes(1, 2) @ x / TOKENS)
    turned = found.turned(turns(rope, DIM, places))
    np.testing.assert_allclose(turned.keys, np.mean(expected, axis=0), atol=1e-4)
