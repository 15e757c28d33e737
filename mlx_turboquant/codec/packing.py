"""The storage layout of codes: bit planes in 32-bit words. Kernels follow this definition.

A code of b bits is cut into planes of 4, 2 and 1 bits, high bits first (3 = 2 + 1, 5 = 4 + 1,
6 = 4 + 2, 7 = 4 + 2 + 1, 8 = 4 + 4), so that no field straddles a word. A plane of p bits stores
32 / p consecutive coordinates in a word: coordinate 2j at bit j * p and coordinate 2j + 1 at bit
16 + j * p, so that ``(word >> j * p) & mask`` extracts two neighbours at once. Planes are stored
one after the other; the last word of each is padded with zeros.
"""

from functools import cache

import mlx.core as mx

from .constants import constant

# Widths of the planes in bits, by the number of bits of a code.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (4, 4)}


def words_per_vector(dim: int, bits: int) -> int:
    """The number of uint32 words that ``dim`` codes of ``bits`` bits take."""
    return sum(_words(dim, width) for width in PLANES[bits])


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes (..., dim), integers below 2**bits, into words: uint32 (..., words_per_vector)."""
    codes = codes.astype(mx.uint32)
    dim = codes.shape[-1]
    packed, remaining = [], bits
    for width in PLANES[bits]:
        remaining -= width
        per_word = 32 // width
        field = (codes >> remaining) & (2**width - 1)
        field = mx.pad(field, [(0, 0)] * (codes.ndim - 1) + [(0, -dim % per_word)])
        field = mx.unflatten(field, -1, (-1, per_word))
        packed.append((field << _shifts(width)).sum(axis=-1))
    return mx.concatenate(packed, axis=-1)


def unpack(words: mx.array, bits: int, dim: int) -> mx.array:
    """Unpack words, uint32 (..., words_per_vector), into codes: uint32 (..., dim)."""
    codes, start = None, 0
    for width in PLANES[bits]:
        stop = start + _words(dim, width)
        field = (words[..., start:stop, None] >> _shifts(width)) & (2**width - 1)
        field = field.flatten(-2)[..., :dim]
        codes = field if codes is None else (codes << width) | field
        start = stop
    return codes


def byte_order(dim: int) -> list[int]:
    """The coordinates of a vector of 4-bit codes in the order of its packed bytes.

    ``dim`` is a multiple of 8. A byte holds two codes, the lower four bits first.
    """
    in_word = [4 * (byte % 2) + 2 * high + byte // 2 for byte in range(4) for high in range(2)]
    return [start + place for start in range(0, dim, 8) for place in in_word]


def _words(dim: int, width: int) -> int:
    return -(-dim * width // 32)


@cache
def _shifts(width: int) -> mx.array:
    shifts = [j // 2 * width + j % 2 * 16 for j in range(32 // width)]
    return constant(mx.array(shifts, dtype=mx.uint32))
