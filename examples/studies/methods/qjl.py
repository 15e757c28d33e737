"""QJL: the signs of a random projection, and the norm."""

from functools import lru_cache
from math import exp, lgamma, pi, sqrt
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_turboquant.codec.codebook import check_bits, check_dim
from mlx_turboquant.codec.constants import constant
from mlx_turboquant.codec.packing import pack, unpack, words_per_vector
from mlx_turboquant.codec.rotation import Rotation, gaussian_matrix

from .common import Method, polar_form

PROJECTIONS = ("gaussian", "orthogonal")
# Added to the seed of a projection, so that it is independent of a rotation with the same seed.
_STREAM = 0x514A4C << 32


class SignVectors(NamedTuple):
    """uint32 ``signs`` (..., words), a bit per projection, and float32 ``norms`` (...)."""

    signs: mx.array
    norms: mx.array


class QJL(Method):
    """Signs of ``bits * dim`` random projections of a vector, and its norm (arXiv 2406.03482).

    With S of m = bits * dim rows, a |k| <Sq, sign(Sk)> estimates <q, k> without bias. The query is
    not quantized. The reconstruction is a |k| S^T sign(Sk), whose product with q is the same
    number.

    Args:
        dim: Values per vector, 8 to 8,192.
        bits: Projections per value, 1 to 8.
        projection: "gaussian": S has independent normal entries and a = sqrt(pi / 2) / m
            (Definition 3.1, Lemma 3.2). For q orthogonal to k the variance is
            (pi / 2) |q|^2 |k|^2 / m. "orthogonal": S is made of ``bits`` independent rotations,
            which lowers it to about (pi / 2 - 1) |q|^2 |k|^2 / m at one bit.
        seed: Seed of the projection.

    Raises:
        ValueError: another value of an argument.
    """

    def __init__(self, dim: int, bits: int = 1, *, projection: str = "gaussian", seed: int = 0):
        check_dim(dim)
        check_bits(bits)
        if projection not in PROJECTIONS:
            raise ValueError(
                f"Projection {projection!r} is not known: use one of {', '.join(PROJECTIONS)}."
            )
        self.dim = dim
        self.bits = bits
        self.bits_per_value = 32 * (words_per_vector(bits * dim, 1) + 1) / dim
        self.matrix, self.factor = _projection(dim, bits, projection, seed)

    def _pack(self, x: mx.array) -> SignVectors:
        directions, norms = polar_form(x)
        return SignVectors(pack(self._project(directions) >= 0, 1), norms.squeeze(-1))

    def _values(self, packed: SignVectors) -> mx.array:
        signs = unpack(packed.signs, 1, self.bits * self.dim).astype(mx.float32) * 2 - 1
        return signs * (self.factor * packed.norms[..., None])

    def _project(self, queries: mx.array) -> mx.array:
        return queries @ self.matrix.T

    def _restore(self, values: mx.array) -> mx.array:
        return values @ self.matrix


@lru_cache(maxsize=8)
def _projection(dim: int, bits: int, projection: str, seed: int) -> tuple[mx.array, float]:
    """The matrix S (bits * dim, dim) and the factor a."""
    seed += _STREAM
    rows = bits * dim
    if projection == "gaussian":
        matrix = gaussian_matrix(rows, dim, seed).astype(np.float32)
        return constant(matrix), sqrt(pi / 2) / rows
    rotations = [Rotation(dim, "haar", seed + (i << 24)).matrix for i in range(bits)]
    # A coordinate of a random unit vector has the mean absolute value
    # gamma(dim / 2) / (sqrt(pi) gamma((dim + 1) / 2)), which is sqrt(2 / (pi dim)) for large dim.
    mean = exp(lgamma(dim / 2) - lgamma((dim + 1) / 2)) / sqrt(pi)
    return constant(mx.concatenate(rotations)), 1 / (rows * mean)
