"""Affine rounding in groups, MLX's own: the baseline."""

from typing import NamedTuple

import mlx.core as mx

from ..codec.codebook import check_dim
from ..codec.quantizer import check_vectors

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


class AffineVectors(NamedTuple):
    """uint32 ``codes`` (..., words), and bfloat16 ``scales`` and ``offsets`` (..., groups)."""

    codes: mx.array
    scales: mx.array
    offsets: mx.array


class Affine:
    """scale * code + offset, with a scale and an offset in every group of values (mx.quantize).

    The vectors are not rotated. This is what mlx-lm's own quantized cache does. Groups that span
    less than about 1e-7 times the number of levels become zeros, because MLX's scales end there.

    Args:
        dim: Values per vector, a multiple of ``group_size`` up to 8 192.
        bits: Bits per value, 2 to 6 or 8, without the scale and offset of 16 bits each of a group.
        group_size: Neighbouring values in a group: 32, 64 or 128.

    Raises:
        ValueError: an argument that is not one of these.
    """

    def __init__(self, dim: int, bits: int, *, group_size: int = 64):
        check_dim(dim)
        if bits not in BITS:
            raise ValueError(
                f"Affine rounding to {bits} bits is not supported: use 2 to 6 or 8 bits."
            )
        if group_size not in GROUP_SIZES or dim % group_size:
            raise ValueError(
                f"Affine rounding cannot divide {dim} values into groups of {group_size}: "
                "use groups of 32, 64 or 128 and a multiple of that."
            )
        self.dim = dim
        self.bits = bits
        self.group_size = group_size
        self.bits_per_value = bits + 32 / group_size

    def quantize(self, x: mx.array) -> AffineVectors:
        """Pack vectors (..., dim) of float16, bfloat16 or float32."""
        check_vectors(x, self.dim)
        finite = mx.isfinite(x).all(axis=-1, keepdims=True)
        rows = mx.where(finite, x, 0).astype(mx.float32).reshape(-1, self.dim)
        parts = mx.quantize(rows, group_size=self.group_size, bits=self.bits)
        codes, scales, offsets = (y.reshape(*x.shape[:-1], y.shape[-1]) for y in parts)
        scales = mx.where(finite, scales, mx.nan)
        return AffineVectors(codes, scales.astype(mx.bfloat16), offsets.astype(mx.bfloat16))

    def dequantize(self, packed: AffineVectors, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The reconstructed vectors (..., dim) in ``dtype``."""
        codes, *numbers = (part.reshape(-1, part.shape[-1]) for part in packed)
        numbers = (x.astype(mx.float32) for x in numbers)
        rows = mx.dequantize(codes, *numbers, group_size=self.group_size, bits=self.bits)
        return rows.reshape(*packed.codes.shape[:-1], self.dim).astype(dtype)

    def inner_product(self, queries: mx.array, packed: AffineVectors) -> mx.array:
        """Products of queries (..., q, dim) with packed vectors (..., n): float32 (..., q, n)."""
        check_vectors(queries, self.dim)
        return queries.astype(mx.float32) @ self.dequantize(packed).swapaxes(-1, -2)
