"""PolarQuant: four levels of angles, and one radius for every sixteen coordinates."""

from functools import cache
from math import pi
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from methods.common import Method, polar_form

from mlx_turboquant.codec.codebook import MAX_DIM, check_dim
from mlx_turboquant.codec.constants import constant
from mlx_turboquant.codec.packing import pack, unpack
from mlx_turboquant.codec.quantizer import LARGEST_SCALE
from mlx_turboquant.codec.rotation import Rotation

BLOCK = 16
LEVELS = 4
_FIRST_BITS, _BITS = 4, 2
_STEP = 2 * pi / 2**_FIRST_BITS
# Two-bit angles per block: 4 of the second level, 2 of the third and 1 of the fourth.
_ANGLES = BLOCK // 2 - 1
_TOLERANCE = 1e-13


class PolarVectors(NamedTuple):
    """Packed blocks of 16 coordinates.

    ``first`` is uint32 (..., blocks): the 8 angles of the first level, 4 bits each. ``others`` is
    uint8 (..., bytes): the 7 angles of the other levels of all blocks, four in a byte. ``radii`` is
    bfloat16 (..., blocks).
    """

    first: mx.array
    others: mx.array
    radii: mx.array


class PolarQuant(Method):
    """Quantizes the recursive polar transform of a rotated vector (arXiv 2502.02617).

    Pairs of neighbouring coordinates become a radius and an angle, then pairs of radii, four times.
    The angles are independent of each other and of the radius. They are uniform in the first level,
    and have a density proportional to sin^(2^(l-1) - 1)(2 psi) in [0, pi / 2] in level l >= 2
    (Lemma 2). The first level is rounded to 16 angles, the others to 4, with the least squared
    error. A block takes 8 * 4 + 7 * 2 bits and 16 for its radius: 3.875 bits per value.

    Let k_l be the mean cosine of the error of an angle of level l. Inner products shrink by the
    factor k_1 k_2 k_3 k_4, and the relative squared error is 2 - 2 k_1 k_2 k_3 k_4.

    Args:
        dim: Values per vector, a multiple of 16 from 16 to 8 192.
        seed: The seed of the rotation.

    Raises:
        ValueError: another dimension.
    """

    def __init__(self, dim: int, *, seed: int = 0):
        if dim % BLOCK:
            raise ValueError(
                f"PolarQuant cannot quantize vectors of {dim} values: "
                f"use a multiple of {BLOCK} up to {MAX_DIM}."
            )
        check_dim(dim)
        self.dim = dim
        rotation = Rotation(dim, seed=seed)
        self._project, self._restore = rotation.apply, rotation.invert
        blocks = dim // BLOCK
        other_bytes = -(-blocks * _ANGLES * _BITS // 8)
        self.bits_per_value = ((32 + 16) * blocks + 8 * other_bytes) / dim

    def _pack(self, x: mx.array) -> PolarVectors:
        directions, norms = polar_form(x)
        radii, codes = self._project(directions), []
        for level in range(1, LEVELS + 1):
            even, odd = radii[..., ::2], radii[..., 1::2]
            codes.append(_angle_codes(mx.arctan2(odd, even), level))
            radii = mx.sqrt(even * even + odd * odd)
        radii = mx.minimum(radii * norms, LARGEST_SCALE).astype(mx.bfloat16)
        others = _pack_bytes(mx.concatenate(codes[1:], axis=-1))
        return PolarVectors(pack(codes[0], _FIRST_BITS), others, radii)

    def _values(self, packed: PolarVectors) -> mx.array:
        counts = [self.dim >> level for level in range(2, LEVELS + 1)]
        others = _unpack_bytes(packed.others, sum(counts))
        others = mx.split(others, np.cumsum(counts)[:-1].tolist(), axis=-1)
        codes = [unpack(packed.first, _FIRST_BITS, self.dim // 2), *others]
        radii = packed.radii.astype(mx.float32)
        for level in range(LEVELS, 0, -1):
            angles = _angles(codes[level - 1], level)
            pairs = mx.stack([radii * mx.cos(angles), radii * mx.sin(angles)], axis=-1)
            radii = pairs.flatten(-2)
        return radii


def angle_levels(level: int) -> np.ndarray:
    """The four rounded angles (Lloyd-Max) of a level from 2 on, in radians: float64 (4,)."""
    angles = np.linspace(0, pi / 2, 2 ** (_BITS + 1) + 1)[1::2]
    nodes, weights = np.polynomial.legendre.leggauss(32)
    while True:
        edges = np.concatenate([[0], (angles[1:] + angles[:-1]) / 2, [pi / 2]])
        half = np.diff(edges)[:, None] / 2
        points = edges[:-1, None] + half * (nodes + 1)
        density = weights * half * np.sin(2 * points) ** (2 ** (level - 1) - 1)
        previous, angles = angles, (density * points).sum(axis=1) / density.sum(axis=1)
        if np.abs(angles - previous).max() < _TOLERANCE:
            return angles


def _angle_codes(angles: mx.array, level: int) -> mx.array:
    if level == 1:
        return mx.clip(mx.floor((angles + pi) / _STEP), 0, 2**_FIRST_BITS - 1)
    return mx.searchsorted(_codebook(level)[1], angles)


def _angles(codes: mx.array, level: int) -> mx.array:
    if level == 1:
        return (codes.astype(mx.float32) + 0.5) * _STEP - pi
    return _codebook(level)[0][codes]


@cache
def _codebook(level: int) -> tuple[mx.array, mx.array]:
    """The angles of a level, and the thresholds between them."""
    angles = angle_levels(level)
    thresholds = (angles[1:] + angles[:-1]) / 2
    return constant(angles.astype(np.float32)), constant(thresholds.astype(np.float32))


def _pack_bytes(codes: mx.array) -> mx.array:
    """Pack two-bit codes (..., n) to uint8, four in a byte. Words of 32 bits would waste space."""
    count = codes.shape[-1]
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -count % 4)]
    fields = mx.unflatten(mx.pad(codes.astype(mx.uint8), padding), -1, (-1, 4))
    return (fields << mx.arange(0, 8, _BITS, mx.uint8)).sum(axis=-1).astype(mx.uint8)


def _unpack_bytes(packed: mx.array, count: int) -> mx.array:
    fields = (packed[..., None] >> mx.arange(0, 8, _BITS, mx.uint8)) & (2**_BITS - 1)
    return fields.flatten(-2)[..., :count]
