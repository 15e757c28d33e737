"""The caches of a model that can be compressed, and the vectors that their layers store."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ..cache.fetched import Link
from ..cache.latent import TurboQuantLatentCache
from ..cache.single import TurboQuantKVCache
from ..codec.basis import Basis
from .allocation import Vectors
from .settings import Settings

# The attribute of a model that holds its ``Compression``.
ATTRIBUTE = "_mlx_turboquant"


class Compressible(NamedTuple):
    """One cache of a prompt cache that can be compressed.

    ``layer`` is the number of its layer, and ``place`` its place in :func:`flat_caches`. ``values``
    is None for latent attention: one vector per token is both key and value.
    """

    layer: int
    place: int
    keys: Vectors
    values: Vectors | None

    def of(self, prompt_cache: list[Any]) -> Any:
        """This cache in a prompt cache of the model."""
        return flat_caches(prompt_cache)[self.place]


def plain_caches(model: nn.Module) -> list[Any]:
    """The caches that mlx-lm makes for a model that is not enabled."""
    compression = getattr(model.__dict__.get("make_cache"), "__self__", None)
    if not hasattr(compression, "replaced"):
        return mlx_lm_cache.make_prompt_cache(model)
    if compression.replaced is not None:
        return compression.replaced()
    if hasattr(type(model), "make_cache"):
        return type(model).make_cache(model)
    return [mlx_lm_cache.KVCache() for _ in model.layers]


def compressible_caches(model: nn.Module) -> list[Compressible]:
    """The caches of a model that are compressed, in the order of its layers.

    These are the plain ``KVCache`` of mlx-lm, alone or in a ``CacheList``, except in layers that
    select tokens with an indexer. The model is called lazily with one token: nothing is computed.
    """
    caches = plain_caches(model)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    layers = getattr(model, "layers", [])
    if len(layers) != len(caches):
        layers = [model] * len(caches)
    found = []
    parts = [(i, part) for i, cache in enumerate(caches) for part in flat_caches([cache])]
    for place, (i, part) in enumerate(parts):
        modules = layers[i].modules()
        has_indexer = any("indexer" in module for module in modules)
        if has_indexer or type(part) is not mlx_lm_cache.KVCache or part.keys is None:
            continue
        # Multi-head latent attention, with the projections of keys and values absorbed.
        is_latent = any("embed_q" in module for module in modules)
        keys, values = (Vectors(x.shape[1], x.shape[3]) for x in (part.keys, part.values))
        found.append(Compressible(i, place, keys, None if is_latent else values))
    return found


def compressed_caches(
    model: nn.Module,
    places: list[Compressible],
    bits: list[tuple[int, int]],
    settings: Settings,
    bases: Sequence[Basis | None] = (),
) -> list[Any]:
    """A new prompt cache with these bits of keys and values in the compressed ``places``."""
    new = []
    for place, pair, basis in zip(places, bits, bases or [None] * len(places), strict=True):
        cache_class = TurboQuantLatentCache if place.values is None else TurboQuantKVCache
        new.append(cache_class(**settings.of_layer(*pair, basis)._asdict()))
    return with_caches(plain_caches(model), places, new)


def with_caches(
    prompt_cache: list[Any], places: list[Compressible], caches: Sequence[Any]
) -> list[Any]:
    """A prompt cache like this one, with other ``caches`` in these places."""
    flat = flat_caches(prompt_cache)
    for place, cache in zip(places, caches):
        flat[place.place] = cache
    parts = iter(flat)
    return [
        mlx_lm_cache.CacheList(*islice(parts, len(layer.caches)))
        if hasattr(layer, "caches")
        else next(parts)
        for layer in prompt_cache
    ]


def link_caches(cache: list[Any], link: Link) -> None:
    """Give the compressed caches of a prompt cache the link to their model."""
    layers = flat_caches(cache)
    for layer, reads in zip(layers, link.shared_reads or [0] * len(layers)):
        if isinstance(layer, TurboQuantKVCache):
            layer.link, layer.shared_reads = link, reads


def flat_caches(cache: list[Any]) -> list[Any]:
    """The caches of all layers, with those of a ``CacheList`` one by one."""
    return [part for layer in cache for part in getattr(layer, "caches", (layer,))]


def cut_back(cache: list[Any], tokens: int) -> bool:
    """Cut every layer back to its first ``tokens``; return whether that is possible."""
    if not mlx_lm_cache.can_trim_prompt_cache(cache):
        return False
    for layer in flat_caches(cache):
        layer.trim(max(layer.offset - tokens, 0))
    return True


def text_arguments(model: nn.Module) -> Any:
    """The configuration with the sizes: that of the model, or of the text model that it wraps.

    None for a model without one.
    """
    own = getattr(model, "args", None)
    wrapped = getattr(getattr(model, "language_model", None), "args", None)
    return own if wrapped is None or hasattr(own, "hidden_size") else wrapped


def check_compressible(model: nn.Module, compressible: list[Compressible]) -> None:
    """Raise ValueError if no cache of a model can be compressed."""
    if not compressible:
        names = ", ".join(sorted({type(cache).__name__ for cache in plain_caches(model)})) or "none"
        raise ValueError(
            f"No layer of this model can be compressed (its caches: {names}): "
            "use a model with plain KVCache layers."
        )
