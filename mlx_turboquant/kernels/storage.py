"""Storage for the packed tokens of one layer: quantizes new ones and keeps them in buffers."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import mlx.core as mx

from ..codec.basis import Basis
from ..codec.codebook import check_dim
from ..codec.packing import words_per_vector
from ..codec.quantizer import QuantizedVectors, TurboQuantizer
from .quantize import quantize
from .reference import interleave
from .tokens import BLOCK, PackedSide, longer, whole_steps

# A scale is a bfloat16.
SCALE_NBYTES = 2
# Buffers grow by this fraction of their size and at least by this many tokens. Copying them then
# moves at most 1/64 of the bytes that attention reads between two copies.
GROWTH, LEAST_GROWTH = 1 / 512, 128
# The mean of values is removed where its energy is at least this multiple of the variance. Tokens
# with much attention often have small values, to which the mean would add its own error.
VALUE_MEAN_ENERGY = 2.0

ALL_ROWS = slice(None)


@lru_cache(maxsize=256)
def shared_quantizer(
    dim: int, bits: int, seed: int, basis: Basis | None = None, codec: str = "scalar"
) -> TurboQuantizer:
    """Return one quantizer for all layers: it is stateless, and caches must stay cheap to copy.

    Layers with a ``basis`` have quantizers of their own.
    """
    return TurboQuantizer(dim, bits, seed=seed, basis=basis, codec=codec)


def removable_mean(x: mx.array, least_energy: float = 0.0) -> mx.array:
    """Return the mean over the tokens of each head of x (B, H, n, dim), or zeros.

    Subtracting one vector from all keys of a head leaves softmax attention unchanged. For values it
    is added back once, to the output. Only the deviations have to be quantized. A head gets zeros
    if the energy of its mean is below ``least_energy`` times the variance, if it has a single token
    or if it has a non-finite value, which must not reach other tokens. float32 (B, H, 1, dim).
    """
    x = x.astype(mx.float32)
    mean = x.mean(axis=-2, keepdims=True)
    if x.shape[2] == 1:
        return mx.zeros_like(mean)
    variance = _squared_distance(x, mean).sum(axis=(-2, -1), keepdims=True) / (x.shape[2] - 1)
    energy = (mean * mean).sum(axis=-1, keepdims=True)
    # False where a value is not finite, because the variance is then NaN.
    return mx.where(energy > least_energy * variance, mean, 0)


@partial(mx.compile, shapeless=True)
def _squared_distance(x: mx.array, y: mx.array) -> mx.array:
    difference = x - y
    return difference * difference


class Layout(NamedTuple):
    """How the vectors of one side are stored, see :class:`.PackedSide`.

    A mean with ``least_mean_energy`` is removed, see :func:`removable_mean`.
    """

    bits: int
    interleaved: bool
    least_mean_energy: float
    basis: Basis | None = None
    codec: str = "scalar"

    def vector_nbytes(self, dim: int) -> int:
        """Return the bytes of one stored vector: its packed words and a bfloat16 scale."""
        return 4 * words_per_vector(dim, self.bits) + SCALE_NBYTES


def layouts_of(
    key_bits: int, value_bits: int | None, basis: Basis | None = None, codec: str = "scalar"
) -> list[Layout]:
    """Return the layouts of keys and values; without ``value_bits``, that of latent vectors."""
    if value_bits is None:
        return [Layout(key_bits, True, VALUE_MEAN_ENERGY, codec=codec)]
    values = Layout(value_bits, False, VALUE_MEAN_ENERGY, codec=codec)
    return [Layout(key_bits, True, 0.0, basis, codec), values]


class PackedKV:
    """Quantized keys and values of the same tokens, or latent vectors that are both.

    Sequence b has ``counts[b]`` tokens, at the start of row b of the buffers. A single count holds
    for all rows. ``sides`` are the keys and the values. The list is empty before the first tokens,
    whose mean is subtracted from all later ones. With a ``limit``, a multiple of 64, the oldest
    tokens are evicted to make room, an eighth of the limit at a time.

    Buffers are only written behind the tokens that they hold. Moving tokens makes new buffers, so
    that an attention that was given the old ``sides`` still sees its tokens.
    """

    def __init__(self, layouts: list[Layout], seed: int, limit: int | None = None):
        self.layouts = layouts
        self.seed = seed
        self.limit = limit
        self.sides: list[PackedSide] = []
        self.counts = [0]

    @property
    def count(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.counts)

    @property
    def capacity(self) -> int:
        """Tokens per sequence that the buffers have room for."""
        return self.sides[0].capacity if self.sides else 0

    @property
    def arrays(self) -> list[mx.array]:
        """Codes, scales and means of all sides, whole."""
        return [x for side in self.sides for x in (side.codes, side.scales, side.mean)]

    def append(self, new: list[mx.array], rows: slice = ALL_ROWS) -> int:
        """Quantize and store keys and values (rows, H, n, dim) of sequences of equal length.

        Returns how many of their oldest tokens were evicted.
        """
        held, added = self.counts[rows][0], new[0].shape[2]
        forgotten = self._forgotten_for(held, added)
        if forgotten > held:
            new = [x[:, :, forgotten - held :] for x in new]
        if held == 0:
            self._fix_means(new, rows)
        means = [side.mean[rows] for side in self.sides]
        packed = quantize(new, means, [side.quantizer for side in self.sides])
        if held and forgotten:
            self._move(rows, min(forgotten, held))
        start = max(held - forgotten, 0)
        self._reserve(start + new[0].shape[2])
        for side, vectors in zip(self.sides, packed):
            _write(side, vectors, start, rows)
        self.counts[rows] = [start + new[0].shape[2]] * len(self.counts[rows])
        return forgotten

    def _forgotten_for(self, held: int, added: int) -> int:
        """Return how many of the oldest tokens to evict for new ones."""
        if self.limit is None or held + added <= self.limit:
            return 0
        if added >= self.limit:
            return held + added - self.limit
        unit = max(self.limit // 8 // BLOCK, 1) * BLOCK
        return min(-(-(held + added - self.limit) // unit) * unit, held)

    def _fix_means(self, new: list[mx.array], rows: slice) -> None:
        """Set the means of sequences by their first tokens."""
        if not self.sides:
            batch = new[0].shape[0] if rows == ALL_ROWS else len(self.counts)
            self.sides = [
                _empty(layout, (batch, *x.shape[1:2]), x.shape[3], self.seed)
                for layout, x in zip(self.layouts, new)
            ]
        for layout, side, x in zip(self.layouts, self.sides, new):
            side.mean[rows] = removable_mean(x, layout.least_mean_energy)

    def reserve_block(self) -> None:
        """Make room for one more block, before attention is given buffers that are too small."""
        if self.sides:
            self._reserve(self.count + BLOCK)

    def _reserve(self, count: int) -> None:
        """Make room for ``count`` tokens in each sequence, or for ``limit`` if that is less."""
        capacity, limit = self.capacity, self.limit or count
        if min(count, limit) <= capacity:
            return
        grown = max(count, capacity + max(LEAST_GROWTH, int(GROWTH * capacity)))
        grown = grown if self.limit is None else min(grown, limit)
        self.sides = [_resized(side, whole_steps(grown)) for side in self.sides]
        if count - self.count <= BLOCK:
            # In decode the host runs ahead: without a wait the old and the larger buffers of all
            # layers would exist at once. In prefill one layer follows the other.
            mx.eval([(side.codes, side.scales) for side in self.sides])

    def _move(self, rows: slice, forgotten: int) -> None:
        """Evict the oldest tokens of some sequences: all of them, or a multiple of 32."""
        moved = []
        for side in self.sides:
            codes, scales = mx.array(side.codes), mx.array(side.scales)
            for x, count in ((codes, _slots(side.interleaved, forgotten)), (scales, forgotten)):
                x[rows, :, : x.shape[2] - count] = x[rows, :, count:]
            moved.append(side._replace(codes=codes, scales=scales))
        self.sides = moved
        mx.eval([(side.codes, side.scales) for side in moved])  # see _reserve

    def trim(self, tokens: list[int]) -> None:
        """Drop the last ``tokens[b]`` tokens of sequence b."""
        self.counts = [count - n for count, n in zip(self.counts, tokens)]

    def take(self, rows: list[int]) -> "PackedKV":
        """Return some of the sequences, in buffers of the size that they need."""
        taken = PackedKV(self.layouts, self.seed, self.limit)
        taken.counts = [self.counts[row] for row in rows]
        capacity = whole_steps(taken.count + 1)
        for side in self.sides:
            codes = side.codes[rows, :, : _slots(side.interleaved, capacity)]
            arrays = {"codes": codes, "scales": side.scales[rows, :, :capacity]}
            taken.sides.append(side._replace(**arrays, mean=side.mean[rows]))
        return taken

    @classmethod
    def join(cls, parts: "Sequence[PackedKV]") -> "PackedKV":
        """Join the sequences of all ``parts``, which agree in layouts, seed and limit."""
        joined = cls(parts[0].layouts, parts[0].seed, parts[0].limit)
        joined.counts = [count for part in parts for count in part.counts]
        filled = [part for part in parts if part.sides]
        capacity = max((part.capacity for part in filled), default=0)
        for i, like in enumerate(filled[0].sides if filled else ()):
            sides = []
            for part in parts:
                heads, dim = (len(part.counts), *like.mean.shape[1:2]), like.mean.shape[3]
                empty = _empty(part.layouts[i], heads, dim, part.seed)
                sides.append(_resized(part.sides[i] if part.sides else empty, capacity))
            arrays = zip(*((side.codes, side.scales, side.mean) for side in sides))
            joined.sides.append(PackedSide(*like[:2], *map(mx.concatenate, arrays)))
        return joined

    def used(self) -> list[mx.array | None]:
        """Return codes, scales and mean of each side, without free space behind the last token."""
        if self.count == 0:
            return [None] * 3 * len(self.layouts)
        return beginning_of(self.arrays, self.count)

    def restore(self, count: int, shapes: list[tuple[int, int, int]], used: list[Any]) -> None:
        """Restore ``count`` tokens from their :meth:`used` arrays; sides are (B, H, dim).

        Raises:
            ValueError: a count beyond the limit, or arrays of another shape or dtype.
        """
        check_state(self.limit is None or count <= self.limit, f"{count} tokens are too many")
        self.counts = [count]
        for layout, (*heads, dim), arrays in zip(
            self.layouts, shapes, (used[i : i + 3] for i in range(0, len(used), 3))
        ):
            check_dim(dim)
            if count == 0:
                check_state(all(x is None for x in arrays), "codes of no tokens")
                continue
            what = f"codes, scales and means of {count} tokens are not of their shape"
            for x, (shape, dtype) in zip(arrays, _shapes(layout, tuple(heads), dim, count)):
                check_state(isinstance(x, mx.array) and x.shape == shape and x.dtype == dtype, what)
            quantizer = shared_quantizer(dim, layout.bits, self.seed, layout.basis, layout.codec)
            side = PackedSide(quantizer, layout.interleaved, *arrays)
            self.sides.append(_resized(side, whole_steps(count)))


def beginning_of(used: Sequence[Any], count: int) -> list[Any]:
    """Return what :meth:`PackedKV.used` would give for the first ``count`` tokens."""
    if count == 0:
        return [None] * len(used)
    cut: list[Any] = []
    for codes, scales, mean in zip(used[::3], used[1::3], used[2::3]):
        slots = _slots(len(codes.shape) == 5, count)
        cut += [codes[:, :, :slots], scales[:, :, :count], mean]
    return cut


def _empty(layout: Layout, heads: tuple[int, ...], dim: int, seed: int) -> PackedSide:
    """Return a side of (B, H) heads without tokens; its mean is zeros."""
    arrays = [mx.zeros(*each) for each in _shapes(layout, heads, dim, 0)]
    quantizer = shared_quantizer(dim, layout.bits, seed, layout.basis, layout.codec)
    return PackedSide(quantizer, layout.interleaved, *arrays)


def _shapes(
    layout: Layout, heads: tuple[int, ...], dim: int, tokens: int
) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    """Return shapes and dtypes of codes, scales and mean of (B, H) heads."""
    codes = (*heads, _slots(layout.interleaved, tokens), words_per_vector(dim, layout.bits))
    if layout.interleaved:
        codes = (*codes, BLOCK)
    return [(codes, mx.uint32), ((*heads, tokens), mx.bfloat16), ((*heads, 1, dim), mx.float32)]


def _resized(side: PackedSide, capacity: int) -> PackedSide:
    """Copy the vectors to larger buffers."""
    codes = longer(side.codes, _slots(side.interleaved, capacity))
    return side._replace(codes=codes, scales=longer(side.scales, capacity))


def _slots(interleaved: bool, tokens: int) -> int:
    """Return the length of the third axis of codes for ``tokens`` tokens."""
    return -(-tokens // BLOCK) if interleaved else tokens


def _write(side: PackedSide, packed: QuantizedVectors, start: int, rows: slice) -> None:
    """Store vectors of some rows from the token ``start`` on, in place."""
    codes, stop = packed.codes, start + packed.scales.shape[2]
    side.scales[rows, :, start:stop] = packed.scales
    if not side.interleaved:
        side.codes[rows, :, start:stop] = codes
        return
    if lane := start % BLOCK:
        # Trimming can leave a block that is partly filled.
        head, codes = codes[:, :, : BLOCK - lane], codes[:, :, BLOCK - lane :]
        lanes = slice(lane, lane + head.shape[2])
        side.codes[rows, :, start // BLOCK, :, lanes] = head.swapaxes(-1, -2)
        start += head.shape[2]
    if codes.shape[2]:
        # If the blocks fill the whole buffer, MLX takes them as the buffer, without a copy.
        blocks = interleave(longer(codes, -(-codes.shape[2] // BLOCK) * BLOCK))
        first = start // BLOCK
        side.codes[rows, :, first : first + blocks.shape[2]] = blocks


def check_state(holds: bool, what: str) -> None:
    """Raise ValueError unless a condition on a saved state holds; ``what`` names the fault."""
    if not holds:
        raise ValueError(f"The state of a cache is damaged ({what}): use another saved one.")


def check_vectors(x: mx.array, count: int, like: mx.array) -> tuple[int, int]:
    """Return (B, H) of ``like``; ValueError unless x is (B, H, count, dim) of a float dtype."""
    arrays = all(isinstance(array, mx.array) and array.ndim == 4 for array in (x, like))
    what = f"the vectors of {count} tokens are not of their shape"
    check_state(arrays and all(x.shape[:2]) and x.shape[3] > 0, what)
    check_state(x.shape[:3] == (*like.shape[:2], count), what)
    check_state(mx.issubdtype(x.dtype, mx.floating), f"vectors are {x.dtype}")
    return like.shape[:2]
