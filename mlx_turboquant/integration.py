"""Switching compression on and off for a model of mlx-lm."""

import logging
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from . import kernels
from .allocation import uniform_bits
from .attention import MAX_DECODE_ROWS, decode_attention
from .batch_cache import CausalMask
from .cache import DEFAULT_SINK_TOKENS, DEFAULT_WINDOW, TurboQuantKVCache, fused_models
from .calibrate import calibrate
from .choice import ModelChoice, choice_of
from .compressible import (
    HOOKED_NAME,
    Compressible,
    attention_scopes,
    check_compressible,
    plain_caches,
)
from .kernels import BLOCK
from .latent_cache import TurboQuantLatentCache
from .profile import Profile, find_profile, fingerprint, load_profile, save_profile
from .report import flat_caches
from .settings import Settings
from .turns import announce

_log = logging.getLogger("mlx_turboquant")


def make_prompt_cache(
    model: nn.Module,
    bits: float = 4,
    *,
    key_bits: int | None = None,
    value_bits: int | None = None,
    uniform: bool = False,
    profile: Profile | Path | str | None = None,
    window: int = DEFAULT_WINDOW,
    sink_tokens: int = DEFAULT_SINK_TOKENS,
    max_size: int | None = None,
    seed: int = 0,
    backend: str | None = None,
) -> list[Any]:
    """A compressed ``prompt_cache`` for mlx-lm: one cache per layer of ``model``.

    Layers for which mlx-lm would make a plain ``KVCache``, alone or in a ``CacheList``, are
    compressed, all others are left as they are; so are layers that choose tokens by an index of
    their own (DeepSeek's sparse attention). Also lets the model's attention read compressed
    tokens, which :func:`disable` undoes.

    Args:
        model: A model of mlx-lm.
        bits: Mean of bits per value, 2 to 8 in quarters, which are spent where the profile of the
            model says that they matter.
        key_bits: Bits per value of all keys.
        value_bits: Bits per value of all values.
        uniform: Give all layers the same bits, for comparison.
        profile: What calibration found out about the model, or the file of it. None takes that in
            the user's cache folder; without one, bits follow what quantizing does to the attention
            of the model on pseudo-random tokens.
        window: Recent tokens that stay exact.
        sink_tokens: First tokens that stay exact.
        max_size: Tokens that a layer holds at most, after which the oldest are forgotten.
        seed: Of the random rotation.
        backend: "metal", "cuda" or "reference" (plain MLX operations), for the whole process; None
            leaves the choice to ``MLX_TURBOQUANT_BACKEND`` and the machine.

    Raises:
        ValueError: a setting out of range, a profile of another model, or no layer that could be
            compressed.
    """
    settings = Settings(
        bits=bits,
        key_bits=key_bits,
        value_bits=value_bits,
        uniform=uniform,
        window=window,
        sink_tokens=sink_tokens,
        max_size=max_size,
        seed=seed,
    )
    if backend is not None:
        kernels.force_backend(backend)
    return make_cache_of(model, settings, profile)


def make_cache_of(
    model: nn.Module, settings: Settings, profile: Profile | Path | str | None = None
) -> list[Any]:
    """:func:`make_prompt_cache` of settings that have been checked."""
    choice = choice_of(model, _profile_of(model, profile))
    check_compressible(model, choice.compressible)
    compressed = _compressed(model, choice, settings)
    connect(model, compressed)
    return compressed


def _profile_of(model: nn.Module, profile: Profile | Path | str | None) -> Profile | None:
    if profile is None or isinstance(profile, Profile):
        return profile
    return load_profile(Path(profile), fingerprint(model))


def enable(
    model: nn.Module,
    bits: float = 4,
    *,
    tokenizer: Any = None,
    profile: Profile | Path | str | None = None,
    backend: str | None = None,
    **settings: Any,
) -> nn.Module:
    """Let every cache that mlx-lm makes for ``model`` be compressed; returns the model.

    Takes the arguments of :func:`make_prompt_cache` and raises its errors. With a ``tokenizer``, a
    model without a profile is calibrated first, which takes about as long as reading a prompt of
    16 000 tokens, and the profile is kept. Where there are kernels, the model runs over some fifty
    tokens, which compiles those that it needs and compares them with plain MLX; a warning names
    what is replaced.
    """
    checked = Settings(bits, **settings)
    if backend is not None:
        kernels.force_backend(backend)
    if profile is None and tokenizer is not None and find_profile(fingerprint(model)) is None:
        profile = calibrate(model, tokenizer)
        save_profile(profile)
    make_cache_of(model, checked, profile)  # refuses a bad setting now, not at generation
    if kernels.backend() != "reference":
        _use_kernels_once(model, checked)
    replaced = model.__dict__.get("make_cache")
    if isinstance(replaced, _MakeCompressedCache):
        replaced = replaced.replaced
    model.make_cache = _MakeCompressedCache(model, checked, replaced)
    return model


def disable(model: nn.Module) -> nn.Module:
    """Undo :func:`enable` and what :func:`make_prompt_cache` did to ``model``; returns the model.

    Compressed caches that exist keep working, without the fast path.
    """
    maker = model.__dict__.get("make_cache")
    if isinstance(maker, _MakeCompressedCache):
        del model.make_cache
        if maker.replaced is not None:
            model.make_cache = maker.replaced
    fused_models.discard(id(model))
    for scope in attention_scopes(model):
        hook = scope[HOOKED_NAME]
        if isinstance(hook, _AttentionHook):
            hook.models.discard(id(model))
            if not hook.models:
                scope[HOOKED_NAME] = hook.original
    return model


def enabled_settings(model: nn.Module) -> Settings | None:
    """The settings that :func:`enable` was given; None without it."""
    maker = model.__dict__.get("make_cache")
    return maker.settings if isinstance(maker, _MakeCompressedCache) else None


def _use_kernels_once(model: nn.Module, settings: Settings) -> None:
    """A chunk to pack, one that reads packed tokens densely, and a decode step."""
    cache = make_cache_of(model, replace(settings, window=0, sink_tokens=0))
    for tokens in (BLOCK, MAX_DECODE_ROWS + 1, 1):
        mx.eval(model(mx.ones((1, tokens), mx.int32), cache=cache))


def _compressed(model: nn.Module, choice: ModelChoice, settings: Settings) -> list[Any]:
    """Compressed caches in the places of those that can be compressed."""
    caches = plain_caches(model)
    shared = any(_calls(module, "keys_and_values") for module in model.modules())
    for place, pair in zip(choice.compressible, _bits_of_layers(choice, settings)):
        compressed = _compressed_cache(place, pair, settings)
        compressed.shared = shared
        cache = caches[place.layer]
        if place.part is None:
            caches[place.layer] = compressed
        else:
            parts = list(cache.caches)
            parts[place.part] = compressed
            caches[place.layer] = mlx_lm_cache.CacheList(*parts)
    return caches


def _bits_of_layers(choice: ModelChoice, settings: Settings) -> list[tuple[int, int]]:
    """The bits of keys and values of every compressed layer."""
    if settings.is_fixed:
        key_bits, value_bits = uniform_bits(settings.bits)
        pair = (settings.key_bits or key_bits, settings.value_bits or value_bits)
        return [pair] * len(choice.compressible)
    return choice.bits(settings)


def _compressed_cache(
    place: Compressible, bits: tuple[int, int], settings: Settings
) -> TurboQuantKVCache:
    kind = TurboQuantLatentCache if place.values is None else TurboQuantKVCache
    return kind(*bits, **settings.of_cache)


def _calls(module: nn.Module, name: str) -> bool:
    """Whether the module's own ``__call__`` uses a function or method of this name."""
    code = getattr(type(module).__call__, "__code__", None)
    return code is not None and name in code.co_names


def _compressed_layers(cache: list[Any]) -> list[TurboQuantKVCache]:
    return [layer for layer in flat_caches(cache) if isinstance(layer, TurboQuantKVCache)]


class _MakeCompressedCache:
    """``model.make_cache`` of an enabled model."""

    def __init__(self, model: nn.Module, settings: Settings, replaced: Any):
        self.model = weakref.ref(model)
        self.settings = settings
        self.replaced = replaced

    def __call__(self) -> list[Any]:
        return make_cache_of(self.model(), self.settings)

    def plain_caches(self) -> list[Any]:
        """Those that mlx-lm makes for the model when it is not enabled."""
        model = self.model()
        if self.replaced is not None:
            return self.replaced()
        if hasattr(type(model), "make_cache"):
            return type(model).make_cache(model)
        return [mlx_lm_cache.KVCache() for _ in model.layers]


class _AttentionHook:
    """Takes the place of ``scaled_dot_product_attention`` in the module of a model.

    Decode steps over packed tokens read them as they are. Everything else goes to the original
    function, which gets dense arrays.
    """

    def __init__(self, original):
        self.original = original
        self.models: set[int] = set()

    def __call__(self, queries, keys, values, *arguments, **keywords):
        tokens = getattr(keys, "tokens", None)
        if tokens is None or tokens is not getattr(values, "tokens", None):
            return self.original(queries, keys, values, *arguments, **keywords)
        if tokens.keys.count and queries.shape[2] <= MAX_DECODE_ROWS:
            return self._decode(queries, tokens, *arguments, **keywords)
        output = self.original(queries, keys, values, *arguments, **keywords)
        if queries.shape[2] > MAX_DECODE_ROWS:
            announce(output)
        return output

    @staticmethod
    def _decode(queries, tokens, cache, scale, mask, sinks=None):
        if type(mask) is CausalMask:
            mask = None if queries.shape[2] == 1 else "causal"
        return decode_attention(queries, tokens, scale, mask, sinks)


def connect(model: nn.Module, cache: list[Any]) -> None:
    """Let the attention of ``model`` read compressed tokens as they are, those of ``cache``."""
    _hook_attention(model)
    if id(model) not in _needs_arrays:
        _needs_arrays[id(model)] = _raises_without_arrays(model)
        weakref.finalize(model, _needs_arrays.pop, id(model), None)
        weakref.finalize(model, fused_models.discard, id(model))
    if not _needs_arrays[id(model)]:
        fused_models.add(id(model))
    for number, layer in enumerate(_compressed_layers(cache)):
        layer.model_id, layer.layer = id(model), number


# Of models, by their ids.
_needs_arrays: dict[int, bool] = {}


def _raises_without_arrays(model: nn.Module) -> bool:
    """Whether anything but hooked attention uses the keys and values of one new token.

    Tried on a token after a packed block, read in steps that are not evaluated: nothing of the
    model is. What is not an array raises when it is used as one.
    """
    settings = Settings(key_bits=4, value_bits=4, window=0, sink_tokens=0)
    cache = _compressed(model, choice_of(model), settings)
    for layer in _compressed_layers(cache):
        layer.model_id = id(model)
    for _ in range(BLOCK // MAX_DECODE_ROWS):
        model(mx.zeros((1, MAX_DECODE_ROWS), mx.int32), cache=cache)
    fused_models.add(id(model))
    try:
        model(mx.zeros((1, 1), mx.int32), cache=cache)
        return False
    except (TypeError, AttributeError) as error:
        _log.info("Decoding makes dense keys and values as well, because of: %s", error)
        return True
    finally:
        fused_models.discard(id(model))


def _hook_attention(model: nn.Module) -> None:
    for scope in attention_scopes(model):
        if not isinstance(scope[HOOKED_NAME], _AttentionHook):
            scope[HOOKED_NAME] = _AttentionHook(scope[HOOKED_NAME])
        models = scope[HOOKED_NAME].models
        if id(model) not in models:
            models.add(id(model))
            weakref.finalize(model, models.discard, id(model))
