"""A dense cache whose values are rounded as by a codec: any one, at the speed of the exact cache.

For comparing codecs only; it saves no memory.
"""

from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from mlx_turboquant.kernels import BLOCK
from mlx_turboquant.methods import KVarN
from mlx_turboquant.quantizer import TurboQuantizer
from mlx_turboquant.storage import VALUE_MEAN_ENERGY, removable_mean, shared_quantizer

Rounding = Callable[[mx.array], mx.array]


class SimulatedCache(KVCache):
    """Keys and values are rounded in blocks of tokens when they have left the window.

    ``key_rounding`` and ``value_rounding`` take the tokens (B, H, n, dim) of consecutive blocks.
    """

    def __init__(
        self,
        key_rounding: Rounding,
        value_rounding: Rounding,
        window: int,
        sinks: int,
        block: int = BLOCK,
    ):
        super().__init__()
        self.roundings = key_rounding, value_rounding
        self.window = window
        self.sinks = sinks
        self.block = block
        self.rounded = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append tokens; those of the call before that have left the window are seen rounded."""
        start = self.sinks + self.rounded
        leaving = max(0, self.offset - self.window - start) // self.block * self.block
        if leaving:
            for x, rounding in zip((self.keys, self.values), self.roundings):
                x[:, :, start : start + leaving] = rounding(x[:, :, start : start + leaving])
            self.rounded += leaving
        return super().update_and_fetch(keys, values)


def turboquant(bits: int, are_keys: bool) -> Rounding:
    """Our codec: unbiased scale in bfloat16, gain search, and the mean that the first block had."""
    means: list[mx.array] = []

    def rounding(x: mx.array) -> mx.array:
        if not means:
            means.append(removable_mean(x, 0.0 if are_keys else VALUE_MEAN_ENERGY))
        return _rounded(x, bits, means[0])

    return rounding


def turboquant_without_mean(bits: int) -> Rounding:
    """Our codec on vectors as they are."""
    return lambda x: _rounded(x, bits, 0.0)


def turboquant_with_tile_means(bits: int, tile: int, mean_bits: int) -> Rounding:
    """Our codec with a mean for every ``tile`` tokens, itself in ``mean_bits`` with one scale."""
    most = 2 ** (mean_bits - 1) - 1

    def rounding(x: mx.array) -> mx.array:
        means = mx.unflatten(x.astype(mx.float32), 2, (-1, tile)).mean(axis=3)
        scales = mx.abs(means).max(axis=-1, keepdims=True) / most
        scales = mx.maximum(scales.astype(mx.bfloat16).astype(mx.float32), 1e-9)
        means = mx.clip(mx.round(means / scales), -most, most) * scales
        return _rounded(x, bits, mx.repeat(means, tile, axis=2))

    return rounding


def _rounded(x: mx.array, bits: int, mean: mx.array | float) -> mx.array:
    quantizer = shared_quantizer(x.shape[-1], bits, 0)
    packed = quantizer.quantize(x.astype(mx.float32) - mean)
    packed = packed._replace(scales=packed.scales.astype(mx.bfloat16).astype(mx.float32))
    return (quantizer.dequantize(packed) + mean).astype(x.dtype)


def turboquant_mse(bits: int) -> Rounding:
    """TurboQuant_mse as in the paper (arXiv 2504.19874, Algorithm 1)."""

    def rounding(x: mx.array) -> mx.array:
        quantizer = TurboQuantizer(x.shape[-1], bits, scale="none", gain_search=False)
        return quantizer.dequantize(quantizer.quantize(x), x.dtype)

    return rounding


def affine(bits: int, group_size: int = 64) -> Rounding:
    """mlx's affine codec."""

    def rounding(x: mx.array) -> mx.array:
        packed = mx.quantize(x, group_size=group_size, bits=bits)
        return mx.dequantize(*packed, group_size=group_size, bits=bits)

    return rounding


def kvarn(bits: int, by_channel: bool) -> Rounding:
    """KVarN; ``by_channel`` for keys."""

    def rounding(x: mx.array) -> mx.array:
        method = KVarN(x.shape[-1], bits, by_channel=by_channel)
        return method.dequantize(method.quantize(x), x.dtype)

    return rounding
