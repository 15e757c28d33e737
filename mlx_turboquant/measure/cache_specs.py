"""The caches that are compared: the exact one, mlx-lm's and ours."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from ..codec.quantizer import CODECS
from ..lm.compressible import flat_caches, plain_caches
from ..lm.enable import make_prompt_cache
from ..lm.settings import Settings

# The chunks of mlx-lm's prefill, in tokens, and the groups of its quantized cache, in values.
CHUNK = 2048
GROUP_SIZE = 64

_DEFAULTS = Settings()

# Called with the number of tokens of one sequence after each step.
Progress = Callable[[int], Any]


def ignore(tokens: int) -> None:
    """Ignore the progress."""


@dataclass(frozen=True)
class CacheSpec:
    """A cache to compare; with a ``name`` alone, the exact one.

    ``mlx_lm_bits`` selects mlx-lm's quantized cache, ``settings`` selects ours. Prompts are read in
    chunks of ``chunk`` tokens.
    """

    name: str
    mlx_lm_bits: int | None = None
    settings: Settings | None = None
    chunk: int = CHUNK

    @property
    def needs_profile(self) -> bool:
        """Whether the profile of the model chooses the bits."""
        return self.settings is not None and not self.settings.is_fixed

    def make_cache(self, model: nn.Module) -> list[Any]:
        """An empty prompt cache; ValueError for a model that this cache does not support."""
        if self.settings is None:
            return plain_caches(model)
        return make_prompt_cache(model, self.settings)

    def after_chunk(self, cache: list[Any]) -> None:
        """Quantize mlx-lm's own cache, as mlx-lm does after every chunk of a prompt."""
        maybe_quantize_kv_cache(cache, 0, GROUP_SIZE, self.mlx_lm_bits)

    def read(
        self, model: nn.Module, cache: list[Any], tokens: mx.array, progress: Progress = ignore
    ) -> None:
        """Prefill a cache with tokens (B, n) in chunks, as mlx-lm does."""
        for start in range(0, tokens.shape[1], self.chunk):
            chunk = tokens[:, start : start + self.chunk]
            model(chunk, cache=cache)
            self.after_chunk(cache)
            mx.eval([layer.state for layer in cache])
            mx.clear_cache()
            progress(chunk.shape[1])


EXACT = CacheSpec("exact")
MLX_LM = (CacheSpec("mlx-lm 8 bits", 8), CacheSpec("mlx-lm 4 bits", 4))


def preset(name: str, settings: Settings = _DEFAULTS) -> CacheSpec:
    """Our cache with bits like ``4`` or ``3.5``, or bits of keys and values like ``K5V3``.

    A codec may come before them, like ``trellis:3``. All else is as in ``settings``. ValueError for
    a name of another form, or invalid bits.
    """
    form = rf"(?:({'|'.join(CODECS)}):)?(?:[Kk](\d)[Vv](\d)|(\d(?:\.\d*)?))"
    found = re.fullmatch(form, name)
    if found is None:
        raise ValueError(
            f"{name!r} is not a preset: use bits like 4 or 3.5, a split like K5V3, or a codec "
            "before them like trellis:3."
        )
    codec, key_bits, value_bits, bits = found.groups()
    settings = replace(settings, codec=codec or settings.codec)
    before = "" if settings.codec == "scalar" else f"{settings.codec} "
    if bits is not None:
        return CacheSpec(f"{before}{bits} bits", settings=replace(settings, bits=float(bits)))
    settings = replace(settings, key_bits=int(key_bits), value_bits=int(value_bits))
    return CacheSpec(f"{before}K{key_bits}V{value_bits}", settings=settings)


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
