"""Switching compression on and off for a model of mlx-lm."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import mlx.core as mx
import mlx.nn as nn

from ..kernels.attention import MAX_DECODE_ROWS
from ..kernels.runtime import backend as kernel_backend
from ..kernels.runtime import force_backend
from ..kernels.tokens import BLOCK
from .calibrate import Progress, calibrated
from .compressible import ATTRIBUTE
from .compression import Compression, compression_of, give_profile, known_compression
from .profile import Profile, fingerprints, load_profile
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

    Layers with a plain ``KVCache`` of mlx-lm, alone or in a ``CacheList``, are compressed. All
    others stay unchanged, and so do layers that select tokens with an indexer (DeepSeek's sparse
    attention). The model's attention is hooked to read compressed tokens; :func:`disable` undoes
    this.

    Args:
        model: A model of mlx-lm.
        bits: Mean bits per value, 2 to 8 in quarters, or all settings at once.
        profile: A profile of the model, or its file. None takes the one in the user's cache folder.
            If there is none, bits follow the sensitivity of the model's attention to quantized
            keys, which is estimated on pseudo-random tokens.
        backend: "metal", "cuda" or "reference" (plain MLX operations), for the whole process. None
            leaves the choice to ``MLX_TURBOQUANT_BACKEND`` and the machine.
        options: The other fields of :class:`.Settings`.

    Raises:
        ValueError: a setting out of range, a profile of another model, or no layer that could be
            compressed.
    """
    settings = _settings(bits, backend, options)
    profile = _loaded(profile, model)
    compression = compression_of(model) if profile is None else give_profile(model, profile)
    return compression.new_cache(settings)


def enable(
    model: nn.Module,
    bits: float | Settings = 4,
    *,
    tokenizer: Any = None,
    progress: Progress | bool = True,
    profile: ProfileOrFile = None,
    backend: str | None = None,
    **options: Unpack[CacheOptions],
) -> nn.Module:
    """Compress every cache that mlx-lm makes for ``model``, and return the model.

    Takes the arguments of :func:`make_prompt_cache` and raises its errors. With a ``tokenizer``, a
    model without a profile is calibrated first, unless its bits are fixed. The profile is kept; the
    next call continues an interrupted calibration. ``progress`` is called with the number of
    finished steps and of all steps; True shows a bar, False nothing. On a backend with kernels, the
    model runs over about 40 tokens. This compiles the kernels that it needs and compares them with
    plain MLX; a warning names those that plain MLX replaces.
    """
    settings = _settings(bits, backend, options)
    before = known_compression(model)
    compression = Compression(model, before, settings, _loaded(profile, model))
    if compression.profile is None and tokenizer is not None and not settings.is_fixed:
        compression = Compression(model, before, settings, calibrated(model, tokenizer, progress))
    compression.new_cache(settings)  # raises errors here, not at generation
    if kernel_backend() != "reference":
        _use_kernels_once(model, compression)
    setattr(model, ATTRIBUTE, compression)
    model.make_cache = compression.make_cache
    return model


def disable(model: nn.Module) -> nn.Module:
    """Undo what :func:`enable` and :func:`make_prompt_cache` did to ``model``; return the model.

    Existing compressed caches keep working, without the fast path.
    """
    compression = known_compression(model)
    if compression is not None:
        compression.disconnect()
    maker = getattr(model.__dict__.get("make_cache"), "__self__", None)
    if isinstance(maker, Compression):
        del model.make_cache
        if maker.replaced is not None:
            model.make_cache = maker.replaced
    model.__dict__.pop(ATTRIBUTE, None)
    return model


def _settings(bits: float | Settings, backend: str | None, options: CacheOptions) -> Settings:
    """All settings in one; a backend that is given is chosen if they are valid."""
    settings = replace(bits, **options) if isinstance(bits, Settings) else Settings(bits, **options)
    if backend is not None:
        force_backend(backend)
    return settings


def _loaded(profile: ProfileOrFile, model: nn.Module) -> Profile | None:
    if profile is None or isinstance(profile, Profile):
        return profile
    return load_profile(Path(profile), fingerprints(model))


def _use_kernels_once(model: nn.Module, compression: Compression) -> None:
    """Run a chunk to pack, one that reads packed tokens densely, and a decode step."""
    cache = compression.new_cache(replace(compression.settings, window=0, sink_tokens=0))
    for tokens in (BLOCK, MAX_DECODE_ROWS + 1, 1):
        mx.eval(model(mx.ones((1, tokens), mx.int32), cache=cache))
