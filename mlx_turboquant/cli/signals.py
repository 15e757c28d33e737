"""The signals that end a command: they become exceptions, and wait where one would do harm."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..lm.prompt_store import PromptStore

# Besides Ctrl-C, which is an exception already.
ENDINGS = (signal.SIGHUP, signal.SIGTERM)


@contextmanager
def stored_at_the_end(store: PromptStore | None) -> Iterator[None]:
    """Let signals end the block by an exception, and write what is pending in a store after it."""
    for number in ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as after nohup
            signal.signal(number, _leave)
    try:
        yield
    finally:
        if store is not None:
            with signals_held(signal.SIGINT, *ENDINGS):
                store.close()


def _leave(number: int, frame: object) -> None:
    """End the command and ignore a second signal, as a closing terminal and its shell send."""
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_IGN)
    sys.exit(128 + number)


@contextmanager
def signals_held(*numbers: int, then: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Hold signals until the end of the block; those removed from the list are dropped.

    ``then`` is called when one comes.
    """
    came: list[int] = []

    def hold(number: int, frame: object) -> None:
        came.append(number)
        then()

    before = {number: signal.signal(number, hold) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
