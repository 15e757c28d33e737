"""Random rotations that make the coordinates of any vector follow one known distribution.

The default is the randomized Hadamard transform: random signs, then a normalised Hadamard matrix
of order m * 2^k with m in {1, 12, 20, 28}. Dimensions without one use a dense Haar-random matrix.
"""

from functools import cache, lru_cache

import mlx.core as mx
import numpy as np

from .constants import constant


def hadamard_factors(dim: int) -> tuple[int, int] | None:
    """(m, 2^k) with dim = m * 2^k and m in {1, 12, 20, 28}, or None if there is no such pair.

    The check is needed because ``mx.hadamard_transform`` accepts some other dimensions.
    """
    for order in (1, 12, 20, 28):
        power = dim // order
        if dim % order == 0 and power & (power - 1) == 0:
            return order, power
    return None


class Rotation:
    """An orthogonal dim x dim matrix R.

    Args:
        dim: Values per vector.
        kind: "hadamard" or "haar"; without a Hadamard matrix of order dim both mean "haar".
        seed: The same seed always gives the same matrix.

    Raises:
        ValueError: another ``kind``.
    """

    def __init__(self, dim: int, kind: str = "hadamard", seed: int = 0):
        if kind not in ("hadamard", "haar"):
            raise ValueError(f"Rotation {kind!r} is not known: use 'hadamard' or 'haar'.")
        self.dim = dim
        factors = hadamard_factors(dim) if kind == "hadamard" else None
        # A dense matrix has the factors dim and 2^0, and no signs.
        self.factors = factors or (dim, 1)
        self.signs = _random_signs(dim, seed) if factors else constant(mx.ones(dim))
        self.matrix = _paley_matrix(factors[0]) if factors else _haar_matrix(dim, seed)

    def apply(self, x: mx.array) -> mx.array:
        """R x for every vector x of an array (..., dim): float32 of the same shape."""
        return self._multiply(x.astype(mx.float32) * self.signs, self.matrix)

    def apply_to_queries(self, queries: mx.array) -> mx.array:
        """:meth:`apply`, which keeps inner products."""
        return self.apply(queries)

    def invert(self, y: mx.array) -> mx.array:
        """R^T y for every vector y of an array (..., dim): float32 of the same shape."""
        return self._multiply(y.astype(mx.float32), self.matrix.T) * self.signs

    def _multiply(self, x: mx.array, matrix: mx.array) -> mx.array:
        """The Kronecker product of the m x m matrix and the 2^k Hadamard matrix, times x."""
        order, power = self.factors
        if order == 1:
            return mx.hadamard_transform(x)
        if power == 1:
            return x @ matrix.T
        return (matrix @ mx.hadamard_transform(mx.unflatten(x, -1, self.factors))).flatten(-2)


def _random_bits(count: int, seed: int) -> np.ndarray:
    """``count`` uint64 of a SplitMix64 sequence (Steele, Lea, Flood, 2014), the same everywhere.

    Stored caches depend on these numbers, so they must not change with a library's version. The
    seed is mixed too: otherwise neighbouring seeds would give shifted copies of one sequence.
    """
    start = _mix(np.full(1, seed % 2**64, dtype=np.uint64))
    return _mix(start + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, count + 1, dtype=np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@cache
def _random_signs(dim: int, seed: int) -> mx.array:
    return constant(1 - 2 * (_random_bits(dim, seed) >> np.uint64(63)).astype(np.float32))


@lru_cache(maxsize=8)
def _haar_matrix(dim: int, seed: int) -> mx.array:
    """Q of the QR decomposition of a Gaussian matrix, with the signs of a Haar distribution."""
    q, r = np.linalg.qr(gaussian_matrix(dim, dim, seed))
    return constant((q * np.sign(np.diag(r))).astype(np.float32))


def gaussian_matrix(rows: int, columns: int, seed: int) -> np.ndarray:
    """Independent standard normal numbers by the Box-Muller method: float64 (rows, columns)."""
    count = rows * columns
    uniform = ((_random_bits(2 * count, seed) >> np.uint64(11)) + 0.5) / 2**53
    radius, angle = np.sqrt(-2 * np.log(uniform[:count])), 2 * np.pi * uniform[count:]
    return (radius * np.cos(angle)).reshape(rows, columns)


@cache
def _paley_matrix(order: int) -> mx.array:
    """The normalised Hadamard matrix of order 1, 12, 20 (Paley I) or 28 (Paley II)."""
    if order == 1:
        return constant(np.ones((1, 1), np.float32))
    prime = order - 1 if order in (12, 20) else order // 2 - 1
    residues = {i * i % prime for i in range(1, prime)}
    character = np.array([0] + [1 if i in residues else -1 for i in range(1, prime)])
    jacobsthal = character[np.subtract.outer(np.arange(prime), np.arange(prime)) % prime]
    ones = np.ones((prime, 1))
    if prime % 4 == 3:
        hadamard = np.block([[0, ones.T], [-ones, jacobsthal]]) + np.eye(order)
    else:
        core = np.block([[0, ones.T], [ones, jacobsthal]])
        hadamard = np.kron(core, [[1, 1], [1, -1]])
        hadamard += np.kron(np.eye(prime + 1), [[1, -1], [-1, -1]])
    return constant((hadamard / np.sqrt(order)).astype(np.float32))
