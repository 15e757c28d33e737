"""Arrays in safetensors files, which are checked while they are read.

The "checksums" in the metadata of a file are CRC-32 in hexadecimal: first that of the header, then
one for each piece of ``PIECE_BYTES`` after it. Part of an array can thus be read and checked alone.
"""

import json
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

PIECE_BYTES = 1 << 18
# More threads would wait for each other.
_THREADS = 8
# The safetensors dtypes that MLX reads. NumPy has no bfloat16, so uint16 takes its place.
_DTYPES = {"BOOL": mx.bool_, "U8": mx.uint8, "I8": mx.int8, "U16": mx.uint16, "I16": mx.int16} | {
    "U32": mx.uint32, "I32": mx.int32, "U64": mx.uint64, "I64": mx.int64, "BF16": mx.uint16
} | {"F16": mx.float16, "F32": mx.float32, "F64": mx.float64, "C64": mx.complex64}  # fmt: skip
# A header has about 100 bytes per array; parsing it takes many times its size in memory.
_MAX_HEADER_BYTES = 1 << 24
_CHECKSUM_DIGITS = 8


@dataclass(frozen=True)
class StoredArray:
    """An array in a file, or its beginning along the third axis.

    Its bytes are ``rows`` runs that start ``stride`` bytes apart. The first starts ``start`` bytes
    after the header.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    rows: int = 1
    stride: int = 0

    def __getitem__(self, index: tuple[slice, slice, slice]) -> "StoredArray":
        """The beginning ``array[:, :, :count]``."""
        batch, heads, length, *rest = self.shape
        count = len(range(length)[index[2]])
        stride = self.stride or prod((length, *rest)) * _DTYPES[self.dtype].size
        shape = (batch, heads, count, *rest)
        return replace(self, shape=shape, rows=batch * heads, stride=stride)


class StoredFile:
    """A safetensors file of which only the header is read: ``metadata``, and ``arrays`` by name.

    The header must describe all bytes of the file.

    Raises:
        ValueError: the file does not exist, is not a safetensors file or is not complete.
    """

    def __init__(self, file: Path):
        self._file = file
        self._raw, header = _read_header(file)
        self.metadata: dict[str, str] = header.pop("__metadata__")
        self.arrays = {
            name: StoredArray(array["dtype"], tuple(array["shape"]), array["data_offsets"][0])
            for name, array in header.items()
        }
        start, stop = _checksums_span(self._raw)
        self._checksums = self._raw[start:stop]

    def load(self, arrays: Sequence[StoredArray]) -> list[mx.array]:
        """Read some of the arrays, or beginnings of arrays.

        Raises:
            ValueError: the header or a piece does not match its checksum.
            OSError: the file cannot be read.
        """
        place, _ = _checksums_span(self._raw)
        # The checksum of the header was taken with zeros in its own place.
        zeros = b"0" * _CHECKSUM_DIGITS
        self._check(0, self._raw[:place] + zeros + self._raw[place + _CHECKSUM_DIGITS :])
        loaded = [mx.zeros(array.shape, _DTYPES[array.dtype]) for array in arrays]
        mx.eval(loaded)
        # NumPy can write to the memory of evaluated arrays.
        contents = [np.asarray(x).reshape(-1).view(np.uint8) for x in loaded]
        pieces = defaultdict(list)
        for start, part in _parts(arrays, contents):
            pieces[start // PIECE_BYTES].append((start % PIECE_BYTES, part))
        with self._file.open("rb") as file, ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(partial(self._read_piece, file.fileno()), pieces, pieces.values()))
        dtypes = (mx.bfloat16 if a.dtype == "BF16" else _DTYPES[a.dtype] for a in arrays)
        return [x.view(dtype) for x, dtype in zip(loaded, dtypes)]

    def _read_piece(
        self, descriptor: int, number: int, parts: list[tuple[int, np.ndarray]]
    ) -> None:
        """Check a piece of the file, and copy the parts that begin at these bytes of it."""
        offset = len(self._raw) + number * PIECE_BYTES
        piece = np.frombuffer(os.pread(descriptor, PIECE_BYTES, offset), np.uint8)
        self._check(1 + number, piece)
        for start, part in parts:
            part[:] = piece[start : start + len(part)]

    def _check(self, number: int, content: Any) -> None:
        """Raise ValueError unless this is the content of the header (number 0) or a piece."""
        place = _CHECKSUM_DIGITS * number
        if _checksum(content) != self._checksums[place : place + _CHECKSUM_DIGITS]:
            raise Damaged(self._file, "its checksum does not match")


def room_for_checksums(nbytes: int) -> str:
    """A placeholder for the checksums of a file of at most ``nbytes``, for :func:`seal`."""
    return "0" * _CHECKSUM_DIGITS * (1 + -(-nbytes // PIECE_BYTES))


def seal(file: Path) -> None:
    """Replace the placeholder in a file's metadata by the checksums."""
    with file.open("r+b") as content:
        header = bytearray(_header_bytes(content))
        place = first = _checksums_span(header)[0]
        while piece := content.read(PIECE_BYTES):
            place += _CHECKSUM_DIGITS
            header[place : place + _CHECKSUM_DIGITS] = _checksum(piece)
        header[first : first + _CHECKSUM_DIGITS] = _checksum(header)
        content.seek(0)
        content.write(header)
        content.flush()
        os.fsync(content.fileno())


class Damaged(ValueError):
    """A file differs from what was saved, for the given reason."""

    def __init__(self, file: Path, reason: str):
        reason = " ".join(reason.split()).rstrip(".")
        super().__init__(f"{file} is damaged ({reason}): save it again.")


def _read_header(file: Path) -> tuple[bytes, dict[str, Any]]:
    """All bytes before the arrays, and the header that they encode.

    It maps array names to dtype, shape and offsets, and "__metadata__" to a dictionary of strings.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist: use a file that was saved.")
    size = file.stat().st_size
    with file.open("rb") as content:
        try:
            length = int.from_bytes(content.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError("The header is longer than the file.")
            content.seek(0)
            raw = _header_bytes(content)
            header = json.loads(raw[8:], object_pairs_hook=_unique)
            header.setdefault("__metadata__", {})
            _check_header(header, size - len(raw))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{file} is not a complete safetensors file: use another one."
            ) from error
    return raw, header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dictionary; ValueError for a repeated key, whose value is ambiguous."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("A key occurs twice.")
    return dict(pairs)


def _check_header(header: dict[str, Any], data_bytes: int) -> None:
    """Check that each array has the bytes of its shape and that all together fill the file."""
    if not all(isinstance(text, str) for text in header["__metadata__"].values()):
        raise ValueError("Metadata are strings.")
    arrays = [value for name, value in header.items() if name != "__metadata__"]
    end = 0
    for array in sorted(arrays, key=lambda array: array["data_offsets"]):
        sizes, (start, stop) = array["shape"], array["data_offsets"]
        if not all(type(size) is int and 0 <= size < 2**31 for size in (*sizes, len(sizes))):
            raise ValueError(f"A shape of {sizes} is not possible.")
        item_bytes = _DTYPES[array["dtype"]].size
        if start != end or stop - start != prod(sizes) * item_bytes:
            raise ValueError(f"An array from byte {start} to {stop} has the shape {sizes}.")
        end = stop
    if end != data_bytes:
        raise ValueError(f"There are {data_bytes} bytes, not {end}.")


def _parts(
    arrays: Sequence[StoredArray], contents: Sequence[np.ndarray]
) -> Iterator[tuple[int, np.ndarray]]:
    """The start and the destination of each run of bytes, split where a piece ends."""
    for array, content in zip(arrays, contents):
        for row, part in enumerate(np.split(content, array.rows)):
            start = array.start + row * array.stride
            while len(part):
                count = PIECE_BYTES - start % PIECE_BYTES
                yield start, part[:count]
                start, part = start + count, part[count:]


def _header_bytes(content: BinaryIO) -> bytes:
    length = content.read(8)
    return length + content.read(int.from_bytes(length, "little"))


def _checksum(content: Any) -> bytes:
    return f"{zlib.crc32(content):08x}".encode()


def _checksums_span(header: bytes) -> tuple[int, int]:
    """Where the checksums are in a header; mlx-lm writes metadata of the caller with a "0."."""
    # Quotes inside a string are escaped, so this occurs in no other place.
    found = re.search(rb'"(?:0\.)?checksums":"([0-9a-f]*)"', header)
    return found.span(1) if found else (0, 0)
