"""Dense caches whose tokens are rounded as any codec would, for study: they save no memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from methods import Method, make_method
from methods.common import map_arrays
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from mlx_turboquant.kernels.tokens import BLOCK
from mlx_turboquant.lm.compressible import (
    check_compressible,
    compressible_caches,
    plain_caches,
    with_caches,
)
from mlx_turboquant.lm.settings import Settings
from mlx_turboquant.measure.cache_specs import CacheSpec, preset

_DEFAULTS = Settings()
Rounding = Callable[[mx.array], mx.array]


class MethodRounding:
    """Rounds vectors of ``dim`` values as one of ``METHODS`` does, its numbers in bfloat16.

    A method that depends on the vectors is made from the first ones. ``vector_nbytes`` are the
    bytes that it would store for a vector.

    Raises:
        ValueError: an unknown name, or bits or a dimension that the method does not support.
    """

    def __init__(self, name: str, bits: int, dim: int, seed: int = 0):
        self.name = name
        self.bits = bits
        self.seed = seed
        self.method: Method | None = None
        x = mx.zeros((1, dim))
        packed = _stored(make_method(name, x, bits, seed), x)
        self.vector_nbytes = sum(part.nbytes for _, part in tree_flatten(packed))

    def __call__(self, x: mx.array) -> mx.array:
        """The reconstruction of x (B, H, n, dim), in its dtype."""
        if self.method is None:
            self.method = make_method(self.name, x, self.bits, self.seed)
        return self.method.dequantize(_stored(self.method, x), x.dtype)


class SimulatedCache(KVCache):
    """The cache of a layer that rounds tokens in whole blocks after they have left the window.

    The first ``sink_tokens`` and the last ``window`` stay exact, and up to ``block`` - 1 more. A
    block is rounded when the next tokens come, so tokens of a chunk see each other exactly. The
    cache can neither be batched nor saved. ``key_rounding`` and ``value_rounding`` return the
    rounded keys and values (B, H, n, dim) of whole blocks, in their dtype.
    """

    def __init__(
        self,
        key_rounding: Rounding,
        value_rounding: Rounding,
        window: int,
        sink_tokens: int,
        block: int = BLOCK,
    ):
        super().__init__()
        self.roundings = key_rounding, value_rounding
        self.window = window
        self.sink_tokens = sink_tokens
        self.block = block
        self.rounded = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Round blocks that left the window, append keys and values (B, H, n, dim), return all."""
        start = self.sink_tokens + self.rounded
        leaving = max(0, self.offset - self.window - start) // self.block * self.block
        if leaving:
            for x, rounding in zip((self.keys, self.values), self.roundings):
                x[:, :, start : start + leaving] = rounding(x[:, :, start : start + leaving])
            self.rounded += leaving
        return super().update_and_fetch(keys, values)

    def trim(self, n: int) -> int:
        """Remove the last n tokens, at most all, and return how many; rounded ones stay rounded."""
        n = super().trim(n)
        self.rounded = min(self.rounded, max(0, self.offset - self.sink_tokens))
        return n

    @property
    def merge(self) -> None:
        """Not supported."""
        raise AttributeError("A simulated cache cannot be batched.")

    @property
    def token_nbytes(self) -> int:
        """Bytes that the methods of :class:`MethodRounding` would store for one more token."""
        pairs = zip((self.keys, self.values), self.roundings)
        return sum(x.shape[0] * x.shape[1] * rounding.vector_nbytes for x, rounding in pairs)


def method_roundings(
    codec: str, settings: Settings, dims: tuple[int, int] = (128, 128)
) -> list[MethodRounding]:
    """The roundings of keys and values of these ``dims``, with the bits of ``settings``.

    ``codec`` names a method, or one for keys and one for values, like ``qjl+affine``. Every method
    supports the default of 128 values.

    Raises:
        ValueError: an unknown name, or bits or a dimension that a method does not support.
    """
    keys, plus, values = codec.partition("+")
    names, bits = (keys, values if plus else keys), (settings.key_bits, settings.value_bits)
    return [MethodRounding(*each, settings.seed) for each in zip(names, bits, dims)]


@dataclass(frozen=True)
class SimulatedSpec(CacheSpec):
    """A simulated cache to compare: ``codec`` names one or two methods."""

    codec: str = ""

    def make_cache(self, model: nn.Module) -> list[Any]:
        """As in :func:`simulated_prompt_cache`."""
        return simulated_prompt_cache(model, self.codec, self.settings)


def simulated_preset(name: str, settings: Settings = _DEFAULTS) -> CacheSpec:
    """A simulated cache for a name like ``prod:4`` or ``qjl+affine:K3V2``; others as in ``preset``.

    All its layers have the same bits; half bits give keys one more.

    Raises:
        ValueError: a name of another form, or bits that a method does not support.
    """
    codec, colon, bits = name.rpartition(":")
    spec = preset(bits, settings)
    if not colon:
        return spec
    key_bits = spec.settings.key_bits or int(spec.settings.bits + 0.5)
    value_bits = spec.settings.value_bits or int(spec.settings.bits)
    settings = replace(settings, uniform=False, key_bits=key_bits, value_bits=value_bits)
    method_roundings(codec, settings)  # refuses what no model supports
    return SimulatedSpec(f"{codec} {spec.name}", settings=settings, codec=codec)


def simulated_prompt_cache(model: nn.Module, codec: str, settings: Settings) -> list[Any]:
    """A prompt cache of a model with ``codec`` in every layer that could be compressed.

    It uses the bits of keys and values, the window, the sinks and the seed of ``settings``.

    Raises:
        ValueError: a model with latent attention, with vectors that a method does not support,
            or without a layer that could be compressed.
    """
    compressible, simulated = compressible_caches(model), []
    check_compressible(model, compressible)
    for place in compressible:
        if place.values is None:
            raise ValueError(f"Codec {codec} does not support latent attention: leave it out.")
        roundings = method_roundings(codec, settings, (place.keys.dim, place.values.dim))
        simulated.append(SimulatedCache(*roundings, settings.window, settings.sink_tokens))
    return with_caches(plain_caches(model), compressible, simulated)


def _stored(method: Method, x: mx.array) -> Any:
    """The result of ``quantize`` for x, with float32 arrays in bfloat16."""
    packed = method.quantize(x)
    return map_arrays(lambda a: a.astype(mx.bfloat16) if a.dtype == mx.float32 else a, packed)
