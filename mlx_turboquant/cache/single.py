"""The compressed KV cache of one attention layer, for one sequence or for rows of equal length.

The cache owns two stores, and every token it holds is in one of them:

    _exact   sinks, then recent tokens, in the model's dtype, with free space behind them
    _packed  the tokens between them, quantized

After each call

 1. ``offset`` tokens have been appended; the oldest after the sinks, ``forgotten`` ones, are gone;
 2. if any token is packed, all sinks are exact, and packed tokens are older than recent ones;
 3. besides the sinks, at most the window and 31 more tokens are exact.

All tokens are exact until the first block leaves the window; each block is packed when it leaves.
Attention never changes the arrays that it is given.
"""

from typing import Any

import mlx.core as mx

from ..codec.basis import Basis, restored_basis
from ..codec.quantizer import CODECS
from ..kernels.storage import PackedKV, beginning_of, check_state, check_vectors, layouts_of
from ..kernels.tokens import VisibleTokens, longer
from .base import CompressedCache, write_tokens
from .batch import BatchTurboQuantKVCache
from .blocks import DEFAULT_SINK_TOKENS, DEFAULT_WINDOW, LARGEST, CacheSettings
from .fetched import Link

# The exact buffers of a short conversation grow by this many tokens.
_STEP = 64


class TurboQuantKVCache(CompressedCache):
    """A cache of keys at ``key_bits`` and values at ``value_bits`` bits per value.

    The first ``sink_tokens`` and the last ``window`` tokens stay in the model's dtype, with up to
    31 more, because tokens are quantized in blocks of 32. Implements mlx-lm's cache interface.

    Args:
        key_bits: Bits per value of the keys, 1 to 8.
        value_bits: Bits per value of the values, 1 to 8.
        window: Recent tokens that stay exact, 0 or more.
        sink_tokens: First tokens that stay exact, 0 or more.
        max_size: The most tokens to hold; beyond it, the oldest blocks after the sinks are
            forgotten. None keeps all.
        seed: Seed of the random rotation.
        codec: The kind of codes, "scalar" or "trellis", see :class:`.TurboQuantizer`.
        basis: The axes of the keys, in place of a random rotation.

    Raises:
        ValueError: an argument outside these ranges.
    """

    _batch_class: type[BatchTurboQuantKVCache] = BatchTurboQuantKVCache
    _is_latent = False

    def __init__(
        self,
        key_bits: int = 4,
        value_bits: int = 4,
        *,
        window: int = DEFAULT_WINDOW,
        sink_tokens: int = DEFAULT_SINK_TOKENS,
        max_size: int | None = None,
        seed: int = 0,
        codec: str = "scalar",
        basis: Basis | None = None,
    ):
        numbers = key_bits, value_bits, window, sink_tokens, max_size, seed
        settings = CacheSettings(*numbers, codec, basis)
        layouts = layouts_of(key_bits, None if self._is_latent else value_bits, basis, codec)
        super().__init__(settings, PackedKV(layouts, seed, settings.limit()), Link())
        self.offset = 0
        self.forgotten = 0

    @classmethod
    def of_row(cls, batch: BatchTurboQuantKVCache, row: int) -> "TurboQuantKVCache":
        """The cache of one sequence of a batch."""
        exact, packed = batch.exact_row(row), batch._packed.take([row])
        cache = cls(**batch.settings._asdict())
        cache.link, cache.shared_reads = batch.link, batch.shared_reads
        cache._packed, cache._exact = packed, exact
        cache.forgotten = batch.forgotten[row]
        held = exact[0].shape[2] if exact else 0
        cache.offset = cache.forgotten + packed.count + held
        return cache

    @classmethod
    def merge(cls, caches: "list[TurboQuantKVCache]") -> BatchTurboQuantKVCache:
        """The sequences of ``caches``, one each, as a batch.

        Raises:
            ValueError: caches with different settings or weights.
        """
        batch, *others = (cache._as_batch() for cache in caches)
        for other in others:
            batch.extend(other)
        return batch

    def _as_batch(self) -> BatchTurboQuantKVCache:
        parts = PackedKV.join([self._packed]), self.link, self._held_exact(), self.forgotten
        batch = self._batch_class(type(self), self.settings, *parts)
        batch.shared_reads = self.shared_reads
        return batch

    @property
    def packed_tokens(self) -> int:
        """Number of packed tokens."""
        return self._packed.count

    @property
    def exact_tokens(self) -> int:
        """Number of tokens that are held in the model's dtype: sinks and recent ones."""
        return self.offset - self.forgotten - self._packed.count

    def _hold(self, new: list[mx.array], is_chunk: bool) -> None:
        """Append tokens to the exact buffers, in place if there is room."""
        held = self.exact_tokens
        needed = held + new[0].shape[2]
        if not self._exact:
            self._exact = [x[:, :, :0] for x in new]
        if needed > self._exact[0].shape[2]:
            step = 0 if is_chunk else max(0, min(_STEP, self.settings.most_exact - needed))
            self._exact = [longer(x[:, :, :held], needed + step) for x in self._exact]
        self._write(new)

    def _write(self, new: list[mx.array]) -> None:
        start = self.exact_tokens
        for buffer, x in zip(self._exact, new):
            write_tokens(buffer, x, start)
        self.offset += new[0].shape[2]

    def _steps_alike(self) -> int:
        """Number of one-token steps before one packs a block or finds the exact buffers full."""
        held = self.exact_tokens
        until_block = self.settings.until_block(self._packed.count, held)
        return min(until_block - 1, self._exact[0].shape[2] - held)

    def _pack(self, count: int) -> bool:
        """Quantize the blocks that have left the window; return whether there were any."""
        held = self.exact_tokens
        leaving = self.settings.leaving(self._packed.count, held)
        if not leaving:
            return False
        start, stop = self.sink_tokens, self.sink_tokens + leaving
        self.forgotten += self._packed.append([x[:, :, start:stop] for x in self._exact])
        kept = ([x[:, :, :start], x[:, :, stop:held]] for x in self._exact)
        most = self.settings.most_exact
        self._exact = [longer(mx.concatenate(parts, axis=2), most) for parts in kept]
        return True

    def _tokens(self) -> VisibleTokens:
        """All tokens, as attention reads them."""
        count = self.exact_tokens
        sinks = min(count, self.sink_tokens)
        return self._seen(count, sinks, sinks)

    def _held_exact(self) -> list[mx.array]:
        return [x[:, :, : self.exact_tokens] for x in self._exact]

    def trim(self, n: int) -> int:
        """Forget the last n tokens (at most all), and return how many; packed ones stay packed."""
        self._step = None
        n = min(n, self.offset) if self.is_trimmable() else 0
        recent = max(self.exact_tokens - self.sink_tokens, 0)
        self._packed.trim([min(max(n - recent, 0), self._packed.count)])
        self.offset -= n
        return n

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be trimmed: false once the oldest were forgotten."""
        return self.forgotten == 0

    def size(self) -> int:
        """Number of tokens in the cache."""
        return self.offset - self.forgotten

    @property
    def token_nbytes(self) -> int:
        """Bytes that one more packed token takes in all rows, with its rotary part."""
        return 0 if self.empty() else self._exact[0].shape[0] * super().token_nbytes

    @property
    def exact_nbytes(self) -> int:
        """Bytes of the exact tokens of a long sequence."""
        return self.settings.most_exact * sum(x.nbytes // x.shape[2] for x in self._exact)

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> None | str | mx.array:
        """The mask for n new tokens, as mlx-lm's caches return it."""
        if window_size is None and (n == 1 or not return_array):
            return None if n == 1 else "causal"
        sinks = min(self.exact_tokens, self.sink_tokens)
        end = self.offset + n
        positions = [mx.arange(sinks), mx.arange(sinks + self.forgotten, end)]
        distance = mx.arange(self.offset, end)[:, None] - mx.concatenate(positions)
        mask = distance >= 0
        return mask if window_size is None else mask & (distance < window_size)

    @property
    def state(self) -> tuple[Any, ...]:
        """All settings, counts and arrays, without free space, as ``from_state`` takes them.

        The last two are axes and weights of the basis, so that a saved cache needs no profile.
        """
        *plain, basis = self.settings
        return (
            *plain,
            self.shared_reads,
            self.offset,
            self.forgotten,
            self._packed.count,
            *(self._held_exact() or [None] * len(self._packed.layouts)),
            *self._packed.used(),
            *((None, None) if basis is None else (basis.axes, basis.weights)),
        )

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        sides = 1 if self._is_latent else 2
        check_state(len(state) == 13 + 4 * sides, f"it has {len(state)} parts")
        settings, counts, arrays = state[:7], state[7:11], state[11:-2]
        *numbers, max_size, seed, codec = settings
        numbers = (*numbers, *counts, 0 if max_size is None else max_size)
        are_counts = all(type(number) is int and 0 <= number <= LARGEST for number in numbers)
        check_state(are_counts, "a number of tokens or bits is invalid")
        check_state(type(seed) is int and seed >= 0, f"a seed of {seed}")
        check_state(codec in CODECS, f"codes of the kind {codec!r}")
        try:
            basis = restored_basis(*state[-2:])
        except ValueError as error:
            check_state(False, str(error).rstrip("."))
        self.__init__(**CacheSettings(*settings, basis)._asdict())
        self.shared_reads, self.offset, self.forgotten, packed = counts
        held = self.size() - packed
        check_state(held >= (self.sink_tokens if packed else 0), f"{held} exact tokens")
        check_state(max_size is not None or not self.forgotten, "tokens forgotten without a limit")
        self._exact = [x for x in arrays[:sides] if x is not None]
        check_state(bool(self._exact) or not self.offset, "tokens without arrays")
        check_state(len(self._exact) in (0, sides), "an array is missing")
        shapes = []
        for x in self._exact:
            shapes.append((*check_vectors(x, held, self._exact[0]), x.shape[3]))
        if basis is not None and shapes:
            check_state(basis.axes.shape[:2] == shapes[0][1:], "its basis is that of other keys")
        self._packed.restore(packed, shapes, arrays[sides:])

    @classmethod
    def beginning(cls, state: tuple[Any, ...], tokens: int) -> tuple[Any, ...]:
        """The ``state`` that a cache has after trimming it to its first ``tokens``, at least 1.

        Arrays are only sliced, so they may be :class:`.StoredArray` objects. The state of a cache
        that cannot be trimmed, or has no more tokens, is returned unchanged.
        """
        sinks, (offset, forgotten, packed) = CacheSettings(*state[:7]).sink_tokens, state[8:11]
        if forgotten or tokens >= offset:
            return tuple(state)
        # Packed tokens stay packed: the sinks are exact, and there may be no recent tokens.
        packed = min(packed, max(tokens - sinks, 0))
        arrays, sides = state[11:-2], 1 if cls._is_latent else 2
        exact = [x[:, :, : tokens - packed] for x in arrays[:sides]]
        used = beginning_of(arrays[sides:], packed)
        return (*state[:8], tokens, forgotten, packed, *exact, *used, *state[-2:])

    @classmethod
    def from_state(cls, state: tuple[Any, ...]) -> "TurboQuantKVCache":
        """Create a cache with the ``state`` of another one.

        Raises:
            ValueError: a state that no cache can have.
        """
        cache = cls.__new__(cls)
        cache.state = state
        return cache
