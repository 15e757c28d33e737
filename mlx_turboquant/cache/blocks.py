"""Which tokens are packed: whole blocks between the exact sinks and a window of exact tokens.

    sinks | packed tokens | up to 31 more, then the window

Only whole blocks are packed, so that each token is packed once and a kernel reads whole blocks. A
call fetches the tokens for its queries before it packs.
"""

from typing import NamedTuple

from ..codec.basis import Basis
from ..codec.codebook import check_bits
from ..codec.quantizer import CODECS
from ..kernels.attention import MAX_DECODE_ROWS
from ..kernels.tokens import BLOCK, CAPACITY_UNIT

DEFAULT_WINDOW = 128
DEFAULT_SINK_TOKENS = 4
# The largest size of an axis of an array.
LARGEST = 2**31 - 1


class CacheSettings(NamedTuple):
    """How a cache compresses; :class:`.TurboQuantKVCache` documents the allowed values."""

    key_bits: int
    value_bits: int
    window: int
    sink_tokens: int
    max_size: int | None
    seed: int
    codec: str = "scalar"
    basis: Basis | None = None

    @property
    def most_exact(self) -> int:
        """The most exact tokens after a decode step."""
        return self.sink_tokens + self.window + BLOCK + MAX_DECODE_ROWS

    def leaving(self, packed: int, exact: int) -> int:
        """How many of ``exact`` tokens to pack: those that fill whole blocks before the window."""
        outside = exact - self.sink_tokens - self.window
        return max(0, (packed + outside) // BLOCK * BLOCK - packed)

    def until_block(self, packed: int, exact: int) -> int:
        """How many more tokens it takes until the next block leaves the window, 1 or more."""
        outside = exact - self.sink_tokens - self.window
        return (packed // BLOCK + 1) * BLOCK - (packed + outside)

    def limit(self) -> int | None:
        """The most packed tokens of a cache of ``max_size`` tokens, or None without a limit.

        Raises:
            ValueError: a setting out of range, or a ``max_size`` that is too small.
        """
        check_bits(self.key_bits)
        check_bits(self.value_bits)
        if self.codec not in CODECS:
            raise ValueError(f"Codec {self.codec!r} is not known: use one of {', '.join(CODECS)}.")
        counts = {"window": self.window, "number of sink tokens": self.sink_tokens}
        for name, tokens in counts.items():
            if not isinstance(tokens, int) or tokens < 0:
                raise ValueError(f"A {name} of {tokens} is not possible: use 0 or more tokens.")
        if self.max_size is None:
            return None
        most = min(self.max_size, LARGEST) - self.most_exact
        if most < CAPACITY_UNIT:
            raise ValueError(
                f"A cache of {self.max_size} tokens is too small for {self.sink_tokens} sinks and "
                f"a window of {self.window}: use at least "
                f"{self.max_size - most + CAPACITY_UNIT} tokens."
            )
        return most // CAPACITY_UNIT * CAPACITY_UNIT
