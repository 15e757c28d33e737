"""MLX's affine quantization in groups: the baseline."""

from typing import NamedTuple

import mlx.core as mx

from mlx_turboquant.codec.codebook import check_dim

from .common import Method


class AffineVectors(NamedTuple):
    """uint32 ``codes`` (..., words), and bfloat16 ``scales`` and ``offsets`` (..., groups)."""

    codes: mx.array
    scales: mx.array
    offsets: mx.array


class Affine(Method):
    """scale * code + offset, with a scale and an offset in every group of values (mx.quantize).

    The vectors are not rotated. mlx-lm's own quantized cache does the same. Groups that span less
    than about 1e-7 times the number of levels become zeros, because MLX has no smaller scales.

    Args:
        dim: Values per vector, a multiple of ``group_size`` up to 8,192.
        bits: Bits per value, 2 to 6 or 8. A group takes 32 bits more, for its scale and offset.
        group_size: Neighbouring values in a group: 32, 64 or 128.

    Raises:
        ValueError: another value of an argument.
    """

    def __init__(self, dim: int, bits: int, *, group_size: int = 64):
        check_dim(dim)
        if bits not in (2, 3, 4, 5, 6, 8):
            raise ValueError(
                f"Affine rounding to {bits} bits is not supported: use 2 to 6 or 8 bits."
            )
        if group_size not in (32, 64, 128) or dim % group_size:
            raise ValueError(
                f"Affine rounding cannot divide {dim} values into groups of {group_size}: "
                "use groups of 32, 64 or 128 and a multiple of that."
            )
        self.dim = dim
        self.bits = bits
        self.group_size = group_size
        self.bits_per_value = bits + 32 / group_size

    def _pack(self, x: mx.array) -> AffineVectors:
        finite = mx.isfinite(x).all(axis=-1, keepdims=True)
        values = mx.where(finite, x, 0).astype(mx.float32)
        # With one more axis, because mx.quantize refuses arrays of a single axis.
        parts = mx.quantize(values[None], self.group_size, self.bits)
        codes, scales, offsets = (part[0] for part in parts)
        scales = mx.where(finite, scales, mx.nan)
        return AffineVectors(codes, scales.astype(mx.bfloat16), offsets.astype(mx.bfloat16))

    def _values(self, packed: AffineVectors) -> mx.array:
        codes, scales, offsets = (part[None] for part in packed)  # as in _pack
        scales, offsets = scales.astype(mx.float32), offsets.astype(mx.float32)
        return mx.dequantize(codes, scales, offsets, self.group_size, self.bits)[0]
