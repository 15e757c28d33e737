"""The compressed cache of absorbed latent attention (MLA): one vector a token is key and value."""

from typing import Any

import mlx.core as mx

from .batch_cache import BatchTurboQuantKVCache
from .cache import CompressedArray, CompressedTokens, TurboQuantKVCache, fetch
from .storage import VALUE_MEAN_ENERGY, BatchPackedTokens, check_state, check_vectors

# The buffer of rotary parts grows by this many tokens.
_STEP = 256


class TurboQuantLatentCache(TurboQuantKVCache):
    """Latent vectors in ``key_bits`` bits per value, their rotary parts in the model's dtype.

    A latent vector (512 values in DeepSeek's models) is stored once and read as key and as value;
    the rotary part of the key (64 values) stays exact. Takes the arguments of
    :class:`.TurboQuantKVCache`; ``value_bits`` is without effect.

    Raises:
        ValueError: an argument out of range, or a ``max_size``.
    """

    def __init__(self, key_bits: int = 4, value_bits: int = 4, **settings):
        super().__init__(key_bits, value_bits, **settings)
        if self.max_size is not None:
            raise ValueError(
                f"A cache of latent vectors cannot be limited to {self.max_size} tokens: "
                "leave the limit out."
            )
        self._packed = self._packed[:1]
        self._packed[0].least_mean_energy = VALUE_MEAN_ENERGY  # they are values as well
        self._rotary: mx.array | None = None

    @property
    def merge(self):
        """What makes a :class:`BatchTurboQuantLatentCache` of caches."""
        return BatchTurboQuantLatentCache.merge

    def update_and_fetch(
        self, latents: mx.array, rotary: mx.array
    ) -> tuple[CompressedArray | CompressedTokens, mx.array]:
        """Append latents (B, 1, n, rank) and rotary parts (B, 1, n, dim) and return all of both."""
        start = self.offset
        tokens = self._append([latents])
        self._rotary = _with_room(self._rotary, rotary, self.offset)
        self._rotary[:, :, start : self.offset] = rotary
        [fetched] = self._fetch(tokens, self._needs_no_arrays(latents.shape[2]))
        return fetched, self._rotary[:, :, : self.offset]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held, free space in the buffers included."""
        return super().nbytes + (0 if self._rotary is None else self._rotary.nbytes)

    @property
    def token_values(self) -> int:
        """Values of one token: those of the latent vector and of the rotary part."""
        return super().token_values + self._rotary_values

    @property
    def token_nbytes(self) -> int:
        """Bytes that one more packed token takes, with its rotary part."""
        return super().token_nbytes + 2 * self._rotary_values

    @property
    def _rotary_values(self) -> int:
        return 0 if self._rotary is None else self._rotary.size // self._rotary.shape[2]

    @property
    def state(self) -> tuple[Any, ...]:
        """As that of :class:`.TurboQuantKVCache`, then the rotary parts."""
        rotary = None if self._rotary is None else self._rotary[:, :, : self.offset]
        return (*TurboQuantKVCache.state.fget(self), rotary)

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        *state, rotary = state
        TurboQuantKVCache.state.fset(self, state)
        check_state((rotary is None) == self.empty(), "rotary parts without latent vectors")
        if rotary is not None:
            check_vectors(rotary, self.offset, self._exact[0])
        self._rotary = rotary


class BatchTurboQuantLatentCache(BatchTurboQuantKVCache):
    """What :class:`TurboQuantLatentCache` holds, for a batch of sequences.

    The rotary parts of sequence b begin at the start of row b of their buffer.
    """

    def __init__(self, packed: list[BatchPackedTokens], window: int, sink_tokens: int):
        super().__init__(packed, window, sink_tokens)
        self._rotary: mx.array | None = None

    @classmethod
    def _of_one(cls, cache: TurboQuantLatentCache) -> "BatchTurboQuantLatentCache":
        row = super()._of_one(cache)
        row._rotary = cache._rotary
        return row

    def update_and_fetch(
        self, latents: mx.array, rotary: mx.array
    ) -> tuple[CompressedArray | CompressedTokens, mx.array]:
        """Append latents (B, 1, n, rank) and rotary parts (B, 1, n, dim) and return all of both."""
        count, lengths = rotary.shape[2], self.lengths
        columns = mx.maximum(self._columns(count), 0)
        tokens = self._append([latents])
        self._rotary = _with_room(self._rotary, rotary, max(lengths) + count)
        places = mx.array(lengths)[:, None] + mx.arange(count)
        self._rotary = mx.put_along_axis(self._rotary, _index(places), rotary, axis=2)
        [fetched] = fetch(tokens, self._needs_no_arrays(count))
        return fetched, mx.take_along_axis(self._rotary, _index(columns), axis=2)

    def filter(self, rows: list[int]) -> None:
        """Keep only the sequences ``rows``."""
        super().filter(rows)
        if self._rotary is not None:
            self._rotary = self._rotary[rows, :, : max(self.lengths)]

    def extend(self, other: "BatchTurboQuantLatentCache") -> None:
        """Add the sequences of another batch with the same settings."""
        counts = len(self.lengths), len(other.lengths)
        super().extend(other)
        parts = [self._rotary, other._rotary]
        like = next((x for x in parts if x is not None), None)
        if like is not None:
            parts = [
                mx.zeros((count, *like.shape[1:]), like.dtype) if x is None else x
                for x, count in zip(parts, counts)
            ]
            longest = max(x.shape[2] for x in parts)
            self._rotary = mx.concatenate([_padded(x, longest) for x in parts])

    def extract(self, row: int) -> TurboQuantLatentCache:
        """The cache of one sequence alone."""
        cache = self._extract(row, TurboQuantLatentCache)
        cache._rotary = self._rotary[row : row + 1, :, : cache.offset]
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held, free space in the buffers included."""
        return super().nbytes + (0 if self._rotary is None else self._rotary.nbytes)

    @property
    def fp16_nbytes(self) -> int:
        """Bytes that a dense 16-bit cache, as long as the longest sequence, takes."""
        if self._rotary is None:
            return 0
        return super().fp16_nbytes + 2 * self._rotary[:, :, : self.size()].size

    @property
    def state(self) -> tuple[mx.array | None, ...]:
        """All arrays, for ``mx.eval``."""
        return (*super().state, self._rotary)


def _with_room(buffer: mx.array | None, like: mx.array, count: int) -> mx.array:
    """The buffer, or a larger one that has room for ``count`` tokens."""
    if buffer is None:
        buffer = like[:, :, :0]
    return buffer if count <= buffer.shape[2] else _padded(buffer, -(-count // _STEP) * _STEP)


def _padded(x: mx.array, length: int) -> mx.array:
    return mx.pad(x, [(0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)])


def _index(tokens: mx.array) -> mx.array:
    return tokens[:, None, :, None]
