"""What the caches of one sequence and of several have in common: the way of a new key."""

from functools import lru_cache
from operator import attrgetter

import mlx.core as mx

from ..codec.constants import constant
from ..kernels.attention import MAX_DECODE_ROWS
from ..kernels.runtime import backend
from ..kernels.storage import PackedKV
from ..kernels.tokens import Span, VisibleTokens
from .blocks import CacheSettings
from .fetched import Fetched, Link, Step, fetch


class CompressedCache:
    """The tokens of one layer: some exact, the others packed; each is in one of the two stores.

    ``_exact`` are keys and values (B, H, capacity, dim) in the model's dtype, or latent vectors,
    with free space behind them; there are none before the first tokens. Attention reads the arrays
    that it is given, and changes none.

    How tokens lie in the exact buffers is up to a subclass: ``_hold`` makes room for new ones and
    lets ``_write`` put them there, ``_tokens`` is what attention sees, ``_pack`` moves whole blocks
    to the packed store, and ``_steps_alike`` tells for how long neither has anything to do.
    """

    key_bits = property(attrgetter("settings.key_bits"), doc="Bits per value of packed keys.")
    value_bits = property(attrgetter("settings.value_bits"), doc="Bits per value of packed values.")
    window = property(attrgetter("settings.window"), doc="Recent tokens that stay exact.")
    sink_tokens = property(attrgetter("settings.sink_tokens"), doc="First tokens that stay exact.")
    max_size = property(attrgetter("settings.max_size"), doc="The most tokens to hold, or None.")
    seed = property(attrgetter("settings.seed"), doc="Seed of the random rotation.")

    def __init__(self, settings: CacheSettings, packed: PackedKV, link: Link):
        self.settings = settings
        self.link = link
        self._packed = packed
        self._exact: list[mx.array] = []
        self._step: Step | None = None
        # How often a call of the model asks for what it has fetched again, and has done so.
        self.shared_reads = 0
        self.reads = 0
        self._fetched: Fetched | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Fetched:
        """Append keys (B, H, n, dim) and values (B, H, n, value_dim) and return all tokens.

        The new tokens and all that were exact before the call are seen exactly by its queries.
        """
        fetched = self._append([keys, values])
        self.reads = 0
        self._fetched = fetched if self.shared_reads else None
        return fetched

    def keys_and_values(self) -> Fetched:
        """What the last :meth:`update_and_fetch` returned, for layers without keys of their own.

        It is held until the last of them has asked, and then it is what is seen after packing.
        """
        fetched = self._fetched or fetch(self._tokens(), 0, self.link)
        self.reads += 1
        if self.reads >= self.shared_reads:
            self._fetched = None
        return fetched

    def _append(self, new: list[mx.array]) -> Fetched:
        """Hold keys and values (B, H, n, dim), fetch all, then pack what has left the window."""
        count = new[0].shape[2]
        if count == 1 and self._step and self._step.left and self.link.reads_tokens:
            self._write(new)
            return self._step.repeat()
        is_chunk = count > MAX_DECODE_ROWS
        if is_chunk:
            self.link.submit_keys(new)
        else:
            self._packed.reserve_block()
        self._hold(new, is_chunk)
        fetched = fetch(self._tokens(), count, self.link)
        self._step = Step.of(fetched, self._steps_alike())
        if self._pack(count):
            self._step = None
        if is_chunk:
            # Left to the end of the chunk, all layers would grow their packed buffers at once.
            mx.async_eval(self._exact, self._packed.arrays)
        return fetched

    def _seen(self, count: int, sinks: int, recent_start: int, *spans: Span) -> VisibleTokens:
        """The packed tokens between the first and the later ones of ``count`` exact ones."""
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
        """The exact keys, to which runs over several machines tie what they wait for."""
        return self._exact[0] if self._exact else None

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self._exact[0] = keys
        self._step = None

    @property
    def side_values(self) -> list[int]:
        """Values of one token of each side, of all heads and sequences; none before the first."""
        return [x.size // x.shape[2] for x in self._exact]

    def empty(self) -> bool:
        """Whether no token was ever stored."""
        return not self._exact

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held, free space in the buffers included."""
        return sum(x.nbytes for x in self._exact) + self._packed.nbytes


def write_tokens(buffer: mx.array, x: mx.array, start: int) -> None:
    """Write tokens x (B, H, n, dim) to a buffer (B, H, capacity, dim) from ``start`` on.

    On a GPU the step before may still be running. It reads the buffer, and MLX would copy that
    before it wrote the slice: choosing between old and new is one launch for both.
    """
    count = x.shape[2]
    if backend() == "reference" or count > 1:
        buffer[:, :, start : start + count] = x
    else:
        buffer[...] = mx.where(_column(start, buffer.shape[2]), x, buffer)


@lru_cache(maxsize=64)
def _column(token: int, capacity: int) -> mx.array:
    """Where a token lies in a buffer, for all layers of a step: boolean (capacity, 1)."""
    return constant(mx.arange(capacity)[:, None] == token)
