"""Packed storage of the keys or values of one layer: the buffers that attention reads."""

from copy import copy
from functools import cache, partial
from typing import Any

import mlx.core as mx

from . import kernels
from .codebook import check_dim
from .kernels import BLOCK
from .packing import words_per_vector
from .quantizer import QuantizedVectors, TurboQuantizer

# The attention kernel reads steps of two blocks, the last one whole.
CAPACITY_UNIT = 2 * BLOCK
# A scale is a bfloat16.
SCALE_NBYTES = 2
# Buffers grow by this part of their size, at least by so many tokens: to copy them takes at most
# 1/64 of what attention reads meanwhile.
GROWTH, LEAST_GROWTH = 1 / 512, 128
# The mean of values is removed where its energy is at least this multiple of the variance: tokens
# that are looked at most often have small values, whose error would then be that of the mean.
VALUE_MEAN_ENERGY = 2.0


@cache
def shared_quantizer(dim: int, bits: int, seed: int) -> TurboQuantizer:
    """One quantizer for all layers: it is stateless, and caches must stay cheap to copy."""
    return TurboQuantizer(dim, bits, seed=seed)


def removable_mean(x: mx.array, least_energy: float = 0.0) -> mx.array:
    """The mean over the tokens of each head of x (B, H, n, dim), where it pays to remove it.

    Subtracting one vector from all keys of a head leaves softmax attention unchanged, and for
    values it is added back once, so only what remains has to be quantized. A head whose mean has
    less than ``least_energy`` times the energy of the deviations from it gets zeros, and so does
    one with a non-finite value, which belongs to its token alone, or with a single token. Returns
    float32 (B, H, 1, dim).
    """
    x = x.astype(mx.float32)
    mean = x.mean(axis=-2, keepdims=True)
    if x.shape[2] == 1:
        return mx.zeros_like(mean)
    variance = _squared_distance(x, mean).sum(axis=(-2, -1), keepdims=True) / (x.shape[2] - 1)
    energy = (mean * mean).sum(axis=-1, keepdims=True)
    # False where a value is not finite, because the variance is then not a number.
    return mx.where(energy > least_energy * variance, mean, 0)


@partial(mx.compile, shapeless=True)
def _squared_distance(x: mx.array, y: mx.array) -> mx.array:
    difference = x - y
    return difference * difference


class PackedTokens:
    """Quantized vectors of one layer, (B, H, count, dim), in buffers that are larger than count.

    With ``interleaved`` (keys), ``codes`` are uint32 (B, H, capacity / 32, words, 32): 32 lanes
    that score one token each read 32 consecutive words. Without (values) they are
    (B, H, capacity, words). ``scales`` are (B, H, capacity) in bfloat16, which no finite
    input can overflow. ``mean`` is float32 (B, H, 1, dim), fixed with the first tokens.
    """

    def __init__(self, bits: int, seed: int, interleaved: bool):
        self.bits = bits
        self.seed = seed
        self.interleaved = interleaved
        self.least_mean_energy = 0.0 if interleaved else VALUE_MEAN_ENERGY
        self.count = 0
        # With a limit, the place of the oldest token, which the next one takes.
        self.most: int | None = None
        self.oldest = 0
        self.codes: mx.array | None = None
        self.scales: mx.array | None = None
        self.mean: mx.array | None = None
        self._quantizer: TurboQuantizer | None = None
        # What attention remembers of its last call with these keys.
        self.attended: Any = None

    @property
    def counts(self) -> list[int]:
        """Tokens of each sequence: one number for sequences of the same length."""
        return [self.count]

    @property
    def quantizer(self) -> TurboQuantizer:
        """The quantizer of these tokens; there is one once the first were stored."""
        if self._quantizer is None or self._quantizer.bits != self.bits:
            self._quantizer = shared_quantizer(self.mean.shape[-1], self.bits, self.seed)
        return self._quantizer

    @property
    def capacity(self) -> int:
        """Tokens that the buffers have room for."""
        return 0 if self.scales is None else self.scales.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers and the mean, free space included."""
        return sum(a.nbytes for a in (self.codes, self.scales, self.mean) if a is not None)

    def vector_nbytes(self, dim: int) -> int:
        """Bytes that one stored vector takes: the packed words and a bfloat16 scale."""
        return 4 * words_per_vector(dim, self.bits) + SCALE_NBYTES

    def append(self, x: mx.array) -> None:
        """Quantize x (B, H, n, dim) and store it after the tokens that are there."""
        append_all([self], [x])

    def append_without_kernels(self, x: mx.array) -> None:
        """:meth:`append` in plain MLX."""
        self._store(kernels.reference_quantize(*self._block(x, 0, x.shape[2])))

    def _block(self, x: mx.array, start: int, count: int) -> kernels.Block:
        if self.count == 0:
            tokens = x[:, :, start : start + count]
            self.mean = removable_mean(tokens, self.least_mean_energy)
        return kernels.Block(x, self.mean, self.quantizer, start, count)

    def _store(self, packed: QuantizedVectors) -> None:
        """Write after the last token, and over the oldest ones once there are ``most``."""
        added = packed.scales.shape[2]
        stop = self.count + added if self.most is None else min(self.count + added, self.most)
        self._reserve(stop, packed.codes.shape[:2], packed.codes.shape[-1])
        if self.most is None:
            self._write(packed, self.count)
            self.count = stop
            return
        while added:
            full = self.count == self.most
            start = self.oldest if full else self.count
            fitting = min(added, self.most - start)
            self._write(
                QuantizedVectors(*(x[:, :, -added:][:, :, :fitting] for x in packed)), start
            )
            if full:
                self.oldest = (start + fitting) % self.most
            else:
                self.count += fitting
            added -= fitting

    def _write(self, packed: QuantizedVectors, start: int, rows: slice = slice(None)) -> None:
        stop = start + packed.scales.shape[2]
        self.scales[rows, :, start:stop] = packed.scales
        if self.interleaved:
            self._write_blocks(packed.codes, start, rows)
        else:
            self.codes[rows, :, start:stop] = packed.codes

    def rotated_values(self) -> mx.array:
        """The tokens without the mean, before the inverse rotation: float32 (B, H, count, dim)."""
        return self.quantizer.rotated_values(self._token_major())

    def stored_levels(self) -> tuple[mx.array, mx.array]:
        """Float32 levels (B, H, count, dim) in the quantizer's stored order, and scales."""
        packed = self._token_major()
        return self.quantizer.stored_levels(packed), packed.scales

    def _token_major(self) -> QuantizedVectors:
        return kernels.token_major(self.codes, self.scales, self.count, self.interleaved)

    def dense(self, dtype: mx.Dtype) -> mx.array:
        """The reconstructed tokens (B, H, count, dim), in plain MLX."""
        restored = self.quantizer.rotation.invert(self.rotated_values()) + self.mean
        return restored.astype(dtype)

    def view(self) -> "PackedTokens":
        """The tokens of now: the same buffers, read up to the count of now."""
        view = type(self).__new__(type(self))
        view.__dict__.update(self.__dict__)  # copy() takes ten times as long
        if self.most is not None:
            # What is written over an old token must not be seen.
            view.codes, view.scales = (
                None if x is None else mx.array(x) for x in (self.codes, self.scales)
            )
        return view

    def order(self) -> mx.array:
        """The place of each token in the order of their age: int32 (count,), 0 is the oldest."""
        return (mx.arange(self.count) - self.oldest) % max(self.count, 1)

    def used(self) -> tuple[mx.array | None, ...]:
        """``codes``, ``scales`` and ``mean`` without the free space behind the last token."""
        if self.count == 0:
            return None, None, None
        slots = -(-self.count // BLOCK) if self.interleaved else self.count
        return self.codes[:, :, :slots], self.scales[..., : self.count], self.mean

    def restore(
        self, count: int, oldest: int, shape: tuple[int, int, int], *used: mx.array | None
    ) -> None:
        """Hold ``count`` tokens of ``shape`` (B, H, dim), whose :meth:`used` arrays these are.

        Raises:
            ValueError: numbers or arrays that no tokens can have.
        """
        check_state(oldest == 0 or self.most == count > oldest, f"token {oldest} is the oldest")
        check_state(self.most is None or count <= self.most, f"{count} tokens are too many")
        *heads, dim = shape
        check_dim(dim)
        self.count, self.oldest = count, oldest
        if count == 0:
            check_state(all(x is None for x in used), "codes of no tokens")
            return
        words = words_per_vector(dim, self.bits)
        slots = (-(-count // BLOCK), words, BLOCK) if self.interleaved else (count, words)
        for x, expected, dtype in zip(
            used,
            ((*heads, *slots), (*heads, count), (*heads, 1, dim)),
            (mx.uint32, mx.bfloat16, mx.float32),
        ):
            what = f"codes, scales and means of {count} tokens are not of their shape"
            check_state(isinstance(x, mx.array) and x.shape == expected and x.dtype == dtype, what)
        self.codes, self.scales, self.mean = used
        capacity = -(-count // CAPACITY_UNIT) * CAPACITY_UNIT
        self._reserve(capacity, heads, words)

    def _reserve(self, count: int, heads: tuple[int, ...], words: int) -> None:
        """Make room for ``count`` tokens of (B, H) heads."""
        capacity = self.capacity
        if count <= capacity:
            return
        grown = max(count, capacity + max(LEAST_GROWTH, int(GROWTH * capacity)))
        grown = -(-grown // CAPACITY_UNIT) * CAPACITY_UNIT
        if self.most is not None:
            grown = min(grown, self.most)
        slots = (grown // BLOCK, words, BLOCK) if self.interleaved else (grown, words)
        codes, scales = (
            mx.zeros((*heads, *slots), mx.uint32),
            mx.zeros((*heads, grown), mx.bfloat16),
        )
        if self.count:
            old_codes, old_scales, _ = self.used()
            codes[:, :, : old_codes.shape[2]] = old_codes
            scales[..., : self.count] = old_scales
            if count - self.count <= BLOCK:
                # A decode step, whose host is ahead of it: the old and the larger buffers of all
                # layers would be there at once. In chunks of a prompt layers take turns.
                mx.eval(codes, scales)
        self.codes, self.scales = codes, scales

    def _write_blocks(self, codes: mx.array, start: int, rows: slice) -> None:
        """Write codes (rows, H, n, words) to the interleaved tokens from ``start`` on."""
        lane = start % BLOCK
        if lane:
            # Trimming can leave a block that is partly filled.
            head, codes = codes[:, :, : BLOCK - lane], codes[:, :, BLOCK - lane :]
            lanes = slice(lane, lane + head.shape[2])
            self.codes[rows, :, start // BLOCK, :, lanes] = head.swapaxes(-1, -2)
            start += head.shape[2]
        if codes.shape[2]:
            padding = -codes.shape[2] % BLOCK
            if padding:
                codes = mx.pad(codes, [(0, 0), (0, 0), (0, padding), (0, 0)])
            # Where they fill the whole buffer they become it: a transposed one would be copied by
            # every attention.
            blocks = mx.contiguous(mx.unflatten(codes, 2, (-1, BLOCK)).swapaxes(-1, -2))
            first = start // BLOCK
            self.codes[rows, :, first : first + blocks.shape[2]] = blocks


class BatchPackedTokens(PackedTokens):
    """Packed tokens of sequences of different length: row b of the buffers holds ``counts[b]``.

    ``count`` is the largest of them.
    """

    counts: list[int] = []

    @classmethod
    def join(cls, stores: list[PackedTokens]) -> "BatchPackedTokens":
        """The sequences of all ``stores``, which agree in bits, seed and layout."""
        joined = cls(stores[0].bits, stores[0].seed, stores[0].interleaved)
        joined.least_mean_energy = stores[0].least_mean_energy
        joined._set_counts([count for store in stores for count in store.counts])
        for name in ("codes", "scales", "mean"):
            parts = [(getattr(store, name), len(store.counts)) for store in stores]
            setattr(joined, name, _stacked(parts))
        return joined

    def take(self, rows: list[int]) -> "BatchPackedTokens":
        """Some of the sequences, in buffers of the size that these need."""
        taken = copy(self)
        taken._set_counts([self.counts[row] for row in rows])
        if self.mean is not None:
            capacity = (taken.count // CAPACITY_UNIT + 1) * CAPACITY_UNIT
            slots = capacity // BLOCK if self.interleaved else capacity
            taken.codes, taken.scales = self.codes[rows, :, :slots], self.scales[rows, :, :capacity]
            taken.mean = self.mean[rows]
        return taken

    def row(self, index: int) -> PackedTokens:
        """One sequence alone."""
        row = PackedTokens(self.bits, self.seed, self.interleaved)
        row.least_mean_energy = self.least_mean_energy
        taken = self.take([index])
        row.count, row.codes, row.scales, row.mean = (
            *(taken.count, taken.codes, taken.scales, taken.mean),
        )
        return row

    def trim(self, tokens: list[int]) -> None:
        """Forget the last ``tokens[b]`` of sequence b."""
        self._set_counts([count - n for count, n in zip(self.counts, tokens)])

    def _set_counts(self, counts: list[int]) -> None:
        self.counts, self.count = counts, max(counts, default=0)

    def _rows_block(self, rows: slice, x: mx.array) -> kernels.Block:
        if self.mean is None:
            self.mean = mx.zeros((len(self.counts), x.shape[1], 1, x.shape[-1]))
        if self.counts[rows.start] == 0:
            self.mean[rows] = removable_mean(x, self.least_mean_energy)
        return kernels.Block(x, self.mean[rows], self.quantizer, 0, x.shape[2])

    def _store_rows(self, rows: slice, packed: QuantizedVectors) -> None:
        _, heads, added, words = packed.codes.shape
        start = self.counts[rows.start]
        self._reserve(start + added, (len(self.counts), heads), words)
        self._write(packed, start, rows)
        counts = list(self.counts)
        counts[rows] = [start + added] * len(counts[rows])
        self._set_counts(counts)


def append_all(
    stores: list[PackedTokens], arrays: list[mx.array], start: int = 0, count: int | None = None
) -> None:
    """Quantize ``count`` tokens, or all, from ``start`` on for one or two stores, in one launch.

    ``arrays`` are (B, H, n, dim). Of more than a store takes at most, the first are left out.
    """
    count = arrays[0].shape[2] - start if count is None else count
    most = stores[0].most
    if most is not None and count > most:
        start, count = start + count - most, most
    blocks = (store._block(x, start, count) for store, x in zip(stores, arrays))
    for store, packed in zip(stores, kernels.quantize(*blocks)):
        store._store(packed)


def append_rows(stores: list[BatchPackedTokens], rows: slice, arrays: list[mx.array]) -> None:
    """:func:`append_all` for some sequences of the same length; arrays are (rows, H, n, dim)."""
    blocks = (store._rows_block(rows, x) for store, x in zip(stores, arrays))
    for store, packed in zip(stores, kernels.quantize(*blocks)):
        store._store_rows(rows, packed)


def check_state(holds: bool, what: str) -> None:
    """Raise ValueError, of a saved state in which ``what`` is wrong, unless it ``holds``."""
    if not holds:
        raise ValueError(f"The state of a cache is damaged ({what}): use one that was saved.")


def check_vectors(x: mx.array, count: int, like: mx.array) -> tuple[int, int]:
    """The (B, H) of ``like``; ValueError unless x is (B, H, count, dim) and a model's dtype."""
    arrays = all(isinstance(array, mx.array) and array.ndim == 4 for array in (x, like))
    what = f"the vectors of {count} tokens are not of their shape"
    check_state(arrays and all(x.shape[:2]) and x.shape[3] > 0, what)
    check_state(x.shape[:3] == (*like.shape[:2], count), what)
    check_state(mx.issubdtype(x.dtype, mx.floating), f"vectors are {x.dtype}")
    return like.shape[:2]


def _stacked(parts: list[tuple[mx.array | None, int]]) -> mx.array | None:
    """Buffers of several stores as one, zeros for the rows of a store that has none."""
    buffers = [buffer for buffer, _ in parts if buffer is not None]
    if not buffers:
        return None
    length = max(buffer.shape[2] for buffer in buffers)
    return mx.concatenate([_with_room(buffer, buffers[0], rows, length) for buffer, rows in parts])


def _with_room(buffer: mx.array | None, like: mx.array, rows: int, length: int) -> mx.array:
    if buffer is None:
        return mx.zeros((rows, like.shape[1], length, *like.shape[3:]), like.dtype)
    padding = [(0, 0)] * buffer.ndim
    padding[2] = (0, length - buffer.shape[2])
    return mx.pad(buffer, padding)
