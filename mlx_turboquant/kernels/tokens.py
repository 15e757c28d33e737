"""The packed and exact tokens of a layer that one attention call sees, as plain data.

A cache owns the arrays. Attention only reads them, up to the counts beside them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from ..codec.quantizer import TurboQuantizer

# Tokens of a block. Keys are interleaved in it: a word of all 32 tokens, then the next word.
BLOCK = 32
# The attention kernel reads steps of two blocks, and the last step whole.
CAPACITY_UNIT = 2 * BLOCK


class PackedSide(NamedTuple):
    """Packed keys or values of one layer, in buffers with free space at the end.

    Interleaved ``codes`` (keys) are uint32 (B, H, capacity / 32, words, 32), so that 32 lanes that
    score one token each read 32 consecutive words. Other codes (values) are uint32
    (B, H, capacity, words). ``scales`` are bfloat16 (B, H, capacity), which no finite input can
    overflow. ``mean`` is float32 (B, H, 1, dim).
    """

    quantizer: TurboQuantizer
    interleaved: bool
    codes: mx.array
    scales: mx.array
    mean: mx.array

    @property
    def capacity(self) -> int:
        """Tokens that the buffers have room for."""
        return self.scales.shape[2]


class Span(NamedTuple):
    """Counts of one sequence in shared buffers; its recent tokens begin at ``recent_start``."""

    packed: int
    sinks: int
    recent_start: int


@dataclass(slots=True)
class VisibleTokens:
    """The tokens that one attention call sees, in order: sinks, packed tokens, recent tokens.

    ``keys`` and ``values`` have ``packed_count`` packed tokens; they are None if there are none.
    ``exact_keys`` and ``exact_values`` are (B, H, capacity, dim) in the model's dtype: first come
    the ``sink_count`` sinks, and from ``recent_start`` to ``exact_count`` the recent tokens. In
    latent attention the values are the keys, the same objects.

    Sequences of different length share these buffers and end at the same ``exact_count``.
    ``spans`` then has one entry for each. A column between its parts has no token of a sequence.
    """

    keys: PackedSide | None
    values: PackedSide | None
    packed_count: int
    exact_keys: mx.array
    exact_values: mx.array
    exact_count: int
    sink_count: int
    recent_start: int
    spans: tuple[Span, ...] = ()

    @property
    def count(self) -> int:
        """Number of columns: the most sinks, packed and recent tokens of any sequence."""
        return self.sink_count + self.packed_count + self.exact_count - self.recent_start

    @property
    def is_latent(self) -> bool:
        """Whether one vector per token is both key and value."""
        return self.exact_values is self.exact_keys

    @property
    def sides(self) -> list[tuple[PackedSide | None, mx.array]]:
        """Packed and exact vectors: of keys and of values, or of latent vectors alone."""
        keys, values = (self.keys, self.exact_keys), (self.values, self.exact_values)
        return [keys] if self.is_latent else [keys, values]

    def split(self, exact: mx.array) -> tuple[mx.array, mx.array]:
        """Return sinks and recent tokens of an exact buffer."""
        return exact[:, :, : self.sink_count], exact[:, :, self.recent_start : self.exact_count]


def whole_steps(tokens: int) -> int:
    """Return the smallest capacity for ``tokens`` packed tokens."""
    return -(-tokens // CAPACITY_UNIT) * CAPACITY_UNIT


def longer(x: mx.array, length: int, before: int = 0) -> mx.array:
    """Pad x (B, H, n, ...) with zeros to ``length`` tokens, ``before`` of them in front."""
    padding = [(0, 0)] * x.ndim
    padding[2] = (before, length - before - x.shape[2])
    return mx.pad(x, padding)


def visible_columns(
    spans: tuple[Span, ...], sinks: int, packed: int, recent_start: int, end: int
) -> mx.array:
    """Return which columns hold a token of each sequence: boolean (B, 1, 1, columns).

    There are ``sinks`` columns, then ``packed`` ones, then those from ``recent_start`` to ``end``.
    """
    packed_counts, sink_counts, starts = (mx.array(x)[:, None] for x in zip(*spans))
    parts = [
        mx.arange(sinks) < sink_counts,
        mx.arange(packed) < packed_counts,
        mx.arange(recent_start, end) >= starts,
    ]
    return mx.concatenate(parts, axis=-1)[:, None, None]
