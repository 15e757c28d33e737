"""The compressed KV cache of one attention layer for sequences of different length."""

from functools import lru_cache
from itertools import groupby

import mlx.core as mx

from .attention import MAX_DECODE_ROWS, CachedTokens, Extent, visible_columns
from .cache import (
    Fetched,
    TurboQuantKVCache,
    fetch,
    fused_models,
    leaving_tokens,
    tokens_until_block,
)
from .constants import constant
from .storage import BatchPackedTokens, append_rows
from .turns import take_turn

# Room for this many new tokens in the exact buffers, which are copied when it is used up.
_ROOM = 64


class CausalMask(mx.array):
    """A boolean mask that says no more than that a query does not see later tokens.

    Which tokens a sequence has, the compressed tokens know themselves.
    """


class BatchTurboQuantKVCache:
    """What :class:`.TurboQuantKVCache` holds, for a batch of sequences that grow, join and leave.

    Packed tokens of sequence b begin at the start of row b of the packed buffers. In the exact
    buffers (B, H, capacity, dim) the sinks come first, and the recent tokens of all sequences end
    at the same place, so that a step writes one column. The sinks of a sequence are among its
    recent tokens until its first block is packed.

    Implements the interface of mlx-lm's ``BatchKVCache``. Prompts of different length are padded
    on the right, which :meth:`prepare` announces.
    """

    def __init__(self, packed: list[BatchPackedTokens], window: int, sink_tokens: int):
        self.window = window
        self.sink_tokens = sink_tokens
        self._packed = packed
        self._exact: list[mx.array] = []
        self._end = sink_tokens
        self._sinks = [0] * len(packed[0].counts)
        self._recent = [0] * len(packed[0].counts)
        # How many tokens of each sequence are still to come while a padded prompt is read.
        self._expected: list[int] | None = None
        self.shared = False
        self.model_id: int | None = None
        self.layer: int | None = None
        self._fetched: Fetched | None = None
        # So many steps of one token change nothing of what was returned but the new tokens.
        self._steady = 0
        self._returned: Fetched = ()

    @classmethod
    def merge(cls, caches: list[TurboQuantKVCache]) -> "BatchTurboQuantKVCache":
        """The sequences of ``caches``, one each, as a batch.

        Raises:
            ValueError: caches with different settings.
        """
        batch, *others = (cls._of_one(cache) for cache in caches)
        for other in others:
            batch.extend(other)
        return batch

    @classmethod
    def _of_one(cls, cache: TurboQuantKVCache) -> "BatchTurboQuantKVCache":
        packed = [BatchPackedTokens.join([store]) for store in cache._packed]
        row = cls(packed, cache.window, cache.sink_tokens)
        row.shared, row.model_id, row.layer = cache.shared, cache.model_id, cache.layer
        if not cache.empty():
            row._sinks = [cache.sink_tokens if cache.packed_tokens else 0]
            row._recent = [cache.exact_tokens - row._sinks[0]]
            before = cache.sink_tokens - row._sinks[0]
            exact = [_padded(x, before, 0) for x in cache._exact]
            row._keep(exact, [cache.sink_tokens + row._recent[0]])
        return row

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        parts = zip(self._sinks, self._packed[0].counts, self._recent)
        return [sum(part) for part in parts]

    @property
    def offset(self) -> mx.array:
        """Tokens of each sequence, int32 (B,): the position of its next one."""
        return _offsets(*self.lengths)

    @property
    def keys(self) -> mx.array | None:
        """The exact keys, as those of :class:`.TurboQuantKVCache`."""
        return self._exact[0] if self._exact else None

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self._exact[0] = keys
        self._forget_step()

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
        """Tokens of all sequences that are quantized."""
        return sum(self._packed[0].counts)

    @property
    def exact_tokens(self) -> int:
        """Tokens of all sequences that are held in the model's dtype."""
        return sum(self._sinks) + sum(self._recent)

    def prepare(
        self,
        *,
        left_padding: list[int] | None = None,
        lengths: list[int] | None = None,
        right_padding: list[int] | None = None,
    ) -> None:
        """Expect a prompt of ``lengths[b]`` tokens of sequence b, then padding.

        Raises:
            ValueError: padding on the left.
        """
        if left_padding is not None and any(left_padding):
            raise ValueError(
                f"Padding of {left_padding} on the left is not possible: pad prompts on the right."
            )
        if right_padding is not None and any(right_padding):
            self._expected = list(lengths)
            self._forget_step()

    def finalize(self) -> None:
        """The padded prompt has been read; nothing was kept of the padding."""
        self._expected = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Fetched:
        """Append keys (B, H, n, dim) and values (B, H, n, value_dim) and return all tokens.

        The new tokens and all that were exact before the call are seen exactly by its queries.
        """
        fused = self._needs_no_arrays(keys.shape[2])
        if fused and self._steady:
            tokens = self._returned[0].tokens
            self._write([keys, values])
            tokens.exact_count = self._end
            self._recent = [recent + 1 for recent in self._recent]
            self._steady -= 1
            return self._returned
        tokens = self._append([keys, values])
        fetched = fetch(tokens, fused)
        self._fetched = fetched if self.shared else None
        same_buffers = tokens.exact_keys is self._exact[0]
        if fused and same_buffers and tokens.keys.counts is self._packed[0].counts:
            self._returned, self._steady = fetched, self._steps()
        return fetched

    def _needs_no_arrays(self, new: int) -> bool:
        """As that of :class:`.TurboQuantKVCache`."""
        return new == 1 and self.model_id in fused_models and self._packed[0].count > 0

    def keys_and_values(self) -> Fetched:
        """What the last :meth:`update_and_fetch` returned, for layers without keys of their own."""
        return self._fetched

    def _append(self, new: list[mx.array]) -> CachedTokens:
        """Append arrays (B, H, n, dim) of the kinds that the cache holds."""
        self._forget_step()
        count = new[0].shape[2]
        added = self._added(count)
        if count <= MAX_DECODE_ROWS and min(added) == count:
            self._reserve(new)
            self._write(new)
            exact, end = self._exact, self._end
        else:
            take_turn(new, self.layer == 0)
            exact, end = self._joined(new), self._end + count
        tokens = self._tokens(exact, end, [recent + count for recent in self._recent])
        self._recent = [recent + new for recent, new in zip(self._recent, added)]
        ends = [end - count + new for new in added]
        self._pack(exact, ends)
        if exact is not self._exact:
            self._keep(exact, ends)
            # Left to the end of the chunk, all layers would grow their packed buffers at once.
            mx.async_eval(self.state)
        return tokens

    def _write(self, new: list[mx.array]) -> None:
        """Write new tokens behind the exact ones, where there is room."""
        start, self._end = self._end, self._end + new[0].shape[2]
        for buffer, x in zip(self._exact, new):
            buffer[:, :, start : self._end] = x

    def _forget_step(self) -> None:
        """The next step is not like the one before, whose buffers need not be kept for it."""
        self._returned, self._steady = (), 0

    def _steps(self) -> int:
        """Steps of one token before one that packs a block or finds the exact buffers full."""
        until_block = min(
            tokens_until_block(packed, sinks + recent, self.sink_tokens, self.window)
            for packed, sinks, recent in zip(self._packed[0].counts, self._sinks, self._recent)
        )
        return min(until_block - 1, self._exact[0].shape[2] - self._end)

    def _leaving(self, row: int) -> int:
        """How many exact tokens of a sequence have left the window, in whole blocks."""
        exact = self._sinks[row] + self._recent[row]
        return leaving_tokens(self._packed[0].counts[row], exact, self.sink_tokens, self.window)

    def _added(self, count: int) -> list[int]:
        """How many of ``count`` new tokens are no padding, for each sequence."""
        if self._expected is None:
            return [count] * len(self._recent)
        added = [min(count, expected) for expected in self._expected]
        self._expected = [expected - new for expected, new in zip(self._expected, added)]
        return added

    def _reserve(self, new: list[mx.array]) -> None:
        """Make room for new tokens in the exact buffers."""
        if not self._exact:
            self._keep(self._joined([x[:, :, :0] for x in new]), [self._end])
        elif self._end + new[0].shape[2] > self._exact[0].shape[2]:
            self._keep(self._exact, [self._end])

    def _joined(self, new: list[mx.array]) -> list[mx.array]:
        """The exact tokens and the new ones, without free space behind them."""
        if not self._exact:
            return [_padded(x, self.sink_tokens, 0) for x in new]
        pairs = zip(self._exact, new)
        return [mx.concatenate([buffer[:, :, : self._end], x], axis=2) for buffer, x in pairs]

    def _tokens(self, exact: list[mx.array], end: int, recent: list[int]) -> CachedTokens:
        packed = [store.view() for store in self._packed]
        return CachedTokens(
            *(packed[0], packed[-1], exact[0], exact[-1]),
            exact_count=end,
            sink_count=max(self._sinks),
            recent_start=end - max(recent),
            extents=self._extents(end, recent),
        )

    def _extents(self, end: int, recent: list[int]) -> tuple[Extent, ...]:
        """One for each sequence, or none where they are all the same."""
        parts = zip(self._packed[0].counts, self._sinks, recent)
        extents = tuple(Extent(packed, sinks, end - count) for packed, sinks, count in parts)
        return extents if len(set(extents)) > 1 else ()

    def _pack(self, exact: list[mx.array], ends: list[int]) -> None:
        """Quantize what leaves the windows; sequence b ends at ``ends[b]`` of the exact tokens."""
        parts = list(zip(self._packed[0].counts, self._sinks, self._recent, ends))
        for part, group in groupby(range(len(parts)), parts.__getitem__):
            _, sinks, recent, end = part
            group = list(group)
            leaving = self._leaving(group[0])
            if not leaving:
                continue
            rows = slice(group[0], group[-1] + 1)
            new_sinks = self.sink_tokens - sinks
            start = end - recent + new_sinks
            if new_sinks:
                for x in exact:
                    x[rows, :, sinks : self.sink_tokens] = x[rows, :, start - new_sinks : start]
            append_rows(self._packed, rows, [x[rows, :, start : start + leaving] for x in exact])
            self._sinks[rows] = [self.sink_tokens] * len(group)
            self._recent[rows] = [recent - new_sinks - leaving] * len(group)

    def _keep(self, exact: list[mx.array], ends: list[int]) -> None:
        """Hold sinks and recent tokens, which end at ``ends`` (one for each or for all), anew."""
        most = max(self._recent)
        kept = ([x[:, :, : self.sink_tokens], _last(x, ends, most)] for x in exact)
        self._exact = [_padded(mx.concatenate(parts, axis=2), 0, _ROOM) for parts in kept]
        self._end = self.sink_tokens + most
        self._forget_step()

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> None | str | mx.array:
        """The mask for n new tokens: boolean (B, 1, n, columns) unless all lengths are the same."""
        end, recent = self._end + n, [count + n for count in self._recent]
        extents = self._extents(end, recent)
        if not extents and window_size is None and (n == 1 or not return_array):
            return None if n == 1 else "causal"
        queries = mx.array(self.lengths)[:, None] + mx.arange(n)
        distance = queries[:, None, :, None] - self._columns(n)[:, None, None]
        mask = distance >= 0
        if extents:
            columns = (max(self._sinks), self._packed[0].count, end - max(recent), end)
            mask = mask & visible_columns(extents, *columns)
        return CausalMask(mask) if window_size is None else mask & (distance < window_size)

    def _columns(self, n: int) -> mx.array:
        """The token of each column after n new ones: int32 (B, columns), any number for none."""
        lengths, sinks = (mx.array(x)[:, None] for x in (self.lengths, self._sinks))
        sink_columns = mx.arange(max(self._sinks))
        parts = [
            mx.broadcast_to(sink_columns, (len(self._sinks), sink_columns.size)),
            sinks + mx.arange(self._packed[0].count),
            lengths + mx.arange(-max(self._recent), n),
        ]
        return mx.concatenate(parts, axis=-1)

    def filter(self, rows: list[int]) -> None:
        """Keep only the sequences ``rows``."""
        self._packed = [store.take(rows) for store in self._packed]
        self._sinks, self._recent = ([x[row] for row in rows] for x in (self._sinks, self._recent))
        if self._exact:
            self._keep([x[rows] for x in self._exact], [self._end])

    def extend(self, other: "BatchTurboQuantKVCache") -> None:
        """Add the sequences of another batch.

        Raises:
            ValueError: a batch with different settings.
        """
        settings, others = (
            (
                x.key_bits,
                x.value_bits,
                x.window,
                x.sink_tokens,
                x._packed[0].seed,
            )
            for x in (self, other)
        )
        if settings != others:
            raise ValueError(
                f"Caches with different settings cannot be batched: {others} beside {settings} "
                "(bits of keys and values, window, sinks, seed): use the same."
            )
        end = max(self._end, other._end)
        exact = []
        for like in self._exact or other._exact:
            i = len(exact)
            exact.append(mx.concatenate([batch._ending(end, i, like) for batch in (self, other)]))
        pairs = zip(self._packed, other._packed)
        self._packed = [BatchPackedTokens.join(list(pair)) for pair in pairs]
        self._sinks, self._recent = self._sinks + other._sinks, self._recent + other._recent
        if exact:
            self._keep(exact, [end])

    def _ending(self, end: int, kind: int, like: mx.array) -> mx.array:
        """The exact tokens of one kind, moved to end at ``end``; if there are none, zeros."""
        if not self._exact:
            return mx.zeros((len(self._recent), like.shape[1], end, like.shape[3]), like.dtype)
        x = self._exact[kind]
        sinks, recent = x[:, :, : self.sink_tokens], x[:, :, self.sink_tokens : self._end]
        return mx.concatenate([sinks, _padded(recent, end - self._end, 0)], axis=2)

    def extract(self, row: int) -> TurboQuantKVCache:
        """The cache of one sequence alone."""
        return self._extract(row, TurboQuantKVCache)

    def _extract(self, row: int, kind: type[TurboQuantKVCache]) -> TurboQuantKVCache:
        sinks, recent, rows = self._sinks[row], self._recent[row], slice(row, row + 1)
        exact = [
            mx.concatenate([x[rows, :, :sinks], _last(x[rows], [self._end], recent)], axis=2)
            for x in self._exact
        ]
        packed = [store.row(row) for store in self._packed]
        cache = kind.holding(packed, exact, self.window, self.sink_tokens)
        cache.shared, cache.model_id, cache.layer = self.shared, self.model_id, self.layer
        return cache

    def trim(self, n: int) -> int:
        """Forget the last n tokens of each sequence (at most all). Returns how many."""
        self._forget_step()
        n = min(n, max(self.lengths))
        recent = [min(n, count) for count in self._recent]
        packed = [min(n - gone, count) for gone, count in zip(recent, self._packed[0].counts)]
        sinks = zip(recent, packed, self._sinks)
        self._sinks = [count - min(n - a - b, count) for a, b, count in sinks]
        self._recent = [count - gone for count, gone in zip(self._recent, recent)]
        for store in self._packed:
            store.trim(packed)
        self._end = max(self._end - n, self.sink_tokens)
        return n

    def is_trimmable(self) -> bool:
        """Always: any number of tokens can be forgotten."""
        return True

    def size(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def empty(self) -> bool:
        """Whether no token was ever stored."""
        return not self._exact

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held, free space in the buffers included."""
        return sum(x.nbytes for x in (*self._exact, *self._packed))

    @property
    def fp16_nbytes(self) -> int:
        """Bytes that a dense 16-bit cache, as long as the longest sequence, takes."""
        return sum(2 * x.size // x.shape[2] * self.size() for x in self._exact)

    @property
    def token_nbytes(self) -> int:
        """Bytes that one more packed token of a sequence takes."""
        pairs = zip(self._exact, self._packed)
        return sum(x.shape[1] * store.vector_nbytes(x.shape[3]) for x, store in pairs)

    @property
    def state(self) -> tuple[mx.array | None, ...]:
        """All arrays, for ``mx.eval``."""
        packed = (x for store in self._packed for x in (store.codes, store.scales, store.mean))
        return (*self._exact, *packed)


@lru_cache(maxsize=64)
def _offsets(*lengths: int) -> mx.array:
    """One array for all layers of a step."""
    return constant(list(lengths))


def _padded(x: mx.array, before: int, after: int) -> mx.array:
    return mx.pad(x, [(0, 0), (0, 0), (before, after), (0, 0)])


def _last(x: mx.array, ends: list[int], count: int) -> mx.array:
    """The last ``count`` tokens of x (B, H, n, dim) before ``ends``, one for all rows or each."""
    if len(set(ends)) == 1:
        return x[:, :, ends[0] - count : ends[0]]
    index = mx.array(ends)[:, None] + mx.arange(-count, 0)
    return mx.take_along_axis(x, mx.maximum(index, 0)[:, None, :, None], axis=2)
