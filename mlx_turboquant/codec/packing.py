"""The storage layout of codes: bit planes in 32-bit words. Kernels follow this definition.

Codes of 32 consecutive coordinates, a run, take as many words as a code has bits. A code of b bits
is cut into planes of 4, 2 and 1 bits, high bits first (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2,
7 = 4 + 2 + 1, 8 = 4 + 4), so that no field straddles a word. A plane of p bits stores 32 / p
consecutive coordinates of a run in a word: coordinate 2j at bit j * p and coordinate 2j + 1 at bit
16 + j * p, so that ``(word >> j * p) & mask`` extracts two neighbours at once. The planes of a run
are stored one after the other. If the last run is shorter, the last word of each of its planes is
padded with zeros.

Bits may differ between the four eighths of coordinates of a run, as in (4, 3, 3, 2). A plane then
has only the eight coordinates of those that have it, and the next plane begins behind them, within
the same word. Such a run takes as many words as its mean bits.
"""

from functools import cache
from typing import NamedTuple

import mlx.core as mx

from .constants import constant

# Coordinates of a run, and of its parts whose bits may differ.
RUN, EIGHT = 32, 8
# Widths of the planes in bits, by the number of bits of a code.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (4, 4)}
# Bits of all codes, or those of the four eights of a run.
Bits = int | tuple[int, ...]


def words_per_vector(dim: int, bits: Bits) -> int:
    """The number of uint32 words that ``dim`` codes of ``bits`` bits take.

    Raises:
        ValueError: bits that differ within a run, in a dimension that is no multiple of 32.
    """
    if isinstance(bits, int):
        return dim // RUN * bits + sum(_words(dim % RUN, width) for width in PLANES[bits])
    if dim % RUN:
        raise ValueError(f"Bits {bits} do not fit {dim} codes: use a multiple of {RUN} codes.")
    return dim // RUN * sum(bits) // len(bits)


def pack(codes: mx.array, bits: Bits) -> mx.array:
    """Pack codes (..., dim), integers below 2**bits, into words: uint32 (..., words_per_vector)."""
    codes = codes.astype(mx.uint32)
    whole = codes.shape[-1] // RUN * RUN
    runs = mx.unflatten(codes[..., :whole], -1, (whole // RUN, RUN))
    if not isinstance(bits, int):
        return _packed_eights(runs, bits).flatten(-2)
    words = _packed_run(runs, bits).flatten(-2)
    if whole == codes.shape[-1]:
        return words
    return mx.concatenate([words, _packed_run(codes[..., whole:], bits)], axis=-1)


def _packed_run(codes: mx.array, bits: int) -> mx.array:
    """The words of codes (..., count) of a run."""
    packed, remaining = [], bits
    for width in PLANES[bits]:
        remaining -= width
        per_word = 32 // width
        field = (codes >> remaining) & (2**width - 1)
        field = mx.pad(field, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_word)])
        field = mx.unflatten(field, -1, (-1, per_word))
        packed.append((field << _shifts(width)).sum(axis=-1))
    return mx.concatenate(packed, axis=-1)


def _packed_eights(codes: mx.array, bits: tuple[int, ...]) -> mx.array:
    """The words of codes (..., 32) of a run whose eights have different bits."""
    words = [mx.zeros(codes.shape[:-1], mx.uint32)] * (sum(bits) // len(bits))
    for eight, width, remaining, word, shift in _fields(bits):
        own = codes[..., eight * EIGHT : (eight + 1) * EIGHT]
        field = (own >> remaining) & (2**width - 1)
        words[word] = words[word] | (field << (_shifts(width)[:EIGHT] + shift)).sum(axis=-1)
    return mx.stack(words, axis=-1)


def unpack(words: mx.array, bits: Bits, dim: int) -> mx.array:
    """Unpack words, uint32 (..., words_per_vector), into codes: uint32 (..., dim)."""
    whole = dim // RUN
    if not isinstance(bits, int):
        runs = mx.unflatten(words, -1, (whole, -1))
        return _codes_of_eights(runs, bits).flatten(-2)
    runs = mx.unflatten(words[..., : whole * bits], -1, (whole, bits))
    codes = _codes_of_run(runs, bits, RUN).flatten(-2)
    if whole * RUN == dim:
        return codes
    rest = _codes_of_run(words[..., whole * bits :], bits, dim % RUN)
    return mx.concatenate([codes, rest], axis=-1)


def _codes_of_run(words: mx.array, bits: int, count: int) -> mx.array:
    """The codes (..., count) of the words of a run."""
    codes, start = None, 0
    for width in PLANES[bits]:
        stop = start + _words(count, width)
        field = (words[..., start:stop, None] >> _shifts(width)) & (2**width - 1)
        field = field.flatten(-2)[..., :count]
        codes = field if codes is None else (codes << width) | field
        start = stop
    return codes


def _codes_of_eights(words: mx.array, bits: tuple[int, ...]) -> mx.array:
    """The codes (..., 32) of the words of a run whose eights have different bits."""
    codes = [mx.zeros((*words.shape[:-1], EIGHT), mx.uint32)] * len(bits)
    for eight, width, remaining, word, shift in _fields(bits):
        field = (words[..., word, None] >> (_shifts(width)[:EIGHT] + shift)) & (2**width - 1)
        codes[eight] = codes[eight] | (field << remaining)
    return mx.concatenate(codes, axis=-1)


class _Field(NamedTuple):
    """Where a plane of eight coordinates lies: its word in a run, and its shift there.

    ``remaining`` are the bits of a code below those of the plane.
    """

    eight: int
    width: int
    remaining: int
    word: int
    shift: int


@cache
def _fields(bits: tuple[int, ...]) -> list[_Field]:
    fields, start = [], 0
    left = [PLANES.get(own, ()) for own in bits]
    # A code of 8 bits has two planes of 4.
    for width in (4, 4, 2, 1):
        for eight, widths in enumerate(left):
            if width in widths[:1]:
                left[eight] = widths[1:]
                fields.append(_Field(eight, width, sum(widths[1:]), start // 16, start % 16))
                # A half of the word has four of the eight coordinates.
                start += 4 * width
    return fields


def byte_order(dim: int) -> list[int]:
    """The coordinates of a vector of 4-bit codes in the order of its packed bytes.

    ``dim`` is a multiple of 8. A byte holds two codes, the lower four bits first.
    """
    in_word = [4 * (byte % 2) + 2 * high + byte // 2 for byte in range(4) for high in range(2)]
    return [start + place for start in range(0, dim, 8) for place in in_word]


def _words(count: int, width: int) -> int:
    return -(-count * width // 32)


@cache
def _shifts(width: int) -> mx.array:
    shifts = [j // 2 * width + j % 2 * 16 for j in range(32 // width)]
    return constant(mx.array(shifts, dtype=mx.uint32))
