"""When what is packed: sinks and a window stay exact, what has left the window is packed in blocks.

    sinks | packed tokens | up to 31 more, then the window

Only whole blocks of packed tokens leave, so that a token is packed once and a kernel reads whole
blocks. What a call's queries see is decided before the call packs.
"""

from ..kernels.attention import MAX_DECODE_ROWS
from ..kernels.tokens import BLOCK, CAPACITY_UNIT

DEFAULT_WINDOW = 128
DEFAULT_SINK_TOKENS = 4
# An array has no more places than this along an axis.
LARGEST = 2**31 - 1


def leaving_tokens(packed: int, exact: int, sink_tokens: int, window: int) -> int:
    """How many of ``exact`` tokens have left the window, in whole blocks of packed tokens."""
    outside = exact - sink_tokens - window
    return max(0, (packed + outside) // BLOCK * BLOCK - packed)


def tokens_until_block(packed: int, exact: int, sink_tokens: int, window: int) -> int:
    """How many more exact tokens it takes until the next block leaves the window: at least 1."""
    outside = exact - sink_tokens - window
    return (packed // BLOCK + 1) * BLOCK - (packed + outside)


def most_exact_tokens(sink_tokens: int, window: int) -> int:
    """The most exact tokens after a step of decoding."""
    return sink_tokens + window + BLOCK + MAX_DECODE_ROWS


def check_token_counts(window: int, sink_tokens: int, max_size: int | None) -> int | None:
    """The most packed tokens of a cache of ``max_size`` tokens, or None without a limit.

    Raises:
        ValueError: a number that is not possible, or too small a limit.
    """
    for name, tokens in (("window", window), ("number of sink tokens", sink_tokens)):
        if not isinstance(tokens, int) or tokens < 0:
            raise ValueError(f"A {name} of {tokens} is not possible: use 0 or more tokens.")
    if max_size is None:
        return None
    most = min(max_size, LARGEST) - most_exact_tokens(sink_tokens, window)
    if most < CAPACITY_UNIT:
        raise ValueError(
            f"A cache of {max_size} tokens is too small for {sink_tokens} sinks and a "
            f"window of {window}: use at least {max_size - most + CAPACITY_UNIT} tokens."
        )
    return most // CAPACITY_UNIT * CAPACITY_UNIT
