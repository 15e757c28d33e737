"""Allocation of bits to the keys and values of every layer, for the least divergence in a budget.

A budget is the mean number of bits of all compressed values. It is spent in whole bits, first where
they lower the expected divergence of the output most per byte.

A side of a layer is its keys or its values. Its divergence at b bits is the KL divergence of the
next-token distribution, in nats, when nothing else is quantized. :mod:`.calibrate` measures it at
few bits. To second order it is proportional to the squared error D(b) of the codec, which gives it
at more bits. Divergences of several sides add up, because their errors are independent.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from ..codec.codebook import MAX_BITS, relative_error
from ..codec.packing import words_per_vector

# One-bit keys are little more than signs: their divergence is several times the expected one.
MIN_KEY_BITS, MIN_VALUE_BITS = 2, 1
# The squared error of trellis codes by bits, relative to scalar ones. Both have a search for the
# gain and the unbiased scale, so that it is not that of their tables. Means of random vectors of 64
# and 128 values, which differ by up to 9 %.
_TRELLIS_RATIOS = {1: 0.73, 2: 0.685, 3: 0.665, 4: 0.765}
BUDGETS = tuple(quarters / 4 for quarters in range(4 * 2, 4 * MAX_BITS + 1))


class Vectors(NamedTuple):
    """What one side of a layer stores for each token: ``heads`` vectors of ``dim`` values."""

    heads: int
    dim: int

    def nbytes(self, bits: int) -> int:
        """Bytes of the codes of one token, without scales."""
        return 4 * self.heads * words_per_vector(self.dim, bits)


class Side(NamedTuple):
    """Keys or values of one layer: their shape, and their expected divergence by bits.

    ``divergences[b]`` is the divergence at b bits, from 0 to 8, in nats or another unit that all
    sides share. Fewer than ``min_bits`` are never chosen.
    """

    vectors: Vectors
    divergences: tuple[float, ...]
    min_bits: int

    def coded(self, codec: str) -> "Side":
        """This side with codes of ``codec`` in place of scalar ones, by their squared errors."""
        divergences = list(self.divergences)
        for bits, ratio in _TRELLIS_RATIOS.items() if codec == "trellis" else ():
            divergences[bits] *= ratio
        return self._replace(divergences=tuple(divergences))


class Layer(NamedTuple):
    """A compressed layer; one with latent attention has no values of its own."""

    keys: Side
    values: Side | None

    def coded(self, codec: str) -> "Layer":
        """This layer with codes of ``codec`` in place of scalar ones, see :meth:`Side.coded`."""
        return Layer(self.keys.coded(codec), self.values and self.values.coded(codec))


def check_budget(bits: float) -> None:
    """Raise ValueError unless ``bits`` is a budget: 2 to 8 in quarters."""
    if bits not in BUDGETS:
        raise ValueError(
            f"{bits!r} bits are not supported: use {BUDGETS[0]:g} to {MAX_BITS} in quarters."
        )


def divergences_by_bits(dim: int, measured: dict[int, float]) -> tuple[float, ...]:
    """The divergences at 0 to 8 bits of a side that was ``measured`` at some bits.

    Other bits are extrapolated by the error of the codec, from the next fewer measured bits or else
    from the fewest.
    """
    divergences = [float("inf")]
    for bits in range(1, MAX_BITS + 1):
        base = max((b for b in measured if b <= bits), default=min(measured))
        divergences.append(measured[base] * (relative_error(dim, bits) / relative_error(dim, base)))
    return tuple(divergences)


def measured_layer(
    keys: Vectors,
    values: Vectors | None,
    key_divergences: dict[int, float],
    value_divergences: dict[int, float] | None,
) -> Layer:
    """The layer with these vectors, and with divergences that were measured at some bits."""
    key_side = Side(keys, divergences_by_bits(keys.dim, key_divergences), MIN_KEY_BITS)
    if values is None or value_divergences is None:
        return Layer(key_side, None)
    divergences = divergences_by_bits(values.dim, value_divergences)
    return Layer(key_side, Side(values, divergences, MIN_VALUE_BITS))


def uniform_bits(bits: float) -> tuple[int, int]:
    """Bits of keys and values that are the same in all layers, with a mean of at most ``bits``.

    Keys get two bits more than values, or one more if the fraction of ``bits`` is a half or more.
    Their errors matter more in every model that was measured.
    """
    whole, half = int(bits), bits % 1 >= 0.5
    key_bits = min(whole + 1, MAX_BITS)
    return key_bits, min(2 * whole + half - key_bits, MAX_BITS)


def allocate(
    layers: Sequence[Layer], bits: float, key_bits: int | None = None, value_bits: int | None = None
) -> list[tuple[int, int]]:
    """The bits of keys and values of every layer, with a mean of at most the budget ``bits``.

    ``key_bits`` and ``value_bits`` fix a side in all layers. A layer without values of its own gets
    the bits of its keys for both.

    Raises:
        ValueError: the fewest possible bits exceed the budget.
    """
    sides = {(i, j): side for i, layer in enumerate(layers) for j, side in enumerate(layer) if side}
    chosen, steps = {}, []
    for place, side in sides.items():
        fixed = (key_bits, value_bits)[place[1]]
        worthwhile = _worthwhile_bits(side) if fixed is None else [fixed]
        chosen[place] = worthwhile[0]
        steps += [(_gain(side, *step), place, step) for step in pairwise(worthwhile)]
    values = sum(side.vectors.heads * side.vectors.dim for side in sides.values())
    room = bits / 8 * values - sum(sides[at].vectors.nbytes(b) for at, b in chosen.items())
    if room < 0:
        raise ValueError(
            f"A budget of {bits:g} bits is too small (with its fewest bits, or with those that are "
            f"fixed, this model takes {bits - 8 * room / values:.4g} per value): "
            "use a larger budget."
        )
    # The gains of a side fall from step to step, so sorting keeps its steps in order.
    for _, place, (before, after) in sorted(steps, reverse=True):
        vectors = sides[place].vectors
        nbytes = vectors.nbytes(after) - vectors.nbytes(before)
        if chosen[place] == before and nbytes <= room:
            chosen[place] = after
            room -= nbytes
    return [(chosen[i, 0], chosen.get((i, 1), chosen[i, 0])) for i in range(len(layers))]


def chosen_sides(
    layers: Sequence[Layer], bits: Sequence[tuple[int, int]]
) -> Iterator[tuple[Side, int]]:
    """Every side of the layers with its bits; ``bits`` are those of keys and values by layer."""
    for layer, pair in zip(layers, bits):
        for side, b in zip(layer, pair):
            if side is not None:
                yield side, b


def expected_divergence(layers: Sequence[Layer], bits: Sequence[tuple[int, int]]) -> float:
    """The sum of the divergences of all sides, in the unit of ``Side.divergences``."""
    return sum(side.divergences[b] for side, b in chosen_sides(layers, bits))


def _worthwhile_bits(side: Side) -> list[int]:
    """The bits that are worth choosing for a side, ascending, with gains that fall.

    Bits are left out if others take no more bytes and diverge less (narrow vectors are padded to
    whole words), or if the step to more bits gains more per byte.
    """
    nbytes = side.vectors.nbytes
    cheapest_first = sorted(
        range(side.min_bits, MAX_BITS + 1), key=lambda b: (nbytes(b), side.divergences[b])
    )
    corners: list[int] = []
    for bits in cheapest_first:
        if corners and side.divergences[bits] >= side.divergences[corners[-1]]:
            continue
        while len(corners) > 1 and _gain(side, corners[-1], bits) >= _gain(side, *corners[-2:]):
            corners.pop()
        corners.append(bits)
    return corners


def _gain(side: Side, before: int, after: int) -> float:
    nbytes = side.vectors.nbytes(after) - side.vectors.nbytes(before)
    return (side.divergences[before] - side.divergences[after]) / nbytes
