"""Prompt-cache files: mlx-lm's own format, checked before and after mlx-lm reads it."""

import hashlib
import json
import os
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache

from .cache import TurboQuantKVCache
from .integration import connect, enabled_settings, plain_caches
from .latent_cache import TurboQuantLatentCache
from .storage import check_state, check_vectors

# Changes whenever the state of a cache is written in another way.
FORMAT_VERSION = "2"
# Changes whenever the same codes would mean something else.
CODEC_VERSION = "1"

_KNOWN_CACHES = {
    cache.__name__: cache
    for cache in (
        TurboQuantKVCache,
        TurboQuantLatentCache,
        mlx_lm_cache.ArraysCache,
        mlx_lm_cache.CacheList,
        mlx_lm_cache.ChunkedKVCache,
        mlx_lm_cache.KVCache,
        mlx_lm_cache.RotatingKVCache,
    )
}
# mlx-lm looks classes up by name in its own module.
mlx_lm_cache.TurboQuantKVCache = TurboQuantKVCache
mlx_lm_cache.TurboQuantLatentCache = TurboQuantLatentCache

# Bytes per element of the dtypes of safetensors that MLX reads.
_ITEM_SIZES = {"BOOL": 1, "I8": 1, "U8": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2} | {
    "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8
}  # fmt: skip
# A header has some hundred bytes an array; parsing one takes many times its size.
_MAX_HEADER_BYTES = 1 << 24
_MAX_DEPTH = 32
_NO_CHECKSUM = "00000000"
_CHUNK_BYTES = 1 << 20


def save_prompt_cache(
    file: str | Path,
    cache: list[Any],
    model: nn.Module,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Save a prompt cache, packed as it is, for :func:`load_prompt_cache` with the same model.

    The file is complete or not there: it is written to a temporary name and renamed. Returns its
    path, which ends in ".safetensors".

    Raises:
        ValueError: the folder does not exist, or the file does and is not a prompt cache of ours.
        OSError: the file cannot be written whole, for want of space for instance.
    """
    file = check_target(file)
    metadata = {
        **(metadata or {}),
        "format": FORMAT_VERSION,
        "codec": CODEC_VERSION,
        "seed": _seeds(cache),
        "fingerprint": fingerprint(model),
        "checksum": _NO_CHECKSUM,
    }
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}-") as folder:
        complete = Path(folder) / file.name
        try:
            mlx_lm_cache.save_prompt_cache(str(complete), cache, metadata)
            _write_checksum(complete)
        except (RuntimeError, ValueError) as error:
            raise OSError(f"{file} cannot be written whole: is there space for it?") from error
        os.replace(complete, file)
    return file


def load_prompt_cache(
    file: str | Path, model: nn.Module | None = None, return_metadata: bool = False
) -> list[Any] | tuple[list[Any], dict[str, str]]:
    """Load what :func:`save_prompt_cache` saved; with ``return_metadata`` also its metadata.

    The header, with the shapes of all arrays, is checked before anything is allocated.

    Raises:
        ValueError: not a prompt cache of this package, damaged, of another format or codec
            version, or of another model or seed than those of ``model``.
    """
    file = _safetensors(file)
    header = _header(file)
    saved = _saved_metadata(file, header)
    if model is not None:
        check_fingerprint(file, saved.get("fingerprint"), model)
    _check_names(file, header)
    if saved.get("checksum") != _checksum(file):
        raise _damaged(file, "its checksum is another one")
    try:
        cache, metadata = mlx_lm_cache.load_prompt_cache(str(file), return_metadata=True)
        seeds = _seeds(cache)
        for layer in cache:
            _check_plain(layer)
        mx.eval([layer.state for layer in cache])
    except Exception as error:
        raise _damaged(file, str(error)) from error
    if seeds != saved.get("seed"):
        raise _damaged(file, f"its caches have the seeds {seeds!r}, not {saved.get('seed')!r}")
    if model is not None:
        _check_model(file, cache, seeds, model)
        connect(model, cache)
    return (cache, metadata) if return_metadata else cache


def check_target(file: str | Path) -> Path:
    """The path that a prompt cache is saved at; ValueError if it cannot be saved there."""
    file = _safetensors(file)
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent} is not a folder: save to a folder that exists.")
    if file.exists() and "0.codec" not in _header(file)["__metadata__"]:
        raise ValueError(
            f"{file} exists and is not a prompt cache of mlx_turboquant: use another name."
        )
    return file


def check_fingerprint(file: str | Path, expected: str | None, model: nn.Module) -> None:
    """Raise ValueError unless ``expected``, of a saved cache, is the fingerprint of ``model``."""
    if expected != fingerprint(model):
        raise ValueError(
            f"{file} belongs to another model (fingerprint {str(expected)[:12]}, this model has "
            f"{fingerprint(model)[:12]}): load the model that it was made with."
        )


def fingerprint(model: nn.Module) -> str:
    """A hash of the model's configuration and of its vectors (norm weights and biases).

    The same for a model and its dequantized form, because vectors are not quantized.
    """
    digest = hashlib.sha256(repr(getattr(model, "args", type(model).__name__)).encode())
    for name, parameter in sorted(tree_flatten(model.parameters())):
        if parameter.ndim == 1:
            digest.update(name.encode())
            digest.update(bytes(memoryview(parameter.astype(mx.float32))))
    return digest.hexdigest()


def _safetensors(file: str | Path) -> Path:
    """The path with the ending that mlx expects."""
    file = Path(file)
    return file if file.suffix == ".safetensors" else file.with_name(file.name + ".safetensors")


def _damaged(file: Path, reason: str) -> ValueError:
    reason = " ".join(reason.split()).rstrip(".")
    return ValueError(f"{file} is damaged ({reason}): save it again.")


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file whose arrays lie in the file as the header says.

    Keys of the caller's metadata begin with "0." in "__metadata__", as mlx-lm writes them.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist: use a file that was saved.")
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{file} is not a complete safetensors file: use another one.")
        try:
            header = json.loads(content.read(length), object_pairs_hook=_unique)
            header.setdefault("__metadata__", {})
            _check_header(header, size - 8 - length)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{file} is not a complete safetensors file: use another one."
            ) from error
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text, unless a reader could choose between two values of a key."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("A key occurs twice.")
    return dict(pairs)


def _check_header(header: dict[str, Any], data_bytes: int) -> None:
    """Every array has the bytes of its shape, and together they are all bytes after the header."""
    if not all(isinstance(text, str) for text in header["__metadata__"].values()):
        raise ValueError("Metadata are strings.")
    arrays = [value for name, value in header.items() if name != "__metadata__"]
    end = 0
    for array in sorted(arrays, key=lambda array: array["data_offsets"]):
        sizes, (start, stop) = array["shape"], array["data_offsets"]
        if not all(type(size) is int and 0 <= size < 2**31 for size in (*sizes, len(sizes))):
            raise ValueError(f"A shape of {sizes} is not possible.")
        if start != end or stop - start != prod(sizes) * _ITEM_SIZES[array["dtype"]]:
            raise ValueError(f"An array from byte {start} to {stop} has the shape {sizes}.")
        end = stop
    if end != data_bytes:
        raise ValueError(f"There are {data_bytes} bytes, not {end}.")


def _saved_metadata(file: Path, header: dict[str, Any]) -> dict[str, str]:
    """The caller's metadata, of a file that this version can read."""
    texts = header["__metadata__"].items()
    saved = {key.removeprefix("0."): text for key, text in texts if key.startswith("0.")}
    if "codec" not in saved:
        raise ValueError(
            f"{file} is not a prompt cache of mlx_turboquant: use a file that it has saved."
        )
    for name, version in (("format", FORMAT_VERSION), ("codec", CODEC_VERSION)):
        if saved.get(name) != version:
            raise ValueError(
                f"{file} was written with {name} version {saved.get(name)}, this is version "
                f"{version}: process the prompt again."
            )
    return saved


def _check_names(file: Path, header: dict[str, Any]) -> None:
    """Refuse classes that are not caches, and lists with gaps, which mlx-lm would fill."""
    metadata = header["__metadata__"]
    classes = {text for key, text in metadata.items() if key.startswith("1.")}
    if unknown := classes - set(_KNOWN_CACHES):
        raise _damaged(file, f"{sorted(unknown)[0]!r} is not a kind of cache")
    layers = {name.split(".")[0] for name in header if name != "__metadata__"}
    if len(layers) != sum(key.startswith("1.") for key in metadata):
        raise _damaged(file, f"{len(layers)} layers and another number of kinds")
    for names in (metadata, [name for name in header if name != "__metadata__"]):
        _check_lists(file, names)


def _check_lists(file: Path, names: Iterable[str]) -> None:
    children = defaultdict(set)
    for name in names:
        *parents, child = name.split(".")
        if len(parents) > _MAX_DEPTH:
            raise _damaged(file, f"{len(parents)} nested lists")
        while True:
            children[tuple(parents)].add(child)
            if not parents:
                break
            *parents, child = parents
    for parent, keys in children.items():
        try:
            places = sorted(map(int, keys))
        except ValueError:
            continue  # a dictionary
        if places != list(range(len(places))):
            raise _damaged(file, f"a list, {'.'.join(parent)!r}, with gaps")


def _check_model(file: Path, cache: list[Any], seeds: str, model: nn.Module) -> None:
    expected = plain_caches(model)
    if len(cache) != len(expected):
        raise _damaged(file, f"{len(cache)} caches for {len(expected)} layers")
    settings = enabled_settings(model)
    if settings is not None and seeds not in ("", str(settings.get("seed", 0))):
        raise ValueError(
            f"{file} was saved with seed {seeds}, the model is enabled with seed "
            f"{settings.get('seed', 0)}: enable it with the seed of the file."
        )


def _seeds(caches: Iterable[Any]) -> str:
    """The seeds of the compressed caches among ``caches``, which are of known kinds."""
    seeds: set[str] = set()
    for cache in caches:
        if type(cache) not in _KNOWN_CACHES.values():
            raise ValueError(f"{type(cache).__name__} is not a kind of cache that is saved.")
        if isinstance(cache, TurboQuantKVCache):
            seeds.add(str(cache.seed))
        else:
            seeds.update(filter(None, _seeds(getattr(cache, "caches", ())).split(" ")))
    return " ".join(sorted(seeds))


def _check_plain(cache: Any) -> None:
    """Refuse a cache of mlx-lm whose numbers do not fit its arrays, which mlx-lm takes as it is."""
    if isinstance(cache, mlx_lm_cache.CacheList):
        for part in cache.caches:
            _check_plain(part)
    elif isinstance(cache, mlx_lm_cache.ArraysCache):
        *arrays, left_padding, lengths = (*cache.cache, cache.left_padding, cache.lengths)
        rows = {len(x) for x in (*arrays, left_padding, lengths) if x is not None}
        check_state(len(rows) < 2, "arrays of different batches")
    elif not isinstance(cache, TurboQuantKVCache):
        keys, values, *numbers = cache.state
        check_state(all(type(n) is int and n >= 0 for n in numbers), "a number is not one")
        held = 0 if keys is None else keys.shape[2]
        if keys is not None or values is not None:
            check_vectors(keys, held, keys)
            check_vectors(values, held, keys)
        if isinstance(cache, mlx_lm_cache.RotatingKVCache):
            most, tokens = min(cache.offset, cache.max_size), cache._idx
            check_state(cache.keep <= cache.max_size, "more to keep than there can be")
        else:
            most = tokens = cache.offset - getattr(cache, "start_position", 0)
        check_state(0 <= tokens <= held and most <= held, f"{tokens} tokens in {held} places")


def _write_checksum(file: Path) -> None:
    """Put the checksum in the place that the header of a new file has for it."""
    _header(file)
    checksum = _checksum(file)
    with file.open("r+b") as content:
        content.seek(_checksum_place(content.read(_header_end(file))))
        content.write(checksum.encode())
        content.flush()
        os.fsync(content.fileno())


def _checksum(file: Path) -> str:
    """CRC-32 of the whole file, with zeros in the place of the checksum itself."""
    with file.open("rb") as content:
        header = bytearray(content.read(_header_end(file)))
        place = _checksum_place(header)
        header[place : place + len(_NO_CHECKSUM)] = _NO_CHECKSUM.encode()
        checksum = zlib.crc32(header)
        while chunk := content.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"


def _header_end(file: Path) -> int:
    with file.open("rb") as content:
        return 8 + int.from_bytes(content.read(8), "little")


def _checksum_place(header: bytes) -> int:
    # Quotes inside a text are escaped, so that this is found in no other place.
    name = b'"0.checksum":"'
    return header.find(name) + len(name)
