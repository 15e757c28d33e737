"""Running a command of mlx-lm with some of its functions replaced."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def replaced(owner: ModuleType | type, **replacements: Any) -> Iterator[None]:
    """Give names of a module or class other values inside a ``with`` block."""
    originals = {name: getattr(owner, name) for name in replacements}
    for name, value in replacements.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(owner, name, value)


def wrapped(owner: ModuleType | type, **wrappers: Callable) -> AbstractContextManager[None]:
    """Put wrappers around functions; each is called with the function that it wraps in front."""

    def around(wrapper: Callable, function: Callable) -> Callable:
        return lambda *arguments, **keywords: wrapper(function, *arguments, **keywords)

    functions = {name: around(each, getattr(owner, name)) for name, each in wrappers.items()}
    return replaced(owner, **functions)
