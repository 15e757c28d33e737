"""The compressed KV cache of one attention layer, for a single sequence or equal-length rows."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .attention import MAX_DECODE_ROWS, CachedTokens
from .codebook import check_bits
from .storage import (
    BLOCK,
    CAPACITY_UNIT,
    PackedTokens,
    append_all,
    check_state,
    check_vectors,
)
from .turns import end_turns, take_turn

DEFAULT_WINDOW = 128
DEFAULT_SINK_TOKENS = 4
# The exact buffers of a short conversation grow by this many tokens.
_STEP = 64
# Exact tokens that a decode step copies rather than writing one in place.
_MOST_COPIED = 256
# An array has no more places than this along an axis.
_LARGEST = 2**31 - 1


class CompressedArray(mx.array):
    """Keys or values as an ordinary, lazily dequantized array that knows where they came from.

    Attention that recognises it reads ``tokens`` and never evaluates the array; any other code
    gets correct dense values.
    """

    tokens: CachedTokens


class CompressedTokens:
    """Keys (``kind`` 0) or values (1) for attention that reads ``tokens``: there is no array.

    A lazy array costs the host as much as the attention itself. Any other use than asking for
    ``shape`` or ``dtype`` raises a TypeError or an AttributeError.
    """

    __slots__ = ("tokens", "kind")

    def __init__(self, tokens: CachedTokens, kind: int):
        self.tokens = tokens
        self.kind = kind

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the dense array, (B, H, count, dim)."""
        batch, heads, _, dim = self._exact.shape
        return batch, heads, self.tokens.count, dim

    @property
    def dtype(self) -> mx.Dtype:
        """That of the dense array."""
        return self._exact.dtype

    @property
    def _exact(self) -> mx.array:
        return self.tokens.kinds[self.kind][1]


Fetched = tuple[CompressedArray | CompressedTokens, ...]


class TurboQuantKVCache:
    """Keys and values in ``key_bits`` and ``value_bits`` bits per value.

    The first ``sink_tokens`` and the last ``window`` tokens stay in the model's dtype (up to 31
    more, because tokens are quantized in blocks of 32). Implements the cache interface of mlx-lm.

    Args:
        key_bits: Bits per value of the keys, 1 to 8.
        value_bits: Bits per value of the values, 1 to 8.
        window: Recent tokens that stay exact, 0 or more.
        sink_tokens: First tokens that stay exact, 0 or more.
        max_size: Tokens to hold at most: then the oldest block after the sinks is forgotten. None
            keeps all.
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
        max_size: int | None = None,
        seed: int = 0,
    ):
        check_bits(key_bits)
        check_bits(value_bits)
        for name, tokens in (("window", window), ("number of sink tokens", sink_tokens)):
            if not isinstance(tokens, int) or tokens < 0:
                raise ValueError(f"A {name} of {tokens} is not possible: use 0 or more tokens.")
        self.window = window
        self.sink_tokens = sink_tokens
        self.max_size = max_size
        self.offset = 0
        self.forgotten = 0
        self._packed = [
            PackedTokens(key_bits, seed, interleaved=True),
            PackedTokens(value_bits, seed, interleaved=False),
        ]
        self._buffers: list[mx.array] = []
        # Tokens whose last one the attention stores, which makes other buffers, and what was
        # returned for them.
        self._handed: CachedTokens | None = None
        self._returned: Fetched = ()
        # Whether other layers ask for the keys and values of this one; then the last are held.
        self.shared = False
        # The id of the model, and the number of this layer among the compressed ones.
        self.model_id: int | None = None
        self.layer: int | None = None
        self._fetched: Fetched | None = None
        self._views: list[PackedTokens] | None = None
        # New tokens that need neither a larger buffer nor the next block to be packed.
        self._room = 0
        if max_size is not None:
            most = min(max_size, _LARGEST) - sink_tokens - window - BLOCK - MAX_DECODE_ROWS
            if most < CAPACITY_UNIT:
                raise ValueError(
                    f"A cache of {max_size} tokens is too small for {sink_tokens} sinks and a "
                    f"window of {window}: use at least {max_size - most + CAPACITY_UNIT} tokens."
                )
            for store in self._packed:
                store.most = most // CAPACITY_UNIT * CAPACITY_UNIT

    @classmethod
    def holding(
        cls, packed: list[PackedTokens], exact: list[mx.array], window: int, sink_tokens: int
    ) -> "TurboQuantKVCache":
        """A cache of these packed keys and values and of these exact ones, sinks before others."""
        bits = (store.bits for store in packed)
        cache = cls(*bits, window=window, sink_tokens=sink_tokens, seed=packed[0].seed)
        cache._packed = packed
        cache.offset = packed[0].count + exact[0].shape[2]
        cache._keep(exact)
        return cache

    @property
    def merge(self) -> "Callable[[list[TurboQuantKVCache]], Any]":
        """What makes a :class:`.BatchTurboQuantKVCache` of caches, unless their size is limited."""
        if self.max_size is not None:
            raise AttributeError(f"A cache of at most {self.max_size} tokens cannot be batched.")
        from .batch_cache import BatchTurboQuantKVCache  # which is built on this module

        return BatchTurboQuantKVCache.merge

    @property
    def keys(self) -> mx.array | None:
        """The exact keys. Runs over several machines tie what they wait for to this array."""
        return self._exact[0] if self._exact else None

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self._exact[0] = keys

    @property
    def seed(self) -> int:
        """Seed of the random rotation."""
        return self._packed[0].seed

    @property
    def key_bits(self) -> int:
        """Bits per value of the packed keys."""
        return self._packed[0].bits

    @property
    def value_bits(self) -> int:
        """Bits per value of the packed values."""
        return self._packed[-1].bits

    @property
    def packed_tokens(self) -> int:
        """Tokens that are quantized."""
        return self._packed[0].count

    @property
    def exact_tokens(self) -> int:
        """Tokens that are held in the model's dtype: sinks and recent ones."""
        return self.offset - self.forgotten - self._packed[0].count

    @property
    def _exact(self) -> list[mx.array]:
        """Exact keys and values with free space behind them, or nothing."""
        if self._handed is not None:
            self._handed.settle()
            self._exact = [exact for _, exact in self._handed.kinds]
        return self._buffers

    @_exact.setter
    def _exact(self, buffers: list[mx.array]) -> None:
        self._buffers, self._handed, self._returned = buffers, None, ()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Fetched:
        """Append keys (B, H, n, dim) and values (B, H, n, value_dim) and return all tokens.

        The new tokens and all that were exact before the call are seen exactly by its queries.
        """
        handed = self._handed
        steady = handed is not None and handed.new is None and self._room > 0
        if steady and self._needs_no_arrays(keys.shape[2]):
            # Most steps of decoding: all but the new token and two counts is as before.
            self._room -= 1
            self.offset += 1
            handed.exact_count += 1
            handed.new = [keys, values]
            return self._returned
        tokens = self._append([keys, values])
        fetched = self._fetch(tokens, self._needs_no_arrays(keys.shape[2]))
        self._fetched = fetched if self.shared else None
        self._returned = fetched if self._handed is not None else ()
        return fetched

    def keys_and_values(self) -> Fetched:
        """What the last :meth:`update_and_fetch` returned, for layers without keys of their own."""
        if self._fetched is not None:
            return self._fetched
        return self._fetch(self._tokens(self._exact), False)

    def _fetch(self, tokens: CachedTokens, fused: bool) -> Fetched:
        return fetch(tokens, fused)

    def _needs_no_arrays(self, new: int) -> bool:
        """Whether the attention of so many new tokens only reads compressed ones."""
        return new == 1 and self.model_id in fused_models and self._packed[0].count > 0

    def _append(self, new: list[mx.array]) -> CachedTokens:
        """Append arrays (B, H, n, dim) of the kinds that the cache holds."""
        if new[0].shape[2] <= MAX_DECODE_ROWS:
            return self._append_few(new)
        return self._append_many(new)

    def _append_few(self, new: list[mx.array]) -> CachedTokens:
        """Write into the exact buffers, or let the attention do it, after making room there."""
        if self.layer == 0:
            end_turns()
        if not self._exact:
            self._keep([x[:, :, :0] for x in new])
        count, gap = new[0].shape[2], 0
        attention_stores = self._needs_no_arrays(count) and can_store(self._exact)
        if count > self._room:
            gap = self._pack_leaving() if attention_stores else 0
            self._make_room(count)
        self._room -= count
        self.offset += count
        tokens = self._tokens(self._exact, gap)
        if attention_stores:
            tokens.new = new
            self._buffers, self._handed = [], tokens
            return tokens
        for buffer, x in zip(self._exact, new):
            buffer[:, :, tokens.exact_count - count : tokens.exact_count] = x
        return tokens

    def _make_room(self, count: int) -> None:
        """Pack what has left the window, and let the exact buffers have ``count`` free places."""
        leaving, held = self._leaving(), self.exact_tokens
        if leaving or held + count > self._exact[0].shape[2]:
            self._keep(self._quantize_oldest([x[:, :, :held] for x in self._exact], leaving))
        counts = self.packed_tokens, self.exact_tokens
        until_block = tokens_until_block(*counts, self.sink_tokens, self.window)
        self._room = min(self._exact[0].shape[2] - self.exact_tokens, max(until_block, count))

    def _append_many(self, new: list[mx.array]) -> CachedTokens:
        """Quantize what leaves the window at once: a long chunk never enters the exact buffers."""
        take_turn(new, self.layer == 0)
        self.offset += new[0].shape[2]
        if self._exact:
            held = self.exact_tokens - new[0].shape[2]
            pairs = zip(self._exact, new)
            new = [mx.concatenate([buffer[:, :, :held], x], axis=2) for buffer, x in pairs]
        tokens = self._tokens(new)
        leaving = self._leaving()
        self._keep(self._quantize_oldest(new, leaving))
        if leaving:
            # Left to the end of the chunk, all layers would grow their packed buffers at once.
            mx.async_eval(self.state)
        return tokens

    def _tokens(self, exact: list[mx.array], gap: int = 0) -> CachedTokens:
        """All tokens. In the exact buffers a ``gap`` of packed ones may follow the sinks."""
        count = self.exact_tokens
        # Snapshots: a chunk that is packed in the same call must not be seen packed by it.
        if self._views is None:
            self._views = [store.view() for store in self._packed]
        keys, values = self._views[0], self._views[-1]
        sinks = min(count, self.sink_tokens)
        return CachedTokens(keys, values, exact[0], exact[-1], count + gap, sinks, sinks + gap)

    def _leaving(self) -> int:
        counts = self.packed_tokens, self.exact_tokens
        return leaving_tokens(*counts, self.sink_tokens, self.window)

    def _quantize_oldest(self, exact: list[mx.array], leaving: int) -> list[mx.array]:
        """Quantize the first ``leaving`` tokens after the sinks; return the others."""
        if leaving == 0:
            return exact
        self._pack(exact, leaving)
        start, stop = self.sink_tokens, self.sink_tokens + leaving
        return [mx.concatenate([x[:, :, :start], x[:, :, stop:]], axis=2) for x in exact]

    def _pack_leaving(self) -> int:
        """Quantize what has left the window, and leave it where it is; returns how many tokens."""
        leaving = self._leaving()
        if leaving:
            self._pack(self._exact, leaving)
        return leaving

    def _pack(self, exact: list[mx.array], leaving: int) -> None:
        before = self.packed_tokens
        self._views = None
        self._store_packed(exact, self.sink_tokens, leaving)
        self.forgotten += before + leaving - self.packed_tokens

    def _store_packed(self, arrays: list[mx.array], start: int, count: int) -> None:
        append_all(self._packed, arrays, start, count)

    def _keep(self, exact: list[mx.array]) -> None:
        self._exact = [self._buffer(x) for x in exact]
        self._room = 0

    def _buffer(self, tokens: mx.array) -> mx.array:
        """The exact tokens with free space behind them, up to what the window can ever need."""
        count = tokens.shape[2] + MAX_DECODE_ROWS
        most = max(count, self._most_exact)
        padding = min(-(-count // _STEP) * _STEP, most) - tokens.shape[2]
        return mx.pad(tokens, [(0, 0), (0, 0), (0, padding), (0, 0)])

    def trim(self, n: int) -> int:
        """Forget the last n tokens (at most all); packed tokens stay packed. Returns how many."""
        n = min(n, self.offset) if self.is_trimmable() else 0
        sinks = min(self.exact_tokens, self.sink_tokens)
        recent = self.exact_tokens - sinks
        packed = min(max(n - recent, 0), self.packed_tokens)
        for store in self._packed:
            store.count -= packed
        self._views, self._room = None, 0
        self.offset -= n
        return n

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be taken back: until the oldest were forgotten."""
        return self.forgotten == 0

    def size(self) -> int:
        """Tokens in the cache."""
        return self.offset - self.forgotten

    def empty(self) -> bool:
        """Whether no token was ever stored."""
        return not self._exact

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held, free space in the buffers included."""
        return sum(x.nbytes for x in (*self._exact, *self._packed))

    @property
    def fp16_nbytes(self) -> int:
        """Bytes that the same tokens take in a dense 16-bit cache."""
        return 2 * self.token_values * self.size()

    @property
    def token_values(self) -> int:
        """Values of one token: those of keys and values of all heads and rows."""
        return sum(x.size // x.shape[2] for x in self._exact)

    @property
    def token_nbytes(self) -> int:
        """Bytes that one more packed token takes."""
        pairs = zip(self._exact, self._packed)
        return sum(math.prod(x.shape[:2]) * store.vector_nbytes(x.shape[3]) for x, store in pairs)

    @property
    def exact_nbytes(self) -> int:
        """Bytes that the exact tokens of a long text take."""
        return self._most_exact * sum(x.nbytes // x.shape[2] for x in self._exact)

    @property
    def _most_exact(self) -> int:
        return self.sink_tokens + self.window + BLOCK + MAX_DECODE_ROWS

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> None | str | mx.array:
        """The mask for n new tokens, as mlx-lm's caches return it."""
        if window_size is None and (n == 1 or not return_array):
            return None if n == 1 else "causal"
        if self._exact and n <= MAX_DECODE_ROWS:
            self._make_room(n)  # now, because it changes the order of a limited cache
        sinks = min(self.exact_tokens, self.sink_tokens)
        positions = [
            mx.arange(sinks),
            self._packed[0].order() + sinks + self.forgotten,
            mx.arange(sinks + self.forgotten + self.packed_tokens, self.offset + n),
        ]
        distance = mx.arange(self.offset, self.offset + n)[:, None] - mx.concatenate(positions)
        mask = distance >= 0
        return mask if window_size is None else mask & (distance < window_size)

    @property
    def state(self) -> tuple[Any, ...]:
        """All settings, counts and arrays, without free space; what ``from_state`` takes."""
        count, first = self.exact_tokens, self._packed[0]
        exact = [x[:, :, :count] for x in self._exact] or [None] * len(self._packed)
        return (
            *(self.key_bits, self.value_bits, self.window, self.sink_tokens, self.seed),
            *(
                self.max_size,
                self.shared,
                self.offset,
                self.forgotten,
                first.count,
                first.oldest,
            ),
            *exact,
            *(array for store in self._packed for array in store.used()),
        )

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        settings, counts, arrays = state[:7], state[7:11], state[11:]
        check_state(len(settings) == 7 and len(counts) == 4, f"it has {len(state)} parts")
        *bits, window, sink_tokens, seed, max_size, shared = settings
        numbers = (*bits, window, sink_tokens, *counts, *([] if max_size is None else [max_size]))
        check_state(all(map(_is_count, numbers)), "a number is none of tokens or bits")
        check_state(type(seed) is int and seed >= 0, f"a seed of {seed}")
        self.__init__(*bits, window=window, sink_tokens=sink_tokens, max_size=max_size, seed=seed)
        self.shared = bool(shared)
        kinds = len(self._packed)
        check_state(len(arrays) == 4 * kinds, f"it has {len(state)} parts")
        self.offset, self.forgotten, count, oldest = counts
        exact = self.size() - count
        check_state(exact >= (self.sink_tokens if count else 0), f"{exact} exact tokens")
        check_state(max_size is not None or not self.forgotten, "tokens forgotten without a limit")
        self._exact = [x for x in arrays[:kinds] if x is not None]
        check_state(bool(self._exact) or not self.offset, "tokens without arrays")
        check_state(len(self._exact) in (0, kinds), "an array is missing")
        for i, store in enumerate(self._packed):
            if self._exact:
                heads = check_vectors(self._exact[i], exact, self._exact[0])
                used = arrays[kinds + 3 * i : kinds + 3 * i + 3]
                store.restore(count, oldest, (*heads, self._exact[i].shape[-1]), *used)

    @classmethod
    def from_state(cls, state: tuple[Any, ...]) -> "TurboQuantKVCache":
        """A cache with the ``state`` of another one.

        Raises:
            ValueError: a state that no cache can have.
        """
        cache = cls.__new__(cls)
        cache.state = state
        return cache


# Models, by their ids, that decode one token without arrays of keys and values.
fused_models: set[int] = set()


def fetch(tokens: CachedTokens, fused: bool) -> Fetched:
    """All keys and all values, or keys that are the values, for attention that knows ``tokens``.

    They are arrays, for any other attention, unless the attention is ``fused``.
    """
    if fused:
        keys = CompressedTokens(tokens, 0)
        return (keys,) if tokens.values is tokens.keys else (keys, CompressedTokens(tokens, 1))
    arrays = tuple(map(CompressedArray, tokens.dense()))
    for array in arrays:
        array.tokens = tokens
    return arrays


def can_store(exact: list[mx.array]) -> bool:
    """Whether the attention kernel may store a token: it copies these buffers (B, H, n, dim).

    With two launches fewer, that pays for a short window. Vectors are copied in pieces of 16 bytes.
    """
    short = exact[0].shape[2] <= _MOST_COPIED
    return short and len(exact) == 2 and all(x.shape[3] % 8 == 0 for x in exact)


def leaving_tokens(packed: int, exact: int, sink_tokens: int, window: int) -> int:
    """How many exact tokens have left the window, in whole blocks of packed tokens."""
    outside = exact - sink_tokens - window
    return max(0, (packed + outside) // BLOCK * BLOCK - packed)


def tokens_until_block(packed: int, exact: int, sink_tokens: int, window: int) -> int:
    """How many more exact tokens it takes until the next block of packed tokens leaves the window.

    It is not positive while one has still to be packed.
    """
    outside = exact - sink_tokens - window
    return (packed // BLOCK + 1) * BLOCK - (packed + outside)


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number <= _LARGEST
