"""A dense cache whose values are rounded as by a codec: any one, at the speed of the exact cache.

For comparing codecs only; it saves no memory.
"""

from collections.abc import Callable, Iterable

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from mlx_turboquant.cache import leaving_tokens
from mlx_turboquant.quantizer import TurboQuantizer
from mlx_turboquant.storage import removable_mean, shared_quantizer

Rounding = Callable[[mx.array], mx.array]


class SimulatedCache(KVCache):
    """Keys and values are rounded in blocks of 32 when they have left the window.

    ``key_rounding`` and ``value_rounding`` take the tokens (B, H, n, dim) of consecutive blocks.
    """

    def __init__(self, key_rounding: Rounding, value_rounding: Rounding, window: int, sinks: int):
        super().__init__()
        self.roundings = key_rounding, value_rounding
        self.window = window
        self.sinks = sinks
        self.rounded = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append tokens; those of the call before that have left the window are seen rounded."""
        counts = self.rounded, self.offset - self.rounded
        leaving = leaving_tokens(*counts, self.sinks, self.window)
        if leaving:
            start = self.sinks + self.rounded
            for x, rounding in zip((self.keys, self.values), self.roundings):
                x[:, :, start : start + leaving] = rounding(x[:, :, start : start + leaving])
            self.rounded += leaving
        return super().update_and_fetch(keys, values)


def filled_caches(
    prompt: list[list[mx.array]],
    roundings: Iterable[tuple[Rounding, Rounding]],
    window: int,
    sinks: int,
) -> list[SimulatedCache]:
    """One cache a layer that holds its keys and values of a prompt."""
    caches = [SimulatedCache(*pair, window, sinks) for pair in roundings]
    for cache, keys_and_values in zip(caches, prompt):
        cache.update_and_fetch(*keys_and_values)
    return caches


def turboquant(bits: int, remove_mean: bool = True) -> Rounding:
    """Our codec: unbiased scale in bfloat16, gain search, and the mean that the first block had."""
    means: list[mx.array] = []

    def rounding(x: mx.array) -> mx.array:
        quantizer = shared_quantizer(x.shape[-1], bits, 0)
        if not means:
            means.append(removable_mean(x) if remove_mean else mx.zeros_like(x[:, :, :1]))
        packed = quantizer.quantize(x.astype(mx.float32) - means[0])
        packed = packed._replace(scales=packed.scales.astype(mx.bfloat16).astype(mx.float32))
        return (quantizer.dequantize(packed) + means[0]).astype(x.dtype)

    return rounding


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
