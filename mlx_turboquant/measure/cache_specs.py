"""The caches that are compared: the exact one, mlx-lm's, ours, and simulated ones."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from ..lm.compressible import flat_caches, plain_caches
from ..lm.enable import make_prompt_cache
from ..lm.settings import Settings
from .simulated import method_roundings, simulated_prompt_cache

# The chunks of mlx-lm's prefill, in tokens, and the groups of its quantized cache, in values.
CHUNK = 2048
GROUP_SIZE = 64

_DEFAULTS = Settings()

# Called with the number of tokens of one sequence after each step.
Progress = Callable[[int], Any]


def ignore(tokens: int) -> None:
    """Ignore the progress."""


class CacheSpec(NamedTuple):
    """A cache to compare; with a ``name`` alone, the exact one.

    ``mlx_lm_bits`` selects mlx-lm's quantized cache, ``settings`` selects ours. ``settings`` with
    a ``codec``, one or two of :data:`.methods.METHODS`, selects a simulated one.
    """

    name: str
    mlx_lm_bits: int | None = None
    settings: Settings | None = None
    codec: str | None = None

    @property
    def needs_profile(self) -> bool:
        """Whether the profile of the model chooses the bits."""
        return self.settings is not None and not self.settings.is_fixed

    def make_cache(self, model: nn.Module) -> list[Any]:
        """An empty prompt cache.

        Raises:
            ValueError: a model that this cache does not support.
        """
        if self.settings is None:
            return plain_caches(model)
        if self.codec is None:
            return make_prompt_cache(model, self.settings)
        return simulated_prompt_cache(model, self.codec, self.settings)

    def after_chunk(self, cache: list[Any]) -> None:
        """Quantize mlx-lm's own cache, as mlx-lm does after every chunk of a prompt."""
        maybe_quantize_kv_cache(cache, 0, GROUP_SIZE, self.mlx_lm_bits)

    def read(
        self, model: nn.Module, cache: list[Any], tokens: mx.array, progress: Progress = ignore
    ) -> None:
        """Prefill a cache with tokens (B, n) in chunks, as mlx-lm does."""
        for start in range(0, tokens.shape[1], CHUNK):
            chunk = tokens[:, start : start + CHUNK]
            model(chunk, cache=cache)
            self.after_chunk(cache)
            mx.eval([layer.state for layer in cache])
            mx.clear_cache()
            progress(chunk.shape[1])


EXACT = CacheSpec("exact")
MLX_LM = (CacheSpec("mlx-lm 8 bits", 8), CacheSpec("mlx-lm 4 bits", 4))


def preset(name: str, settings: Settings = _DEFAULTS) -> CacheSpec:
    """The cache of a name: ours for ``4``, ``3.5`` (bits) or ``K5V3`` (bits of keys and values).

    A name with methods, like ``prod:4`` or ``qjl+affine:K3V2``, gives a simulated cache. All its
    layers have the same bits; half bits give keys one more. All else is as in ``settings``.

    Raises:
        ValueError: a name of another form, or invalid bits.
    """
    codec, colon, bits_name = name.rpartition(":")
    split = re.fullmatch(r"[Kk](\d)[Vv](\d)", bits_name)
    if not split and not re.fullmatch(r"\d(\.\d*)?", bits_name):
        raise ValueError(
            f"{name!r} is not a preset: use bits like 4 or 3.5, a split like K5V3, "
            "or another codec and its bits like prod:4."
        )
    label = bits_name.upper() if split else f"{bits_name} bits"
    if not split and not colon:
        return CacheSpec(label, settings=replace(settings, bits=float(bits_name)))
    if split:
        key_bits, value_bits = map(int, split.groups())
    else:
        key_bits, value_bits = int(float(bits_name) + 0.5), int(float(bits_name))
    settings = replace(settings, key_bits=key_bits, value_bits=value_bits)
    if not colon:
        return CacheSpec(label, settings=settings)
    settings = replace(settings, uniform=False)
    method_roundings(codec, settings)  # refuses what no model supports
    return CacheSpec(f"{codec} {label}", settings=settings, codec=codec)


def token_size(cache: list[Any]) -> tuple[int, float]:
    """The values of a token and the bytes that they take, scales included.

    Layers that are bounded or hold no tokens do not count. Exact values count as 16 bits each.
    """
    sizes = [_layer_token_size(layer) for layer in flat_caches(cache)]
    return sum(values for values, _ in sizes), sum((nbytes for _, nbytes in sizes), 0.0)


def _layer_token_size(layer: Any) -> tuple[int, float]:
    if isinstance(layer, KVCache):
        values = sum(x.size // x.shape[2] for x in (layer.keys, layer.values))
        return values, getattr(layer, "token_nbytes", 2 * values)
    if hasattr(layer, "token_nbytes"):
        return layer.token_values, layer.token_nbytes
    if isinstance(layer, QuantizedKVCache):
        scales = layer.keys[1], layer.values[1]
        values = layer.group_size * sum(x.size // x.shape[2] for x in scales)
        return values, values * (layer.bits + 32 / layer.group_size) / 8
    return 0, 0
