"""Bases of vectors whose distribution is known, such as the keys of a head.

A random rotation gives all coordinates the same variance. In a basis of principal axes the
variances differ, and coordinates of larger variance get more bits. Four groups of axes, quarters of
the dimension, have one variance and one number of bits each; a random rotation within a group makes
its coordinates alike. Each run of :mod:`.packing` has eight coordinates of every group. TurboQuant
(arXiv 2504.19874, Section 4.3) gives outlier channels more bits; this does the same along any axes.
"""

import hashlib
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import mlx.core as mx
import numpy as np

from . import codebook, trellis
from .codebook import MAX_BITS
from .constants import constant
from .packing import EIGHT, RUN, Bits
from .rotation import gaussian_matrix

# Bits more than the mean for the four groups, from the largest variance to the least.
PATTERNS = ((0, 0, 0, 0), (1, 0, 0, -1), (2, 0, -1, -1), (3, 0, -1, -2))
_GROUPS = 4
# The power of the second moment of the queries that weighs errors. With 1 directions starve at
# which queries look rarely; with 0 axes of little variance do, at which they look often.
_METRIC = 0.5
# Of the mean variance, so that a basis from few tokens is invertible. The variances of keys can
# differ by more than 10,000.
_RIDGE, _METRIC_RIDGE = 1e-6, 1e-3
_LEAST_VARIANCE = 1e-6
# Kernels multiply queries by halves.
_LARGEST = 65504

_restored: "WeakValueDictionary[str, Basis]" = WeakValueDictionary()


class Basis:
    """Axes of the vectors of each head, and the variances along them.

    ``axes`` are float32 (H, dim, dim): the coordinates of a vector x are x @ axes, all with the
    same variance. ``weights`` are float32 (H, 1, dim): the squared error of a coordinate times its
    weight is the error that counts. Bases with the same ``digest`` are equal.

    Raises:
        ValueError: arrays of another shape or dtype, or from which no vector can be restored.
    """

    def __init__(self, axes: mx.array, weights: mx.array):
        self.axes, self.weights = constant(axes), constant(weights)
        self.inverse = constant(_inverse(axes, weights))
        # For kernels, whose queries are halves in the end.
        self.query_axes = constant(mx.contiguous(self.inverse.swapaxes(1, 2).astype(mx.float16)))
        arrays = (np.array(x).tobytes() for x in (self.axes, self.weights))
        self.digest = hashlib.sha256(b"".join(arrays)).hexdigest()
        # Kernels are given coordinates: the rotation that is left for them changes nothing.
        self.factors, self.matrix = (1, 1), constant(mx.ones((1, 1)))
        self.signs = constant(mx.ones(axes.shape[-1]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Basis) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Basis({self.digest[:32]})"  # the same in every process, for keys of prompts

    def __deepcopy__(self, memo: dict) -> "Basis":
        return self  # it is immutable

    def apply(self, x: mx.array) -> mx.array:
        """The coordinates of vectors (..., H, n, dim): float32 of the same shape."""
        return x.astype(mx.float32) @ self.axes

    def apply_to_queries(self, queries: mx.array) -> mx.array:
        """Queries (..., H, n, dim) such that products with coordinates are those with vectors."""
        return queries.astype(mx.float32) @ self.inverse.swapaxes(-1, -2)

    def invert(self, y: mx.array) -> mx.array:
        """The vectors of coordinates (..., H, n, dim): float32 of the same shape."""
        return y.astype(mx.float32) @ self.inverse

    def pattern(self, bits: int, is_trellis: bool = False) -> Bits:
        """Bits of the four groups, with a mean of ``bits``: those of least error over all heads."""
        dim = self.axes.shape[-1]
        variances = np.array(self.weights.sum(axis=(0, 1))).reshape(-1, _GROUPS, EIGHT)
        errors = _errors(dim, is_trellis) * variances.sum(axis=(0, 2))[:, None]
        patterns = [bits + np.array(offsets) for offsets in PATTERNS]
        possible = [each for each in patterns if 0 <= each.min() and each.max() <= MAX_BITS]
        best = min(possible, key=lambda each: errors[range(_GROUPS), each].sum())
        return bits if (best == bits).all() else tuple(best.tolist())


def restored_basis(axes: Any, weights: Any) -> Basis | None:
    """The basis of two arrays that were saved, or None if both are None.

    Raises:
        ValueError: anything else than the arrays of a basis.
    """
    if axes is None and weights is None:
        return None
    if not (isinstance(axes, mx.array) and isinstance(weights, mx.array)):
        raise ValueError("Axes or weights of a basis are missing.")
    basis = Basis(axes, weights)
    return _restored.setdefault(basis.digest, basis)  # layers of many caches share theirs


def learned_basis(covariances: np.ndarray, queries: np.ndarray, seed: int = 0) -> Basis:
    """The basis of keys from moments of each head.

    With the metric M = queries^(1/2), an error e of a key counts e^T M e. The axes are those of
    M^(1/2) C M^(1/2), where C is the covariance of the keys.

    Args:
        covariances: Of the keys, float64 (H, dim, dim).
        queries: The second moments of the queries of each head, float64 (H, dim, dim).
        seed: Of the rotations within groups.

    Raises:
        ValueError: a dimension that is no multiple of 32, or moments that are not finite.
    """
    dim = covariances.shape[-1]
    if dim % RUN:
        raise ValueError(f"Vectors of {dim} values have no basis: use a multiple of {RUN} values.")
    if not (np.isfinite(covariances).all() and np.isfinite(queries).all()):
        raise ValueError("Moments of keys or queries are not finite: use other texts.")
    half = _power(queries, _METRIC / 2, _METRIC_RIDGE)
    variances, vectors = np.linalg.eigh(half @ _power(covariances, 1, _RIDGE) @ half)
    variances, vectors = variances[:, ::-1], vectors[..., ::-1]
    size = dim // _GROUPS
    weights = np.repeat(variances.reshape(len(variances), _GROUPS, size).mean(axis=2), size, axis=1)
    turned = np.zeros((dim, dim))
    for start in range(0, dim, size):
        part = slice(start, start + size)
        turned[part, part] = np.linalg.qr(gaussian_matrix(size, size, seed + start))[0]
    order = np.arange(dim).reshape(_GROUPS, -1, EIGHT).swapaxes(0, 1).flatten()
    weights = weights[:, None, order]
    axes = (half @ vectors @ turned)[..., order] / np.sqrt(weights)
    # Only ratios of weights count, and only ratios of axes. So numbers of any keys fit halves.
    axes = axes * np.sqrt(np.square(np.linalg.inv(axes)).mean(axis=(1, 2), keepdims=True))
    arrays = axes, weights / weights.mean()
    return Basis(*(mx.array(x.astype(np.float32)) for x in arrays))


def _inverse(axes: mx.array, weights: mx.array) -> mx.array:
    """The inverse of the axes, after both arrays were checked."""
    heads, _, dim = axes.shape if axes.ndim == 3 else (0, 0, 0)
    fits = axes.shape == (heads, dim, dim) and weights.shape == (heads, 1, dim)
    if not (fits and axes.size) or dim % RUN or {axes.dtype, weights.dtype} != {mx.float32}:
        raise ValueError(f"Arrays of shapes {axes.shape} and {weights.shape} are no basis.")
    try:
        inverse = np.linalg.inv(np.array(axes, np.float64)).astype(np.float32)
    except np.linalg.LinAlgError:
        inverse = np.array(np.nan)
    groups = np.array(weights).reshape(heads, -1, _GROUPS, EIGHT)
    fit = (groups == groups[:, :1, :, :1]).all() and (groups > 1 / _LARGEST**2).all()
    if not (fit and groups.max() < _LARGEST**2 and np.abs(inverse).max() < _LARGEST):
        raise ValueError("Axes of a basis have no inverse, or its weights are not those of groups.")
    if not np.allclose(np.square(inverse).mean(axis=(1, 2)), 1, rtol=1e-2):
        raise ValueError("Axes of a basis have a wrong length.")
    return mx.array(inverse)


def _power(x: np.ndarray, exponent: float, ridge: float) -> np.ndarray:
    """A power of symmetric matrices (..., d, d) plus a share of their mean eigenvalue."""
    mean = np.trace(x, axis1=-2, axis2=-1)[..., None, None] / x.shape[-1]
    mean = np.maximum(mean, _LEAST_VARIANCE)
    values, vectors = np.linalg.eigh(x + ridge * mean * np.eye(x.shape[-1]))
    return (vectors * values[..., None, :] ** exponent) @ vectors.swapaxes(-1, -2)


@cache
def _errors(dim: int, is_trellis: bool = False) -> np.ndarray:
    codec = trellis if is_trellis else codebook
    return np.array([1.0, *(codec.relative_error(dim, bits) for bits in range(1, MAX_BITS + 1))])
