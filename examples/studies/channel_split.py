"""Quantize outlier channels and the other channels with different methods."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from methods.common import Method
from methods.presets import turboquant_mse
from methods.qjl import QJL

from mlx_turboquant.codec.constants import constant

# The paper splits off 32 of 128 channels.
_SHARE = 4
_QJL_OUTLIERS = 8


class SplitVectors(NamedTuple):
    """The packed outlier channels and the packed others, each of its own method."""

    outliers: Any
    others: Any


class ChannelSplit(Method):
    """Quantizes outlier channels with one method and the others with another one.

    Args:
        channels: The outlier channels, int32 (..., count) in ascending order, broadcast to the
            leading axes of the vectors. Like a seed, they are known beforehand and not stored
            with the vectors.
        outliers: The method for vectors of ``count`` values.
        others: The method for the values of the other channels.

    Raises:
        ValueError: the method of the outliers takes another number of channels.
    """

    def __init__(self, channels: mx.array, outliers: Method, others: Method):
        if channels.shape[-1] != outliers.dim:
            raise ValueError(
                f"{channels.shape[-1]} outlier channels do not fit a method for {outliers.dim} "
                "values: use the same number."
            )
        self.dim = outliers.dim + others.dim
        self.channels = channels
        self.outliers = outliers
        self.others = others
        is_outlier = (channels[..., None] == mx.arange(self.dim)).any(axis=-2)
        self._outliers_first = constant(mx.argsort(~is_outlier, axis=-1))
        nbits = sum(part.dim * part.bits_per_value for part in (outliers, others))
        self.bits_per_value = nbits / self.dim

    def _pack(self, x: mx.array) -> SplitVectors:
        # A value that is not finite turns both parts into NaN.
        finite = mx.isfinite(x).all(axis=-1, keepdims=True)
        x = _take(mx.where(finite, x, mx.nan), self._outliers_first)
        outliers, others = mx.split(x, [self.outliers.dim], axis=-1)
        return SplitVectors(self.outliers.quantize(outliers), self.others.quantize(others))

    def _values(self, packed: SplitVectors) -> mx.array:
        parts = [self.outliers.dequantize(packed.outliers), self.others.dequantize(packed.others)]
        places = mx.argsort(self._outliers_first, axis=-1)
        return _take(mx.concatenate(parts, axis=-1), places)


def largest_channels(x: mx.array, count: int) -> mx.array:
    """The ``count`` channels of x (..., n, dim) with the largest norm over the n vectors.

    Returns int32 (..., 1, count) in ascending order.
    """
    # Ignore non-finite values: their vectors become NaN in all channels anyway.
    finite = mx.where(mx.isfinite(x), x, 0).astype(mx.float32)
    norms = mx.linalg.norm(finite, axis=-2, keepdims=True)
    return mx.sort(mx.argpartition(-norms, count - 1, axis=-1)[..., :count], axis=-1)


def turboquant_split(x: mx.array, bits: int, *, seed: int = 0) -> ChannelSplit:
    """The paper's split for vectors like x (..., n, dim) (arXiv 2504.19874, section 4.3).

    TurboQuant_mse is used twice: the quarter of the channels with the largest norm has ``bits`` + 1
    bits, the others ``bits``. For 128 dimensions the paper calls this 2.5 bits at ``bits`` 2,
    "(32 * 3 + 96 * 2) / 128 = 2.5". That quotient is 2.25. With two norms of 16 bits the sum is 2.5
    (3.5 at ``bits`` 3), and with the float32 norms of ``quantize`` it is 2.75.

    Raises:
        ValueError: fewer than 32 values, or bits that are not supported.
    """
    outliers = partial(turboquant_mse, bits=bits + 1, seed=seed)
    others = partial(turboquant_mse, bits=bits, seed=seed + 1)
    return _split_largest(x, x.shape[-1] // _SHARE, outliers, others)


def qjl_with_outliers(
    x: mx.array, bits: int = 1, *, outlier_bits: int | None = None, seed: int = 0
) -> ChannelSplit:
    """QJL with more projections for the 8 channels of x (..., n, dim) with the largest norm.

    Some channels of keys of deep layers are ten times as large as the others. All projections would
    share their error (arXiv 2406.03482, section 4.1). ``outlier_bits`` is the number of projections
    for each of their values: by default four times ``bits``, 8 at most. The paper leaves it open.

    Raises:
        ValueError: fewer than 16 values, or bits that are not supported.
    """
    outlier_bits = min(4 * bits, 8) if outlier_bits is None else outlier_bits
    outliers = partial(QJL, bits=outlier_bits, seed=seed)
    others = partial(QJL, bits=bits, seed=seed + 1)
    return _split_largest(x, _QJL_OUTLIERS, outliers, others)


def _split_largest(
    x: mx.array, count: int, outliers: Callable[[int], Method], others: Callable[[int], Method]
) -> ChannelSplit:
    """Split off the ``count`` largest channels of x, with methods made for each dimension."""
    dim = x.shape[-1]
    if not 8 <= count <= dim - 8:
        raise ValueError(
            f"Vectors of {dim} values are too short to quantize outlier channels apart: "
            f"use {8 * _SHARE} values or more."
        )
    return ChannelSplit(largest_channels(x, count), outliers(count), others(dim - count))


def _take(x: mx.array, channels: mx.array) -> mx.array:
    """The ``channels`` (..., n) of x (..., dim), broadcast to the leading axes of x."""
    shape = ((1,) * x.ndim + channels.shape)[-x.ndim :]
    return mx.take_along_axis(x, channels.reshape(shape), axis=-1)
