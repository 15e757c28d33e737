"""The base class of the caches for one sequence and for a batch: it stores and fetches tokens."""

from functools import lru_cache
from operator import attrgetter

import mlx.core as mx
import numpy as np

from ..codec.constants import constant
from ..kernels.attention import MAX_DECODE_ROWS
from ..kernels.runtime import backend
from ..kernels.storage import PackedKV
from ..kernels.tokens import Span, VisibleTokens
from .blocks import CacheSettings
from .fetched import Fetched, KVHandle, Link, fetch, submit_keys


class CompressedCache:
    """The tokens of one layer, each either exact or packed.

    ``_exact`` holds keys and values (B, H, capacity, dim), or latent vectors, in the model's dtype
    with free space behind them. It is empty before the first tokens. Attention never changes the
    arrays that it is given.

    Subclasses lay out the exact buffers. ``_hold`` makes room for new tokens and calls ``_write``;
    ``_tokens`` returns what attention sees; ``_pack`` moves whole blocks to the packed store.
    ``_steps_alike`` counts the steps until one needs more room or packs a block.
    """

    key_bits = property(attrgetter("settings.key_bits"), doc="Bits per value of packed keys.")
    value_bits = property(attrgetter("settings.value_bits"), doc="Bits per value of packed values.")
    window = property(attrgetter("settings.window"), doc="Recent tokens that stay exact.")
    sink_tokens = property(attrgetter("settings.sink_tokens"), doc="First tokens that stay exact.")
    max_size = property(attrgetter("settings.max_size"), doc="The most tokens to hold, or None.")
    seed = property(attrgetter("settings.seed"), doc="Seed of the random rotation.")
    codec = property(attrgetter("settings.codec"), doc="The kind of codes: scalar or trellis.")

    def __init__(self, settings: CacheSettings, packed: PackedKV, link: Link):
        self.settings = settings
        self.link = link
        self._packed = packed
        self._exact: list[mx.array] = []
        # The exact rotary parts of latent attention: a buffer, or none before the first tokens.
        self._rotary: list[mx.array] = []
        # The result of the last step of one token, and how many more steps can return it again:
        # they change only the exact buffers and their token count. With a fast GPU this saves half
        # of the host's work between the layers.
        self._step: Fetched | None = None
        self._repeats = 0
        # How often other layers read what a call has fetched: in each call, and so far in this one.
        self.shared_reads = 0
        self.reads = 0
        self._fetched: Fetched | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Fetched:
        """Append keys (B, H, n, dim) and values (B, H, n, value_dim) and return all tokens.

        The queries of this call see its new tokens, and all that were exact before it, exactly.
        """
        fetched = self._append([keys, values])
        self.reads = 0
        self._fetched = fetched if self.shared_reads else None
        return fetched

    def keys_and_values(self) -> Fetched:
        """The result of the last :meth:`update_and_fetch`, for layers without keys of their own.

        After the last of these layers has read it, the tokens after packing are returned instead.
        """
        fetched = self._fetched or fetch(self._tokens(), 0, self.link)
        self.reads += 1
        if self.reads >= self.shared_reads:
            self._fetched = None
        return fetched

    def _append(self, new: list[mx.array]) -> Fetched:
        """Append keys and values (B, H, n, dim), fetch all, then pack what has left the window."""
        count = new[0].shape[2]
        if count == 1 and self._step and self._repeats and self.link.reads_tokens:
            self._write(new)
            self._repeats -= 1
            self._step[0].tokens.exact_count += 1
            return self._step
        is_chunk = count > MAX_DECODE_ROWS
        if is_chunk:
            submit_keys(new)
        else:
            self._packed.reserve_block()
        self._hold(new, is_chunk)
        fetched = fetch(self._tokens(), count, self.link)
        self._repeats = self._steps_alike()
        is_changed = self._pack(count)
        self._step = None if is_changed or type(fetched[0]) is not KVHandle else fetched
        if is_chunk:
            # Otherwise all layers would grow their packed buffers at once, at the end of the chunk.
            mx.async_eval(self._exact, self._packed.arrays)
        return fetched

    def _seen(self, count: int, sinks: int, recent_start: int, *spans: Span) -> VisibleTokens:
        """All tokens as attention reads them: ``count`` is where the exact ones end."""
        sides = self._packed.sides
        return VisibleTokens(
            keys=sides[0] if sides else None,
            values=sides[-1] if sides else None,
            packed_count=self._packed.count,
            exact_keys=self._exact[0],
            exact_values=self._exact[-1],
            exact_count=count,
            sink_count=sinks,
            recent_start=recent_start,
            spans=spans,
        )

    @property
    def keys(self) -> mx.array | None:
        """The exact keys, to which mlx-lm adds a dependency in runs over several machines."""
        return self._exact[0] if self._exact else None

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self._exact[0] = keys
        self._step = None

    @property
    def side_values(self) -> list[int]:
        """Values per token of each side, in all heads and sequences; empty before the first."""
        return [x.size // x.shape[2] for x in self._exact]

    @property
    def token_values(self) -> int:
        """Values per token: of keys, values and rotary parts in all heads and sequences."""
        return sum(self.side_values) + sum(x.size // x.shape[2] for x in self._rotary)

    @property
    def fp16_nbytes(self) -> int:
        """Bytes of a dense 16-bit cache in which every sequence is as long as the longest."""
        return 2 * self.token_values * self.size()

    @property
    def token_nbytes(self) -> int:
        """Bytes that one more packed token of a sequence takes, with its rotary part."""
        rotary = 2 * sum(x.shape[1] * x.shape[3] for x in self._rotary)
        pairs = zip(self._exact, self._packed.layouts)
        return rotary + sum(x.shape[1] * side.vector_nbytes(x.shape[3]) for x, side in pairs)

    def empty(self) -> bool:
        """Whether no token has ever been stored."""
        return not self._exact

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, free space included."""
        return sum(x.nbytes for x in (*self._exact, *self._rotary, *self._packed.arrays))


def write_tokens(buffer: mx.array, x: mx.array, start: int) -> None:
    """Write tokens x (B, H, n, dim) to a buffer (B, H, capacity, dim) from ``start`` on.

    On a GPU the previous step may still read the buffer, and MLX would copy it before writing the
    slice. A choice between old and new values copies and writes in one dispatch.
    """
    count = x.shape[2]
    if backend() == "reference" or count > 1:
        buffer[:, :, start : start + count] = x
    else:
        buffer[...] = mx.where(_column(start, buffer.shape[2]), x, buffer)


@lru_cache(maxsize=64)
def _column(token: int, capacity: int) -> mx.array:
    """A mask of one token in a buffer, for all layers of a step: boolean (capacity, 1).

    The host makes it: a GPU would first finish the step before, and the host would wait for it.
    """
    return constant(np.arange(capacity)[:, None] == token)
