"""Compressed caches of absorbed latent attention (MLA): one vector per token is key and value."""

from typing import Any

import mlx.core as mx

from ..kernels.storage import check_state, check_vectors
from ..kernels.tokens import longer
from .batch import BatchTurboQuantKVCache
from .fetched import KVArray, KVHandle
from .single import TurboQuantKVCache

# The buffer of rotary parts grows by this many tokens.
_STEP = 256

Latents = KVArray | KVHandle


class BatchTurboQuantLatentCache(BatchTurboQuantKVCache):
    """A :class:`TurboQuantLatentCache` for a batch of sequences.

    Row b of the rotary buffer begins with the rotary parts of sequence b.
    """

    def update_and_fetch(self, latents: mx.array, rotary: mx.array) -> tuple[Latents, mx.array]:
        """Append latents (B, 1, n, rank) and rotary parts (B, 1, n, dim) and return all of both."""
        count, lengths = rotary.shape[2], self.lengths
        columns = mx.maximum(self._columns(count), 0)
        [fetched] = self._append([latents])
        buffer = _with_room(self._rotary, rotary, max(lengths) + count)
        places = mx.array(lengths)[:, None] + mx.arange(count)
        buffer = mx.put_along_axis(buffer, _index(places), rotary, axis=2)
        self._rotary = [buffer]
        return fetched, mx.take_along_axis(buffer, _index(columns), axis=2)

    def filter(self, rows: list[int]) -> None:
        """Keep only the sequences ``rows``."""
        super().filter(rows)
        self._rotary = [x[rows, :, : max(self.lengths)] for x in self._rotary]

    def extend(self, other: "BatchTurboQuantLatentCache") -> None:
        """Add the sequences of another batch that has the same settings."""
        parts = [(self._rotary, len(self.lengths)), (other._rotary, len(other.lengths))]
        super().extend(other)
        for like in self._rotary or other._rotary:
            rotary: list[mx.array] = []
            for own, count in parts:
                rotary += own or [mx.zeros((count, *like.shape[1:]), like.dtype)]
            longest = max(x.shape[2] for x in rotary)
            self._rotary = [mx.concatenate([longer(x, longest) for x in rotary])]


class TurboQuantLatentCache(TurboQuantKVCache):
    """A cache of latent vectors at ``key_bits`` bits per value, with exact rotary parts.

    A latent vector (512 values in DeepSeek's models) is stored once and read as key and as value.
    The rotary part of the key (64 values) stays in the model's dtype. Takes the arguments of
    :class:`.TurboQuantKVCache`; ``value_bits`` has no effect.

    Raises:
        ValueError: an argument out of range, a ``max_size`` or a ``basis``.
    """

    _batch_class = BatchTurboQuantLatentCache
    _is_latent = True

    def __init__(
        self, key_bits: int = 4, value_bits: int = 4, *, max_size: int | None = None, **others: Any
    ):
        super().__init__(key_bits, key_bits, max_size=max_size, **others)
        if max_size is not None:
            raise ValueError(
                f"A cache of latent vectors cannot be limited to {max_size} tokens: "
                "leave the limit out."
            )
        if self.settings.basis is not None:
            raise ValueError("Latent vectors have no basis: leave it out.")

    @classmethod
    def of_row(cls, batch: BatchTurboQuantLatentCache, row: int) -> "TurboQuantLatentCache":
        """The cache of one sequence of a batch."""
        cache = super().of_row(batch, row)
        cache._rotary = [x[row : row + 1, :, : cache.offset] for x in batch._rotary]
        return cache

    def _as_batch(self) -> BatchTurboQuantLatentCache:
        batch = super()._as_batch()
        batch._rotary = self._held_rotary()
        return batch

    def _held_rotary(self) -> list[mx.array]:
        return [x[:, :, : self.offset] for x in self._rotary]

    def update_and_fetch(self, latents: mx.array, rotary: mx.array) -> tuple[Latents, mx.array]:
        """Append latents (B, 1, n, rank) and rotary parts (B, 1, n, dim) and return all of both."""
        start = self.offset
        [fetched] = self._append([latents])
        self._rotary = [_with_room(self._rotary, rotary, self.offset)]
        self._rotary[0][:, :, start : self.offset] = rotary
        return fetched, *self._held_rotary()

    @property
    def state(self) -> tuple[Any, ...]:
        """The state of a :class:`.TurboQuantKVCache`, then the rotary parts."""
        return (*TurboQuantKVCache.state.fget(self), *(self._held_rotary() or [None]))

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        *state, rotary = state
        TurboQuantKVCache.state.fset(self, state)
        check_state((rotary is None) == self.empty(), "rotary parts without latent vectors")
        if rotary is not None:
            check_vectors(rotary, self.offset, self._exact[0])
        self._rotary = [] if rotary is None else [rotary]

    @classmethod
    def beginning(cls, state: tuple[Any, ...], tokens: int) -> tuple[Any, ...]:
        """The ``state`` that a cache has after trimming it to its first ``tokens``, at least 1."""
        *state, rotary = state
        rotary = None if rotary is None else rotary[:, :, :tokens]
        return (*super().beginning(state, tokens), rotary)


def _with_room(buffers: list[mx.array], like: mx.array, count: int) -> mx.array:
    """The buffer, or a larger one, with room for ``count`` tokens."""
    [buffer] = buffers or [like[:, :, :0]]
    return buffer if count <= buffer.shape[2] else longer(buffer, -(-count // _STEP) * _STEP)


def _index(tokens: mx.array) -> mx.array:
    return tokens[:, None, :, None]
