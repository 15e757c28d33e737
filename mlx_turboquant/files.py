"""Files that are written whole: JSON, and arrays in the safetensors format, checked when read."""

import json
import os
import tempfile
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

# Bytes per element of the dtypes of safetensors that MLX reads.
_ITEM_SIZES = {"BOOL": 1, "I8": 1, "U8": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2} | {
    "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8
}  # fmt: skip
# A header has about a hundred bytes for each array; parsing takes many times its size in memory.
_MAX_HEADER_BYTES = 1 << 24
# What stands in the metadata of a file until its checksum is known.
NO_CHECKSUM = "00000000"
_CHUNK_BYTES = 1 << 20


def safetensors_path(file: str | Path) -> Path:
    """The path with the ending ".safetensors", which mlx expects."""
    file = Path(file)
    return file if file.suffix == ".safetensors" else file.with_name(file.name + ".safetensors")


def damaged(file: Path, reason: str) -> ValueError:
    """The error of a file that is not as it was saved."""
    reason = " ".join(reason.split()).rstrip(".")
    return ValueError(f"{file} is damaged ({reason}): save it again.")


def write_whole(file: Path, write: Callable[[Path], None], key: str) -> None:
    """Write ``file`` so that it is complete or not there: to a temporary name, then renamed.

    ``write`` makes a safetensors file with ``NO_CHECKSUM`` under ``key`` of its metadata, which
    becomes its checksum.

    Raises:
        OSError: the file cannot be written whole, for want of space for instance.
    """
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}-") as folder:
        complete = Path(folder) / file.name
        try:
            write(complete)
            read_header(complete)
            crc = checksum(complete, key)
            with complete.open("r+b") as content:
                content.seek(_checksum_place(_header_bytes(content), key))
                content.write(crc.encode())
                content.flush()
                os.fsync(content.fileno())
        except (RuntimeError, ValueError) as error:
            raise OSError(f"{file} cannot be written whole: is there space for it?") from error
        os.replace(complete, file)


def write_json(file: Path, contents: dict[str, Any]) -> None:
    """Write ``file`` so that it is complete or not there; its folder is made where there is none.

    Raises:
        OSError: the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}-") as folder:
        complete = Path(folder) / file.name
        complete.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        os.replace(complete, file)


def check_target(file: str | Path, key: str, what: str) -> Path:
    """The path that a file is saved at; ValueError if it cannot be saved there.

    A file that is there already must have ``key`` in its metadata, which says that this package
    wrote it; ``what`` is what the message calls such a file.
    """
    file = safetensors_path(file)
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent} is not a folder: save to a folder that exists.")
    if file.exists() and key not in read_header(file)["__metadata__"]:
        raise ValueError(f"{file} exists and is not a {what} of mlx_turboquant: use another name.")
    return file


def check_versions(
    file: Path, saved: dict[str, str], versions: dict[str, str], remedy: str
) -> None:
    """Raise ValueError unless the metadata of a file name the ``versions`` of this package."""
    for name, version in versions.items():
        if saved.get(name) != version:
            raise ValueError(
                f"{file} was written with {name} version {saved.get(name)}, this is version "
                f"{version}: {remedy}."
            )


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, which is checked to describe all bytes of the file.

    It has the dtype, shape and offsets of each array by its name, and strings in "__metadata__".

    Raises:
        ValueError: the file does not exist, is not a safetensors file or is not complete.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist: use a file that was saved.")
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        try:
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError("The header is longer than the file.")
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


def checksum(file: Path, key: str) -> str:
    """CRC-32 of the whole file in hexadecimal, read with zeros in place of the checksum itself.

    ``key`` is the name of the checksum in the metadata.
    """
    with file.open("rb") as content:
        header = bytearray(_header_bytes(content))
        place = _checksum_place(header, key)
        header[place : place + len(NO_CHECKSUM)] = NO_CHECKSUM.encode()
        crc = zlib.crc32(header)
        while chunk := content.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _header_bytes(content: BinaryIO) -> bytes:
    length = content.read(8)
    return length + content.read(int.from_bytes(length, "little"))


def _checksum_place(header: bytes, key: str) -> int:
    # Quotes inside a text are escaped, so that this is found in no other place.
    name = f'"{key}":"'.encode()
    return header.find(name) + len(name)
