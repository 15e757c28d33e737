"""Trellis codes: levels from a window of the code stream, and the search for the best stream.

A code of b bits has 2^b levels of its own in a scalar codec. Here the level of a coordinate is the
entry of a table at the last 8 bits of a stream, of which the last b are its code and the others
belong to the coordinates before it. So the same bits choose among 256 levels (trellis-coded
quantization, Marcellin and Fischer, 1990; with tables as in QTIP, arXiv 2406.11235). An encoder has
to look ahead: Viterbi's algorithm finds the stream of least squared error. A stream is a vector, in
the order of its coordinates, and zeros stand before it.

The first bit of a stream is the highest of its first word. The last word is filled with zeros.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import mlx.core as mx
import numpy as np

from .codebook import relative_error as scalar_error
from .constants import constant
from .packing import EIGHT, RUN, Bits, words_per_vector

WINDOW = 8
# The most bits of all coordinates, and the most of those that have more than the mean.
MOST_BITS, MOST_SINGLE_BITS = 4, 7
# Coordinates of vectors that are searched at once, each with a kilobyte of costs.
_AT_ONCE = 1 << 17


@cache
def _tables() -> dict[int, tuple[float, mx.array]]:
    """Squared error and levels, float32 (256,), by bits.

    Raises:
        ValueError: the file of the tables is damaged.
    """
    file = files(__package__) / "trellis_tables.json"
    try:
        saved = {int(bits): each for bits, each in json.loads(file.read_text()).items()}
        for bits in range(1, MOST_SINGLE_BITS + 1):
            each = saved[bits]
            found = checksum(bits, each["squared_error"], each["levels"])
            if found != each["sha256"]:
                raise ValueError(f"that of {bits} bits has another checksum")
        return {
            bits: (each["squared_error"], constant(np.array(each["levels"].split(), np.float32)))
            for bits, each in saved.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"The tables of trellis codes in {file} are damaged ({error}): "
            "install mlx_turboquant again."
        ) from error


def checksum(bits: int, squared_error: float, levels: str) -> str:
    """The SHA-256 of a table."""
    return hashlib.sha256(f"{bits} {squared_error} {levels}".encode()).hexdigest()


def table(bits: int) -> mx.array:
    """The levels of all windows whose last ``bits`` bits are new, 1 to 7: float32 (256,).

    Levels have the unit of :mod:`.codebook`, one standard deviation.
    """
    return _tables()[bits][1]


@cache
def relative_error(dim: int, bits: int) -> float:
    """D(b): the mean squared error of a unit vector of ``dim`` values at ``bits`` bits.

    It was measured in vectors of 128 Gaussian values. Tables have up to 7 bits; 8 are scalar.
    """
    return _tables()[bits][0] if bits <= MOST_SINGLE_BITS else scalar_error(dim, bits)


def levels(bits: int, windows: mx.array) -> mx.array:
    """The levels of windows in float32; zeros without bits."""
    if bits == 0:
        return mx.zeros(windows.shape)
    # Nine times faster than mx.take on a CPU.
    return mx.take_along_axis(table(bits), windows.flatten(), axis=-1).reshape(windows.shape)


def best_windows(y: mx.array, bits: tuple[int, ...], weights: mx.array) -> mx.array:
    """The windows of the streams of least squared error for y (n, dim): uint32 (n, dim).

    ``y`` are float32 values of unit variance with ``bits`` each, and ``weights`` (n, dim) say how
    much their errors count.
    """
    tables = [table(own) if own else None for own in bits]
    found, count = [], max(1, _AT_ONCE // len(bits))
    for at in range(0, len(y), count):
        part, counts = y[at : at + count], weights[at : at + count]
        costs = search(part, bits, counts, tables, mx.zeros((len(part), 1), mx.uint32))
        found.append(follow(costs, bits, costs[-1].argmin(axis=1)))
    return mx.concatenate(found)


def search(
    y: mx.array,
    bits: Sequence[int],
    weights: mx.array,
    tables: Sequence[mx.array | None],
    start: mx.array,
) -> list[mx.array]:
    """The costs of all windows, float32 (n, windows), before each coordinate and after the last.

    The cost of a window is the error of the best stream that ends with it, behind the window
    ``start`` (n, 1). ``tables`` have the levels of all windows for each coordinate with bits.
    """
    states = next(len(each) for each in tables if each is not None)
    costs = [mx.where(mx.arange(states) == start, mx.zeros(start.shape), _UNREACHED)]
    for i, own in enumerate(bits):
        cost = costs[-1]
        if own:
            # The last bits of a window are the first ones of the next.
            least = cost.reshape(len(y), 1 << own, states >> own).min(axis=1)
            cost = _with_errors(least, y[:, i, None], weights[:, i, None], tables[i])
        costs.append(cost)
    return costs


def follow(costs: list[mx.array], bits: Sequence[int], last: mx.array) -> mx.array:
    """The windows (n, dim) of the best stream that ends with the window ``last`` (n,)."""
    found = []
    for own, cost in zip(reversed(bits), costs[-2::-1]):
        found.append(last)
        if own:
            rest, before = last >> own, cost.reshape(len(cost), 1 << own, -1)
            first = mx.take_along_axis(before, rest[:, None, None], axis=2).argmin(axis=1)[:, 0]
            last = first * before.shape[2] + rest
    return mx.stack(found[::-1], axis=1)


# More than the error of any stream.
_UNREACHED = 1e30


@mx.compile
def _with_errors(cost: mx.array, y: mx.array, weight: mx.array, levels: mx.array) -> mx.array:
    """The costs (n, windows) after those before (n, m), each of which windows / m follow."""
    errors = mx.square(y - levels).reshape(len(y), cost.shape[1], -1)
    return (cost[..., None] + weight[..., None] * errors).reshape(len(y), -1)


def coordinate_bits(bits: Bits, dim: int) -> tuple[int, ...]:
    """The bits of each of ``dim`` coordinates."""
    if isinstance(bits, int):
        return (bits,) * dim
    return tuple(own for own in bits for _ in range(EIGHT)) * (dim // RUN)


def pack(windows: mx.array, bits: Bits) -> mx.array:
    """Pack the windows (..., dim) of streams into words: uint32 (..., words_per_vector)."""
    dim = windows.shape[-1]
    single = (windows[..., None].astype(mx.uint32) >> _FALLING[-WINDOW:]) & 1
    stream = single.flatten(-2)[..., _new_bits(coordinate_bits(bits, dim))]
    rest = 32 * words_per_vector(dim, bits) - stream.shape[-1]
    stream = mx.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, rest)])
    return (mx.unflatten(stream, -1, (-1, 32)) << _FALLING).sum(axis=-1)


def unpack(words: mx.array, bits: Bits, dim: int) -> mx.array:
    """The windows of streams in words, uint32 (..., words_per_vector): uint8 (..., dim)."""
    eights = (bits,) if isinstance(bits, int) else bits
    # Eight codes are whole bytes, so that runs of eights begin ``step`` bytes apart.
    step, count = sum(eights), -(-dim // (EIGHT * len(eights)))
    stream = ((words[..., None] >> _FALLING[7::8]) & 255).flatten(-2)
    # A byte of zeros stands before the stream.
    rest = max(count * step - stream.shape[-1], 0)
    stream = mx.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(1, rest)])
    windows, first = [], 0
    for own in eights:
        codes = mx.zeros((), mx.uint32 if own < 4 else mx.uint64)
        for i in range(first, first + own + 1):
            codes = (codes << 8) | stream[..., i::step][..., :count]
        windows.append((codes[..., None] >> (own * _FALLING[-EIGHT:])).astype(mx.uint8))
        first += own
    return mx.stack(windows, axis=-2).flatten(-3)[..., :dim]


_FALLING = constant(np.arange(31, -1, -1, dtype=np.uint32))


@cache
def _new_bits(bits: tuple[int, ...]) -> mx.array:
    """Where the bits of a stream are among all bits of its windows."""
    places = (range(WINDOW * (i + 1) - own, WINDOW * (i + 1)) for i, own in enumerate(bits))
    return constant(np.concatenate([np.array(each, np.int32) for each in places]))
