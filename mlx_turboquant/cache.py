"""The compressed KV cache of one attention layer, for a single sequence or equal-length rows."""

from typing import Any

import mlx.core as mx

from .attention import MAX_DECODE_ROWS, CachedTokens
from .codebook import check_bits
from .storage import BLOCK, PackedTokens

DEFAULT_WINDOW = 128
DEFAULT_SINK_TOKENS = 4
# The exact buffers of a short conversation grow by this many tokens.
_STEP = 64


class CompressedArray(mx.array):
    """Keys or values as an ordinary, lazily dequantized array that knows where they came from.

    Attention that recognises it reads ``tokens`` and never evaluates the array; any other code
    gets correct dense values.
    """

    tokens: CachedTokens


class TurboQuantKVCache:
    """Keys and values in ``key_bits`` and ``value_bits`` bits per value.

    The first ``sink_tokens`` and the last ``window`` tokens stay in the model's dtype (up to 31
    more, because tokens are quantized in blocks of 32). Implements the cache interface of mlx-lm.

    Args:
        key_bits: Bits per value of the keys, 1 to 8.
        value_bits: Bits per value of the values, 1 to 8.
        window: Recent tokens that stay exact, 0 or more.
        sink_tokens: First tokens that stay exact, 0 or more.
        seed: Of the random rotation.

    Raises:
        ValueError: an argument outside these ranges.
    """

    def __init__(
        self,
        key_bits: int = 4,
        value_bits: int = 4,
        *,
        window: int = DEFAULT_WINDOW,
        sink_tokens: int = DEFAULT_SINK_TOKENS,
        seed: int = 0,
    ):
        check_bits(key_bits)
        check_bits(value_bits)
        for name, tokens in (("window", window), ("number of sink tokens", sink_tokens)):
            if not isinstance(tokens, int) or tokens < 0:
                raise ValueError(f"A {name} of {tokens} is not possible: use 0 or more tokens.")
        self.window = window
        self.sink_tokens = sink_tokens
        self.offset = 0
        self._packed_keys = PackedTokens(key_bits, seed, interleaved=True)
        self._packed_values = PackedTokens(value_bits, seed, interleaved=False)
        self._exact_keys: mx.array | None = None
        self._exact_values: mx.array | None = None

    @classmethod
    def holding(
        cls,
        keys: PackedTokens,
        values: PackedTokens,
        exact_keys: mx.array,
        exact_values: mx.array,
        window: int,
        sink_tokens: int,
    ) -> "TurboQuantKVCache":
        """A cache of these packed tokens, and of these exact ones: sinks, then recent ones."""
        cache = cls(keys.bits, values.bits, window=window, sink_tokens=sink_tokens, seed=keys.seed)
        cache._packed_keys, cache._packed_values = keys, values
        cache.offset = keys.count + exact_keys.shape[2]
        cache._keep(exact_keys, exact_values)
        return cache

    @staticmethod
    def merge(caches: "list[TurboQuantKVCache]"):
        """A :class:`.BatchTurboQuantKVCache` of the sequences of ``caches``, one each."""
        from .batch_cache import BatchTurboQuantKVCache  # which is built on this module

        return BatchTurboQuantKVCache.merge(caches)

    @property
    def keys(self) -> mx.array | None:
        """The exact keys. Runs over several machines tie what they wait for to this array."""
        return self._exact_keys

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self._exact_keys = keys

    @property
    def key_bits(self) -> int:
        """Bits per value of the packed keys."""
        return self._packed_keys.bits

    @property
    def value_bits(self) -> int:
        """Bits per value of the packed values."""
        return self._packed_values.bits

    @property
    def packed_tokens(self) -> int:
        """Tokens that are quantized."""
        return self._packed_keys.count

    @property
    def exact_tokens(self) -> int:
        """Tokens that are held in the model's dtype: sinks and recent ones."""
        return self.offset - self.packed_tokens

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[CompressedArray, CompressedArray]:
        """Append keys (B, H, n, dim) and values (B, H, n, value_dim) and return all tokens.

        The new tokens and all that were exact before the call are seen exactly by its queries.
        """
        if keys.shape[2] <= MAX_DECODE_ROWS:
            tokens = self._append_few(keys, values)
        else:
            tokens = self._append_many(keys, values)
        return compressed_arrays(tokens)

    def _append_few(self, keys: mx.array, values: mx.array) -> CachedTokens:
        """Write into the exact buffers in place, after making room there."""
        if self._exact_keys is None:
            self._exact_keys = self._buffer(keys[:, :, :0])
            self._exact_values = self._buffer(values[:, :, :0])
        leaving = self._leaving()
        start, stop = self.exact_tokens, self.exact_tokens + keys.shape[2]
        if leaving or stop > self._exact_keys.shape[2]:
            exact_keys, exact_values = (
                self._exact_keys[:, :, :start],
                self._exact_values[:, :, :start],
            )
            self._keep(*self._pack_oldest(exact_keys, exact_values, leaving))
            start, stop = start - leaving, stop - leaving
        self._exact_keys[:, :, start:stop] = keys
        self._exact_values[:, :, start:stop] = values
        self.offset += keys.shape[2]
        return self._tokens(self._exact_keys, self._exact_values)

    def _append_many(self, keys: mx.array, values: mx.array) -> CachedTokens:
        """Quantize what leaves the window at once: a long chunk never enters the exact buffers."""
        if self._exact_keys is not None:
            count = self.exact_tokens
            keys = mx.concatenate([self._exact_keys[:, :, :count], keys], axis=2)
            values = mx.concatenate([self._exact_values[:, :, :count], values], axis=2)
        self.offset = self.packed_tokens + keys.shape[2]
        tokens = self._tokens(keys, values)
        self._keep(*self._pack_oldest(keys, values, self._leaving()))
        return tokens

    def _tokens(self, exact_keys: mx.array, exact_values: mx.array) -> CachedTokens:
        count = self.exact_tokens
        # Snapshots: a chunk that is packed in the same call must not be seen packed by it.
        return CachedTokens(
            self._packed_keys.view(),
            self._packed_values.view(),
            exact_keys,
            exact_values,
            count,
            min(count, self.sink_tokens),
        )

    def _leaving(self) -> int:
        counts = self.packed_tokens, self.exact_tokens
        return leaving_tokens(*counts, self.sink_tokens, self.window)

    def _pack_oldest(
        self, keys: mx.array, values: mx.array, leaving: int
    ) -> tuple[mx.array, mx.array]:
        """Quantize the first ``leaving`` tokens after the sinks; return the others."""
        if leaving == 0:
            return keys, values
        start, stop = self.sink_tokens, self.sink_tokens + leaving
        self._packed_keys.append_with(
            keys[:, :, start:stop], self._packed_values, values[:, :, start:stop]
        )
        return tuple(
            mx.concatenate([x[:, :, :start], x[:, :, stop:]], axis=2) for x in (keys, values)
        )

    def _keep(self, keys: mx.array, values: mx.array) -> None:
        self._exact_keys, self._exact_values = self._buffer(keys), self._buffer(values)

    def _buffer(self, tokens: mx.array) -> mx.array:
        """The exact tokens with free space behind them, up to what the window can ever need."""
        count = tokens.shape[2] + MAX_DECODE_ROWS
        most = max(count, self.sink_tokens + self.window + BLOCK + MAX_DECODE_ROWS)
        padding = min(-(-count // _STEP) * _STEP, most) - tokens.shape[2]
        return mx.pad(tokens, [(0, 0), (0, 0), (0, padding), (0, 0)])

    def trim(self, n: int) -> int:
        """Forget the last n tokens (at most all); packed tokens stay packed. Returns how many."""
        n = min(n, self.offset)
        sinks = min(self.exact_tokens, self.sink_tokens)
        recent = self.exact_tokens - sinks
        packed = min(max(n - recent, 0), self.packed_tokens)
        self._packed_keys.count -= packed
        self._packed_values.count -= packed
        self.offset -= n
        return n

    def is_trimmable(self) -> bool:
        """Always: any number of tokens can be forgotten."""
        return True

    def size(self) -> int:
        """Tokens in the cache."""
        return self.offset

    def empty(self) -> bool:
        """Whether no token was ever stored."""
        return self._exact_keys is None

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held, free space in the buffers included."""
        exact = (self._exact_keys, self._exact_values)
        nbytes = sum(x.nbytes for x in exact if x is not None)
        return nbytes + self._packed_keys.nbytes + self._packed_values.nbytes

    @property
    def fp16_nbytes(self) -> int:
        """Bytes that the same tokens take in a dense 16-bit cache."""
        if self._exact_keys is None:
            return 0
        batch, heads, _, key_dim = self._exact_keys.shape
        return 2 * batch * heads * self.offset * (key_dim + self._exact_values.shape[-1])

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> None | str | mx.array:
        """The mask for n new tokens, as mlx-lm's caches return it."""
        if window_size is None and (n == 1 or not return_array):
            return None if n == 1 else "causal"
        distance = mx.arange(self.offset, self.offset + n)[:, None] - mx.arange(self.offset + n)
        mask = distance >= 0
        return mask if window_size is None else mask & (distance < window_size)

    @property
    def state(self) -> tuple[Any, ...]:
        """All settings, counts and arrays, without free space; what ``from_state`` takes."""
        count = self.exact_tokens
        exact = (self._exact_keys, self._exact_values)
        return (
            self.key_bits,
            self.value_bits,
            self.window,
            self.sink_tokens,
            self._packed_keys.seed,
            self.offset,
            self.packed_tokens,
            *(None if x is None else x[:, :, :count] for x in exact),
            *self._packed_keys.used(),
            *self._packed_values.used(),
        )

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        key_bits, value_bits, window, sink_tokens, seed, offset, packed, *arrays = state
        self.__init__(key_bits, value_bits, window=window, sink_tokens=sink_tokens, seed=seed)
        self.offset = offset
        self._exact_keys, self._exact_values = arrays[:2]
        for store, parts in ((self._packed_keys, arrays[2:5]), (self._packed_values, arrays[5:])):
            store.restore(packed, *parts)

    @classmethod
    def from_state(cls, state: tuple[Any, ...]) -> "TurboQuantKVCache":
        """A cache with the ``state`` of another one."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache


def compressed_arrays(tokens: CachedTokens) -> tuple[CompressedArray, CompressedArray]:
    """All keys and all values of ``tokens``, for attention that knows them and for any other."""
    arrays = tuple(CompressedArray(dense) for dense in tokens.dense())
    for array in arrays:
        array.tokens = tokens
    return arrays


def leaving_tokens(packed: int, exact: int, sink_tokens: int, window: int) -> int:
    """How many exact tokens have left the window, in whole blocks of packed tokens."""
    outside = exact - sink_tokens - window
    return max(0, (packed + outside) // BLOCK * BLOCK - packed)
