"""How many bits the keys and values of a layer need, from the first tokens that it quantizes.

The error of a quantized key k with mean c is spread evenly over the dimensions by the rotation, so
a score of query q has noise of variance

    scale^2 |q|^2 |k - c|^2 D(b) / d,

D(b) being the relative mean squared error of b bits in d dimensions. To second order, noise of
variance s_j in the scores moves a softmax p by a KL divergence of half of sum p_j (1 - p_j) s_j.
The error of values adds sum p_j^2 |v_j - c|^2 D(b) to the squared length of an output.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .codebook import MAX_BITS, codebook, distortion

# Queries that the demands are averaged over, and scores that may be computed for it.
_MAX_ROWS = 16
_MAX_SCORES = 2**24


class Demands(NamedTuple):
    """What quantizing would do to the attention of a layer, for each unit of D.

    ``keys`` is the KL divergence of the weights in nats, ``values`` the squared error of the
    outputs relative to their squared length, over all heads and queries that were looked at.
    """

    keys: float
    values: float


class Limits(NamedTuple):
    """The errors that a layer may have, those of :class:`Demands` times D, and the fewest bits."""

    keys: float
    values: float
    key_bits: int
    value_bits: int

    def bits(self, demands: Demands, key_dim: int, value_dim: int) -> tuple[int, int]:
        """The fewest bits of keys and of values that stay within the limits, at most 8."""
        return (
            _fewest(key_dim, demands.keys, self.keys, self.key_bits),
            _fewest(value_dim, demands.values, self.values, self.value_bits),
        )


@cache
def relative_error(dim: int, bits: int) -> float:
    """D(b): the mean squared error of a unit vector of ``dim`` values at ``bits`` bits."""
    return distortion(dim, codebook(dim, bits).levels)


def single_precision(x: float) -> float:
    """The nearest float32, which a saved cache can hold."""
    return float(np.float32(x))


def _fewest(dim: int, demand: float, limit: float, least: int) -> int:
    # A demand that is not a number says nothing: one token of the prompt was not finite.
    candidates = range(least, MAX_BITS)
    return next((b for b in candidates if not demand * relative_error(dim, b) > limit), MAX_BITS)


def error_demands(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    deviations: tuple[mx.array, mx.array],
    scale: float,
    mask: None | str | mx.array,
) -> mx.array:
    """The two :class:`Demands` of a layer whose attention has just been computed, float32 (2,).

    Args:
        queries: (B, query_heads, L, dim), the last of which sees all tokens.
        keys, values: All tokens, (B, H, n, dim) and (B, H, n, value_dim).
        deviations: |k - c|^2 and |v - c|^2 of every token, (B, H, n), zero where it stays exact.
        scale: Factor of the scores.
        mask: That of the attention: None, "causal", boolean or additive (B, heads, L, n).
    """
    (batch, heads, count, dim), length = keys.shape, queries.shape[2]
    most = max(1, min(_MAX_ROWS, _MAX_SCORES // (batch * queries.shape[1] * count)))
    # From the later half of the queries: these have the most tokens to look at.
    step = max(1, length // (2 * most))
    rows = slice(length - 1 - step * (min(most, -(-length // step)) - 1), None, step)
    sampled = queries[:, :, rows].astype(mx.float32) * scale
    # The queries of the heads that share keys follow each other, in one matrix.
    grouped = sampled.reshape(batch, heads, -1, dim)
    scores = grouped @ keys.astype(mx.float32).swapaxes(-1, -2)
    scores = _masked(scores.reshape(*sampled.shape[:3], count), mask, rows, length)
    weights = mx.softmax(scores, axis=-1).reshape(batch, heads, -1, count)
    of_keys, of_values = (x[..., None] for x in deviations)
    noise = (weights * (1 - weights)) @ of_keys
    divergence = _product(noise, (grouped * grouped).sum(axis=-1)) / (2 * dim * noise.size)
    errors = ((weights * weights) @ of_values).sum()
    outputs = weights @ values.astype(mx.float32)
    return mx.stack([divergence, errors / _product(outputs, outputs)])


def _product(x: mx.array, y: mx.array) -> mx.array:
    """The inner product of all numbers, in one launch."""
    return mx.inner(x.flatten(), y.flatten())


def _masked(scores: mx.array, mask: None | str | mx.array, rows: slice, length: int) -> mx.array:
    """Scores (B, query_heads, rows, n) of some ``rows`` of ``length`` queries under their mask."""
    if mask is None:
        return scores
    count = scores.shape[-1]
    if isinstance(mask, str):
        mask = _causal_mask(count, length, *rows.indices(length))
    else:
        mask = mx.broadcast_to(mask, (*mask.shape[:-2], length, count))[..., rows, :]
    return mx.where(mask, scores, -1e30) if mask.dtype == mx.bool_ else scores + mask


@lru_cache(maxsize=4)
def _causal_mask(count: int, length: int, first: int, last: int, step: int) -> mx.array:
    """Which of ``count`` tokens some of the last ``length`` see: the same for all layers."""
    positions = np.arange(count - length, count)[first:last:step]
    return mx.array(np.arange(count) <= positions[:, None])
