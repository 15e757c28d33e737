"""Prompt-cache files in mlx-lm's own format, with checks of header, bytes and contents."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache

from .. import files
from ..cache.latent import TurboQuantLatentCache
from ..cache.single import TurboQuantKVCache
from ..codec.quantizer import CODEC_VERSION
from ..kernels.storage import check_state, check_vectors
from ..stored_arrays import Damaged, StoredArray, StoredFile, room_for_checksums
from .compressible import cut_back, flat_caches, plain_caches
from .compression import compression_of
from .identity import CHANGED, Weights, description

# Changes whenever the stored form of a cache's state changes.
FORMAT_VERSION = "7"

_MLX_LM_CACHES = (ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache)
_KNOWN_CACHES = (TurboQuantKVCache, TurboQuantLatentCache, *_MLX_LM_CACHES)
_CLASSES = {cache.__name__: cache for cache in _KNOWN_CACHES}
# How to read values that mlx-lm writes as arrays although they are none.
_SCALARS = {
    "scalar": mx.array.item,
    "string": lambda x: "".join(map(chr, x.tolist())),
    "none": lambda x: None,
}
# mlx-lm looks classes up by name in its own module.
mlx_lm_cache.TurboQuantKVCache = TurboQuantKVCache
mlx_lm_cache.TurboQuantLatentCache = TurboQuantLatentCache

_MAX_DEPTH = 32


def save_prompt_cache(
    file: str | Path, cache: list[Any], model: nn.Module, metadata: dict[str, str] | None = None
) -> Path:
    """Save a prompt cache, packed as it is, for :func:`load_prompt_cache` with the same model.

    The file is written atomically, under a temporary name that is then renamed. Returns its path,
    which ends in ".safetensors".

    Raises:
        ValueError: the folder does not exist, the file exists and is not a prompt cache, or the
            weights of the model have changed since the cache was made.
        OSError: the folder cannot be written to, or the file not completely, for example because
            the disk is full.
    """
    own = {"identity": identity_of(model, cache), "made_by": description(model)}
    return write_prompt_cache(file, cache, {**(metadata or {}), **own})


def identity_of(model: nn.Module, cache: list[Any]) -> str:
    """The identity of a model's weights, which must be those that ``cache`` was made with.

    Raises:
        ValueError: the weights of the model have changed since the cache was made.
    """
    identity = compression_of(model).weights().identity()
    links = {layer.link for layer in flat_caches(cache) if isinstance(layer, TurboQuantKVCache)}
    for weights in {link.weights for link in links} - {None}:
        if weights.identity() != identity:
            raise ValueError(CHANGED)
    return identity


def write_prompt_cache(file: str | Path, cache: list[Any], metadata: dict[str, str]) -> Path:
    """Write a cache to a file; ``metadata`` includes the identity of the weights."""
    file = check_target(file)
    own = {"format": FORMAT_VERSION, "codec": CODEC_VERSION, "seed": _seeds(cache)}
    nbytes = sum(_nbytes(part) for _, part in tree_flatten([layer.state for layer in cache]))
    own["checksums"] = room_for_checksums(nbytes)

    def write(path: Path) -> None:
        mlx_lm_cache.save_prompt_cache(str(path), cache, {**metadata, **own})
        if "key" in metadata or "chat" in metadata:  # of a prompt store, or a conversation
            path.chmod(0o600)

    files.write_whole(file, write)
    return file


def load_prompt_cache(
    file: str | Path,
    model: nn.Module | None = None,
    return_metadata: bool = False,
    tokens: int | None = None,
) -> list[Any] | tuple[list[Any], dict[str, str]]:
    """Load what :func:`save_prompt_cache` saved; with ``return_metadata`` also its metadata.

    The header, with the shapes of all arrays, is checked before anything is allocated. With
    ``tokens``, only the first tokens of a trimmable cache are loaded, and little more is read.

    Raises:
        ValueError: a file that is not a prompt cache, is damaged, or has another format or codec
            version; one of another model, or of another seed or codec than ``model`` is enabled
            with; or a cache that cannot be cut back to ``tokens``, which are at least 1.
        OSError: the file cannot be read.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"The first {tokens} tokens cannot be loaded alone: load 1 or more.")
    file = files.safetensors_path(file)
    with files.read_errors(file):
        stored = StoredFile(file)
    texts = stored.metadata.items()
    saved = {key.removeprefix("0."): text for key, text in texts if key.startswith("0.")}
    if "codec" not in saved:
        raise ValueError(
            f"{file} is not a prompt cache of mlx_turboquant: use a file that it has saved."
        )
    versions = {"format": FORMAT_VERSION, "codec": CODEC_VERSION}
    files.check_versions(file, saved, versions, "prefill the prompt again")
    if model is not None:
        check_identity(file, saved, model)
    _check_names(file, stored)
    try:
        cache = _caches(stored, tokens)
        seeds = _seeds(cache)
        for part in _with_parts(cache):
            _check_plain(part)
        mx.eval([layer.state for layer in cache])
    except (OSError, Damaged):
        raise
    except Exception as error:
        raise Damaged(file, str(error)) from error
    if seeds != saved.get("seed"):
        raise Damaged(file, f"its caches have the seeds {seeds!r}, not {saved.get('seed')!r}")
    # Some caches could not be cut back before they were loaded.
    if tokens is not None and not cut_back(cache, tokens):
        raise ValueError(f"{file} cannot be cut back to {tokens} tokens: load all of it.")
    if model is not None:
        _check_model(file, cache, model)
        compression_of(model).connect(cache)
    else:
        for layer in flat_caches(cache):
            if isinstance(layer, TurboQuantKVCache):
                layer.link.weights = Weights(None, saved.get("identity", ""))
    return (cache, saved) if return_metadata else cache


def check_target(file: str | Path) -> Path:
    """The path to save a prompt cache at; ValueError or OSError if it cannot be saved there."""
    return files.check_target(file, "0.codec", "prompt cache")


def check_identity(file: str | Path, saved: dict[str, str], model: nn.Module) -> None:
    """Raise ValueError unless a cache with this metadata was made with the weights of ``model``."""
    found, own = saved.get("identity"), compression_of(model).weights().identity()
    if found != own:
        raise ValueError(
            f"{file} belongs to another model ({saved.get('made_by')}, weights {str(found)[:12]}; "
            f"this is {description(model)}, weights {own[:12]}): load the model that it was made "
            "by, with the same adapters and precision."
        )


def _nbytes(part: Any) -> int:
    """The most bytes that a part of a state takes in a file."""
    if isinstance(part, mx.array):
        return part.nbytes
    return 4 * len(part) if isinstance(part, str) else 8


def _caches(stored: StoredFile, tokens: int | None) -> list[Any]:
    """The caches of a file, as mlx-lm makes them, or those of their first ``tokens``."""
    _, classes, scalars = tree_unflatten(list(stored.metadata.items()))
    parts: dict[str, Any] = dict(stored.arrays)
    kinds = {place: _SCALARS[kind] for place, kind in scalars[1:]}
    # Everything at once, or only the numbers: they tell what the first tokens need.
    first = parts if tokens is None else kinds
    parts |= dict(zip(first, stored.load([parts[place] for place in first])))
    parts |= {place: kind(parts[place]) for place, kind in kinds.items()}
    states = tree_unflatten(list(parts.items()))
    if tokens is not None:
        states = [_beginning(kind, state, tokens) for kind, state in zip(classes, states)]
    wanted = [x for _, x in tree_flatten(states) if isinstance(x, StoredArray)]
    loaded = dict(zip(map(id, wanted), stored.load(wanted)))
    states = tree_map(lambda x: loaded.get(id(x), x), states)
    return [_CLASSES[kind].from_state(state) for kind, state in zip(classes, states)]


def _beginning(kind: str, state: Any, tokens: int) -> Any:
    """The state of a cache of a class, cut back to its first tokens if that saves reading."""
    if kind == CacheList.__name__:
        return [(_beginning(kind, part, tokens), kind) for part, kind in state]
    if kind == KVCache.__name__:
        keys, values, offset = state
        return keys[:, :, :tokens], values[:, :, :tokens], min(offset, tokens)
    if issubclass(_CLASSES[kind], TurboQuantKVCache):
        return _CLASSES[kind].beginning(state, tokens)
    return state


def _check_names(file: Path, stored: StoredFile) -> None:
    """Refuse classes that are not caches, and lists that lack entries, which would be filled in."""
    classes = {text for key, text in stored.metadata.items() if key.startswith("1.")}
    if unknown := classes - set(_CLASSES):
        raise Damaged(file, f"{sorted(unknown)[0]!r} is not a kind of cache")
    layers = {name.split(".")[0] for name in stored.arrays}
    if len(layers) != sum(key.startswith("1.") for key in stored.metadata):
        raise Damaged(file, f"{len(layers)} layers do not match the number of classes")
    _check_lists(file, stored.metadata)
    _check_lists(file, stored.arrays)


def _check_lists(file: Path, names: Iterable[str]) -> None:
    children = defaultdict(set)
    for name in names:
        parts = tuple(name.split("."))
        if len(parts) - 1 > _MAX_DEPTH:
            raise Damaged(file, f"{len(parts) - 1} nested lists")
        for depth, part in enumerate(parts):
            children[parts[:depth]].add(part)
    for parent, keys in children.items():
        try:
            places = sorted(map(int, keys))
        except ValueError:
            continue  # a dictionary
        if places != list(range(len(places))):
            raise Damaged(file, f"the list {'.'.join(parent)!r} lacks entries")


def _check_model(file: Path, cache: list[Any], model: nn.Module) -> None:
    expected = plain_caches(model)
    if len(cache) != len(expected):
        raise Damaged(file, f"{len(cache)} caches for {len(expected)} layers")
    settings = compression_of(model).settings
    for part in _with_parts(cache) if settings is not None else ():
        for name in ("seed", "codec") if isinstance(part, TurboQuantKVCache) else ():
            saved, own = getattr(part, name), getattr(settings, name)
            if saved != own:
                raise ValueError(
                    f"{file} was saved with {name} {saved}, the model is enabled with {name} "
                    f"{own}: enable it with the {name} of the file."
                )


def _seeds(caches: Iterable[Any]) -> str:
    """The seeds of the compressed caches; ValueError for a class that cannot be saved."""
    seeds: set[str] = set()
    for cache in _with_parts(caches):
        if type(cache) not in _KNOWN_CACHES:
            raise ValueError(f"{type(cache).__name__} is not a kind of cache that is saved.")
        if isinstance(cache, TurboQuantKVCache):
            seeds.add(str(cache.seed))
    return " ".join(sorted(seeds))


def _with_parts(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches, each ``CacheList`` followed by its parts."""
    for cache in caches:
        yield cache
        if type(cache) is CacheList:
            yield from _with_parts(cache.caches)


def _check_plain(cache: Any) -> None:
    """Refuse a cache of mlx-lm whose numbers do not fit its arrays; mlx-lm does not check this."""
    if isinstance(cache, ArraysCache):
        *arrays, left_padding, lengths = (*cache.cache, cache.left_padding, cache.lengths)
        rows = {len(x) for x in (*arrays, left_padding, lengths) if x is not None}
        check_state(len(rows) < 2, "arrays of different batches")
    elif not isinstance(cache, (TurboQuantKVCache, CacheList)):
        keys, values, *numbers = cache.state
        check_state(all(type(n) is int and n >= 0 for n in numbers), "a number is invalid")
        held = 0 if keys is None else keys.shape[2]
        if keys is not None or values is not None:
            check_vectors(keys, held, keys)
            check_vectors(values, held, keys)
        if isinstance(cache, RotatingKVCache):
            most, tokens = min(cache.offset, cache.max_size), cache._idx
            check_state(cache.keep <= cache.max_size, "it keeps more tokens than it can hold")
        else:
            most = tokens = cache.offset - getattr(cache, "start_position", 0)
        check_state(0 <= tokens <= held and most <= held, f"{tokens} tokens in {held} places")
