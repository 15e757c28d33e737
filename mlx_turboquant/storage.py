"""Packed storage of the keys or values of one layer: the buffers that attention reads."""

from copy import copy
from functools import cache

import mlx.core as mx

from . import kernels
from .kernels import BLOCK
from .packing import words_per_vector
from .quantizer import QuantizedVectors, TurboQuantizer

# Buffers grow by this many tokens or by 1/32 of their size, whichever is more.
_GROWTH = 256
# The attention kernel reads steps of two blocks, the last one whole.
CAPACITY_UNIT = 2 * BLOCK
# The mean of a head is removed where its energy is at least this multiple of the variance.
_MEAN_ENERGY = 2.0


@cache
def shared_quantizer(dim: int, bits: int, seed: int) -> TurboQuantizer:
    """One quantizer for all layers: it is stateless, and caches must stay cheap to copy."""
    return TurboQuantizer(dim, bits, seed=seed)


def removable_mean(x: mx.array) -> mx.array:
    """The mean over the tokens of each head of x (B, H, n, dim), where it pays to remove it.

    Subtracting one vector from all keys of a head leaves softmax attention unchanged, and for
    values it is added back once, so only what remains has to be quantized. A head whose mean has
    less than twice the energy of the deviations from it gets zeros, and so does one with a
    non-finite value, which belongs to its token alone, or with a single token. Returns float32
    (B, H, 1, dim).
    """
    x = x.astype(mx.float32)
    mean = x.mean(axis=-2, keepdims=True)
    if x.shape[2] == 1:
        return mx.zeros_like(mean)
    energy = (mean * mean).sum(axis=-1, keepdims=True)
    variance = mx.var(x, axis=-2, keepdims=True, ddof=1).sum(axis=-1, keepdims=True)
    pays = mx.isfinite(energy) & (energy > _MEAN_ENERGY * variance)
    return mx.where(pays, mean, 0)


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
        self.count = 0
        self.codes: mx.array | None = None
        self.scales: mx.array | None = None
        self.mean: mx.array | None = None

    @property
    def quantizer(self) -> TurboQuantizer:
        """The quantizer of these tokens; there is one once the first were stored."""
        return shared_quantizer(self.mean.shape[-1], self.bits, self.seed)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers and the mean, free space included."""
        return sum(a.nbytes for a in (self.codes, self.scales, self.mean) if a is not None)

    def append(self, x: mx.array) -> None:
        """Quantize x (B, H, n, dim) and store it after the tokens that are there."""
        self._store(*kernels.quantize(self._block(x)))

    def append_with(self, x: mx.array, values: "PackedTokens", value_x: mx.array) -> None:
        """:meth:`append` x here and the values of the same tokens there, in one launch."""
        packed = kernels.quantize(self._block(x), values._block(value_x))
        self._store(packed[0])
        values._store(packed[1])

    def _block(self, x: mx.array) -> kernels.Block:
        if self.count == 0:
            self.mean = removable_mean(x)
        return kernels.Block(x, self.mean, self.quantizer)

    def _store(self, packed: QuantizedVectors) -> None:
        start, stop = self.count, self.count + packed.scales.shape[2]
        self._reserve(stop, packed.codes.shape[:2], packed.codes.shape[-1])
        self.scales[..., start:stop] = packed.scales
        if self.interleaved:
            self._write_blocks(packed.codes, start)
        else:
            self.codes[..., start:stop, :] = packed.codes
        self.count = stop

    def rotated_values(self) -> mx.array:
        """The tokens without the mean, before the inverse rotation: float32 (B, H, count, dim)."""
        packed = kernels.token_major(self.codes, self.scales, self.count, self.interleaved)
        return self.quantizer.rotated_values(packed)

    def dense(self, dtype: mx.Dtype) -> mx.array:
        """The reconstructed tokens (B, H, count, dim)."""
        arrays = (self.codes, self.scales, self.mean, self.count)
        return kernels.dequantize(*arrays, self.quantizer, self.interleaved, dtype)

    def view(self) -> "PackedTokens":
        """The tokens of now: the same buffers, read up to the count of now."""
        return copy(self)

    def used(self) -> tuple[mx.array | None, ...]:
        """``codes``, ``scales`` and ``mean`` without the free space behind the last token."""
        if self.count == 0:
            return None, None, None
        slots = -(-self.count // BLOCK) if self.interleaved else self.count
        return self.codes[:, :, :slots], self.scales[..., : self.count], self.mean

    def restore(self, count: int, *used: mx.array | None) -> None:
        """Hold the ``count`` tokens whose :meth:`used` arrays these are."""
        self.count = count
        self.codes, self.scales, self.mean = used
        if count:
            words = self.codes.shape[-2 if self.interleaved else -1]
            capacity = -(-count // CAPACITY_UNIT) * CAPACITY_UNIT
            self._reserve(capacity, self.codes.shape[:2], words)

    def _reserve(self, count: int, heads: tuple[int, ...], words: int) -> None:
        """Make room for ``count`` tokens of (B, H) heads."""
        capacity = 0 if self.scales is None else self.scales.shape[-1]
        if count <= capacity:
            return
        grown = max(count, capacity + max(_GROWTH, capacity // 32))
        grown = -(-grown // CAPACITY_UNIT) * CAPACITY_UNIT
        slots = (grown // BLOCK, words, BLOCK) if self.interleaved else (grown, words)
        codes, scales = (
            mx.zeros((*heads, *slots), mx.uint32),
            mx.zeros((*heads, grown), mx.bfloat16),
        )
        if self.count:
            old_codes, old_scales, _ = self.used()
            codes[:, :, : old_codes.shape[2]] = old_codes
            scales[..., : self.count] = old_scales
        self.codes, self.scales = codes, scales

    def _write_blocks(self, codes: mx.array, start: int) -> None:
        """Write codes (B, H, n, words) to the interleaved tokens from ``start`` on."""
        lane = start % BLOCK
        if lane:
            # Trimming can leave a block that is partly filled.
            head, codes = codes[:, :, : BLOCK - lane], codes[:, :, BLOCK - lane :]
            lanes = slice(lane, lane + head.shape[2])
            self.codes[:, :, start // BLOCK, :, lanes] = head.swapaxes(-1, -2)
            start += head.shape[2]
        if codes.shape[2]:
            padding = -codes.shape[2] % BLOCK
            codes = mx.pad(codes, [(0, 0), (0, 0), (0, padding), (0, 0)])
            blocks = mx.unflatten(codes, 2, (-1, BLOCK)).swapaxes(-1, -2)
            first = start // BLOCK
            self.codes[:, :, first : first + blocks.shape[2]] = blocks


def bytes_per_vector(dim: int, bits: int) -> int:
    """Bytes that one stored token of one head takes: the packed words and a bfloat16 scale."""
    return 4 * words_per_vector(dim, bits) + 2
