"""The compressed KV cache of one attention layer for sequences of different lengths.

The cache owns two stores, as the cache of one sequence does:

    _packed  row b of the buffers begins with the packed tokens of sequence b
    _exact   (B, H, capacity, dim): the sinks come first, and the recent tokens of all sequences end
             at the same place, ``_end``, so that a step writes one column

The sinks of a sequence are among its recent tokens until its first block is packed. Places between
sinks and recent tokens hold no token.
"""

from functools import lru_cache
from itertools import groupby
from typing import Any

import mlx.core as mx

from ..codec.constants import constant
from ..kernels.attention import MAX_DECODE_ROWS
from ..kernels.storage import PackedKV
from ..kernels.tokens import Span, VisibleTokens, longer, visible_columns
from .base import CompressedCache, write_tokens
from .blocks import CacheSettings
from .fetched import Link

# Free space in the exact buffers, in tokens; they are copied when it is used up.
_ROOM = 64


class CausalMask(mx.array):
    """A boolean mask that is equivalent to causal attention over the tokens of each sequence.

    Decode attention does not read it, because its tokens tell which columns each sequence has.
    """


class BatchTurboQuantKVCache(CompressedCache):
    """A batch of :class:`.TurboQuantKVCache` sequences that grow, join and leave.

    Implements the interface of mlx-lm's ``BatchKVCache``. Prompts of different lengths are padded
    on the right, as :meth:`prepare` announces. Sequences come from caches of ``single_class``, and
    become such caches when they leave.
    """

    def __init__(
        self,
        single_class: type,
        settings: CacheSettings,
        packed: PackedKV,
        link: Link,
        exact: list[mx.array],
        forgotten: int,
    ):
        """Begin with one sequence and its exact tokens (1, H, n, dim), sinks first."""
        super().__init__(settings, packed, link)
        self._single_class = single_class
        self.forgotten = [forgotten]
        self._end, self._sinks, self._recent = self.sink_tokens, [0], [0]
        # Tokens of each sequence that are still to come during the prefill of padded prompts.
        self._expected: list[int] | None = None
        if exact:
            self._sinks = [self.sink_tokens if packed.count else 0]
            self._recent = [exact[0].shape[2] - self._sinks[0]]
            missing, end = self.sink_tokens - self._sinks[0], self.sink_tokens + self._recent[0]
            self._keep([longer(x, end, before=missing) for x in exact], [end])

    @property
    def lengths(self) -> list[int]:
        """Number of tokens held of each sequence."""
        parts = zip(self._sinks, self._packed.counts, self._recent)
        return [sum(part) for part in parts]

    @property
    def _offsets(self) -> list[int]:
        return [sum(pair) for pair in zip(self.lengths, self.forgotten)]

    @property
    def offset(self) -> mx.array:
        """Tokens appended to each sequence, int32 (B,): the position of its next token."""
        return _as_array(*self._offsets)

    @property
    def packed_tokens(self) -> int:
        """Number of packed tokens in all sequences."""
        return sum(self._packed.counts)

    @property
    def exact_tokens(self) -> int:
        """Number of tokens in all sequences that are held in the model's dtype."""
        return sum(self._sinks) + sum(self._recent)

    def prepare(
        self,
        *,
        left_padding: list[int] | None = None,
        lengths: list[int] | None = None,
        right_padding: list[int] | None = None,
    ) -> None:
        """Expect a prompt of ``lengths[b]`` tokens for sequence b, then padding.

        Raises:
            ValueError: padding on the left.
        """
        if left_padding is not None and any(left_padding):
            raise ValueError(
                f"Padding of {left_padding} on the left is not possible: pad prompts on the right."
            )
        if right_padding is not None and any(right_padding):
            self._expected = list(lengths)
            self._step = None

    def finalize(self) -> None:
        """End the prefill of padded prompts; none of the padding is held."""
        self._expected = None

    def _take_expected(self, count: int) -> list[int]:
        """How many of ``count`` new tokens of each sequence are not padding."""
        if self._expected is None:
            return [count] * len(self._recent)
        added = [min(count, expected) for expected in self._expected]
        self._expected = [expected - new for expected, new in zip(self._expected, added)]
        return added

    def _hold(self, new: list[mx.array], is_chunk: bool) -> None:
        """Append tokens to the exact buffers, in place if there is room."""
        count = new[0].shape[2]
        if not self._exact:
            self._exact = [longer(x[:, :, :0], self.sink_tokens) for x in new]
        elif not is_chunk and self._end + count > self._exact[0].shape[2]:
            self._keep(self._exact, [self._end])
        if self._end + count > self._exact[0].shape[2]:
            capacity = self._end + (count if is_chunk else _ROOM)
            self._exact = [longer(x[:, :, : self._end], capacity) for x in self._exact]
        self._write(new)

    def _write(self, new: list[mx.array]) -> None:
        count = new[0].shape[2]
        for buffer, x in zip(self._exact, new):
            write_tokens(buffer, x, self._end)
        self._end += count
        self._recent = [recent + count for recent in self._recent]

    def _steps_alike(self) -> int:
        """Number of one-token steps before one packs a block or finds the exact buffers full.

        There are none during the prefill of padded prompts, in which each step counts padding.
        """
        if self._expected is not None:
            return 0
        until_block = min(
            self.settings.until_block(packed, sinks + recent)
            for packed, sinks, recent in zip(self._packed.counts, self._sinks, self._recent)
        )
        return min(until_block - 1, self._exact[0].shape[2] - self._end)

    def _tokens(self) -> VisibleTokens:
        """All tokens, as attention reads them."""
        recent_start = self._end - max(self._recent)
        spans = self._spans(self._end, self._recent)
        return self._seen(self._end, max(self._sinks), recent_start, *spans)

    def _spans(self, end: int, recent: list[int]) -> tuple[Span, ...]:
        """The span of each sequence, or none if all are the same."""
        parts = zip(self._packed.counts, self._sinks, recent)
        spans = tuple(Span(packed, sinks, end - count) for packed, sinks, count in parts)
        return spans if len(set(spans)) > 1 else ()

    def _pack(self, count: int) -> bool:
        """Quantize the blocks that have left the windows; return whether what is held changed.

        Some of ``count`` new tokens may be padding: it has columns in this call but is not held.
        Neighbouring sequences in the same state are packed together.
        """
        padding = [count - real for real in self._take_expected(count)]
        self._recent = [recent - more for recent, more in zip(self._recent, padding)]
        ends = [self._end - more for more in padding]
        has_packed = False
        parts = list(zip(self._packed.counts, self._sinks, self._recent, ends))
        for (packed, sinks, recent, end), group in groupby(range(len(parts)), parts.__getitem__):
            leaving = self.settings.leaving(packed, sinks + recent)
            if not leaving:
                continue
            group = list(group)
            rows = slice(group[0], group[-1] + 1)
            new_sinks = self.sink_tokens - sinks
            start = end - recent + new_sinks
            if new_sinks:
                for x in self._exact:
                    x[rows, :, sinks : self.sink_tokens] = x[rows, :, start - new_sinks : start]
            new = [x[rows, :, start : start + leaving] for x in self._exact]
            forgotten = self._packed.append(new, rows)
            self._sinks[rows] = [self.sink_tokens] * len(group)
            self._recent[rows] = [recent - new_sinks - leaving] * len(group)
            self.forgotten[rows] = [count + forgotten for count in self.forgotten[rows]]
            has_packed = True
        if count > MAX_DECODE_ROWS or any(padding):
            self._keep(self._exact, ends)
        return has_packed or any(padding)

    def _keep(self, exact: list[mx.array], ends: list[int]) -> None:
        """Copy sinks and recent tokens to new buffers; ``ends`` is one end, or one per row."""
        most = max(self._recent)
        self._end = self.sink_tokens + most
        kept = ([x[:, :, : self.sink_tokens], _last(x, ends, most)] for x in exact)
        self._exact = [longer(mx.concatenate(parts, axis=2), self._end + _ROOM) for parts in kept]

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> None | str | mx.array:
        """The mask for n new tokens: boolean (B, 1, n, columns) if lengths differ."""
        end, recent = self._end + n, [count + n for count in self._recent]
        spans = self._spans(end, recent)
        if not spans and window_size is None and (n == 1 or not return_array):
            return None if n == 1 else "causal"
        queries = mx.array(self._offsets)[:, None] + mx.arange(n)
        distance = queries[:, None, :, None] - self._columns(n)[:, None, None]
        mask = distance >= 0
        if spans:
            columns = (max(self._sinks), self._packed.count, end - max(recent), end)
            mask = mask & visible_columns(spans, *columns)
        return CausalMask(mask) if window_size is None else mask & (distance < window_size)

    def _columns(self, n: int) -> mx.array:
        """The position of each column after n new tokens: int32 (B, columns), any if empty."""
        offsets, sinks, forgotten = (
            mx.array(x)[:, None] for x in (self._offsets, self._sinks, self.forgotten)
        )
        sink_columns = mx.arange(max(self._sinks))
        parts = [
            mx.broadcast_to(sink_columns, (len(self._sinks), sink_columns.size)),
            sinks + forgotten + mx.arange(self._packed.count),
            offsets + mx.arange(-max(self._recent), n),
        ]
        return mx.concatenate(parts, axis=-1)

    def filter(self, rows: list[int]) -> None:
        """Keep only the sequences ``rows``."""
        self._step = None
        self._packed = self._packed.take(rows)
        self._sinks, self._recent, self.forgotten = (
            [x[row] for row in rows] for x in (self._sinks, self._recent, self.forgotten)
        )
        if self._exact:
            self._keep([x[rows] for x in self._exact], [self._end])

    def extend(self, other: "BatchTurboQuantKVCache") -> None:
        """Add the sequences of another batch.

        Raises:
            ValueError: a batch with different settings or weights.
        """
        weights, others = self.link.weights, other.link.weights
        if None not in (weights, others) and weights is not others:
            if weights.identity() != others.identity():
                raise ValueError(
                    "Caches made with different weights cannot be batched: use one model."
                )
        if other.settings != self.settings:
            raise ValueError(
                f"Caches with different settings cannot be batched ({other.settings} and "
                f"{self.settings}): use the same settings."
            )
        self._step = None
        end = max(self._end, other._end)
        exact = []
        for i, like in enumerate(self._exact or other._exact):
            exact.append(mx.concatenate([batch._ending(end, i, like) for batch in (self, other)]))
        self._packed = PackedKV.join([self._packed, other._packed])
        self._sinks, self._recent = self._sinks + other._sinks, self._recent + other._recent
        self.forgotten = self.forgotten + other.forgotten
        if exact:
            self._keep(exact, [end])

    def _ending(self, end: int, side: int, like: mx.array) -> mx.array:
        """The exact keys or values, moved to end at ``end``; if there are none, zeros."""
        if not self._exact:
            return mx.zeros((len(self._recent), like.shape[1], end, like.shape[3]), like.dtype)
        x = self._exact[side]
        sinks, recent = x[:, :, : self.sink_tokens], x[:, :, self.sink_tokens : self._end]
        recent = longer(recent, end - self.sink_tokens, before=end - self._end)
        return mx.concatenate([sinks, recent], axis=2)

    def extract(self, row: int) -> Any:
        """The cache of one sequence alone."""
        return self._single_class.of_row(self, row)

    def exact_row(self, row: int) -> list[mx.array]:
        """The exact keys and values (1, H, n, dim) of one sequence, sinks first."""
        sinks, recent, rows = self._sinks[row], self._recent[row], slice(row, row + 1)
        return [
            mx.concatenate([x[rows, :, :sinks], _last(x[rows], [self._end], recent)], axis=2)
            for x in self._exact
        ]

    def trim(self, n: int) -> int:
        """Forget the last n tokens of each sequence (at most all), and return how many."""
        self._step = None
        n = min(n, max(self.lengths)) if self.is_trimmable() else 0
        recent = [min(n, count) for count in self._recent]
        packed = [min(n - gone, count) for gone, count in zip(recent, self._packed.counts)]
        sinks = zip(recent, packed, self._sinks)
        self._sinks = [count - min(n - a - b, count) for a, b, count in sinks]
        self._recent = [count - gone for count, gone in zip(self._recent, recent)]
        self._packed.trim(packed)
        self._end = max(self._end - n, self.sink_tokens)
        return n

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be trimmed: false once the oldest were forgotten."""
        return not any(self.forgotten)

    def size(self) -> int:
        """Number of tokens of the longest sequence."""
        return max(self.lengths)

    @property
    def state(self) -> tuple[mx.array, ...]:
        """All arrays, for ``mx.eval``."""
        return (*self._exact, *self._rotary, *self._packed.arrays)


@lru_cache(maxsize=64)
def _as_array(*numbers: int) -> mx.array:
    """The numbers as one array for all layers of a step."""
    return constant(list(numbers))


def _last(x: mx.array, ends: list[int], count: int) -> mx.array:
    """The last ``count`` tokens of x (B, H, n, dim) before ``ends``: one end, or one per row."""
    if len(set(ends)) == 1:
        return x[:, :, ends[0] - count : ends[0]]
    index = mx.array(ends)[:, None] + mx.arange(-count, 0)
    return mx.take_along_axis(x, mx.maximum(index, 0)[:, None, :, None], axis=2)
