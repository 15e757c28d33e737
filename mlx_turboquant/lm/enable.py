"""Switching compression on and off for a model of mlx-lm."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ..kernels.attention import MAX_DECODE_ROWS
from ..kernels.runtime import backend as kernel_backend
from ..kernels.runtime import force_backend
from ..kernels.tokens import BLOCK
from .calibrate import calibrate
from .choice import choice_of
from .compressible import check_compressible, compressed_caches
from .hook import connect, disconnect
from .profile import Profile, find_profile, fingerprint, load_profile, save_profile
from .settings import CacheOptions, Settings

ProfileOrFile = Profile | Path | str | None


def make_prompt_cache(
    model: nn.Module,
    bits: float | Settings = 4,
    *,
    profile: ProfileOrFile = None,
    backend: str | None = None,
    **options: Unpack[CacheOptions],
) -> list[Any]:
    """A compressed ``prompt_cache`` for mlx-lm: one cache per layer of ``model``.

    Layers for which mlx-lm would make a plain ``KVCache``, alone or in a ``CacheList``, are
    compressed, all others are left as they are; so are layers that choose tokens by an index of
    their own (DeepSeek's sparse attention). Also lets the model's attention read compressed
    tokens, which :func:`disable` undoes.

    Args:
        model: A model of mlx-lm.
        bits: Mean of bits per value, 2 to 8 in quarters, or all settings at once.
        profile: What calibration found out about the model, or the file of it. None takes that in
            the user's cache folder; without one, bits follow what quantizing does to the attention
            of the model on pseudo-random tokens.
        backend: "metal", "cuda" or "reference" (plain MLX operations), for the whole process; None
            leaves the choice to ``MLX_TURBOQUANT_BACKEND`` and the machine.
        options: The other fields of :class:`.Settings`.

    Raises:
        ValueError: a setting out of range, a profile of another model, or no layer that could be
            compressed.
    """
    settings = _settings(bits, options)
    if backend is not None:
        force_backend(backend)
    if profile is not None and not isinstance(profile, Profile):
        profile = load_profile(Path(profile), fingerprint(model))
    choice = choice_of(model, profile)
    check_compressible(model, choice.compressible)
    cache = compressed_caches(model, choice.compressible, choice.bits(settings), settings)
    connect(model, cache)
    return cache


def enable(
    model: nn.Module,
    bits: float | Settings = 4,
    *,
    tokenizer: Any = None,
    profile: ProfileOrFile = None,
    backend: str | None = None,
    **options: Unpack[CacheOptions],
) -> nn.Module:
    """Let every cache that mlx-lm makes for ``model`` be compressed; returns the model.

    Takes the arguments of :func:`make_prompt_cache` and raises its errors. With a ``tokenizer``, a
    model without a profile is calibrated first, which takes about as long as reading a prompt of
    16 000 tokens, and the profile is kept. Where there are kernels, the model runs over some fifty
    tokens, which compiles those that it needs and compares them with plain MLX; a warning names
    what is replaced.
    """
    settings = _settings(bits, options)
    if backend is not None:
        force_backend(backend)
    if profile is None and tokenizer is not None and find_profile(fingerprint(model)) is None:
        profile = calibrate(model, tokenizer)
        save_profile(profile)
    make_prompt_cache(model, settings, profile=profile)  # refuses now, not at generation
    if kernel_backend() != "reference":
        _use_kernels_once(model, settings)
    replaced = model.__dict__.get("make_cache")
    if isinstance(replaced, _MakeCompressedCache):
        replaced = replaced.replaced
    model.make_cache = _MakeCompressedCache(model, settings, replaced)
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
    disconnect(model)
    return model


def enabled_settings(model: nn.Module) -> Settings | None:
    """The settings that :func:`enable` was given; None without it."""
    maker = model.__dict__.get("make_cache")
    return maker.settings if isinstance(maker, _MakeCompressedCache) else None


def _settings(bits: float | Settings, options: CacheOptions) -> Settings:
    return replace(bits, **options) if isinstance(bits, Settings) else Settings(bits, **options)


def _use_kernels_once(model: nn.Module, settings: Settings) -> None:
    """A chunk to pack, one that reads packed tokens densely, and a decode step."""
    cache = make_prompt_cache(model, settings, window=0, sink_tokens=0)
    for tokens in (BLOCK, MAX_DECODE_ROWS + 1, 1):
        mx.eval(model(mx.ones((1, tokens), mx.int32), cache=cache))


class _MakeCompressedCache:
    """``model.make_cache`` of an enabled model."""

    def __init__(self, model: nn.Module, settings: Settings, replaced: Any):
        self.model = weakref.ref(model)
        self.settings = settings
        self.replaced = replaced

    def __call__(self) -> list[Any]:
        return make_prompt_cache(self.model(), self.settings)

    def plain_caches(self) -> list[Any]:
        """The caches that mlx-lm makes for the model when it is not enabled."""
        model = self.model()
        if self.replaced is not None:
            return self.replaced()
        if hasattr(type(model), "make_cache"):
            return type(model).make_cache(model)
        return [mlx_lm_cache.KVCache() for _ in model.layers]
