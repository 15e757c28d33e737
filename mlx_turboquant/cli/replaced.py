"""Functions of mlx-lm are replaced for the rest of the process, which runs one command."""

from collections.abc import Callable
from types import ModuleType
from typing import Any


def replace(owner: ModuleType | type, **replacements: Any) -> None:
    """Give names of a module or class other values."""
    for name, value in replacements.items():
        setattr(owner, name, value)


def wrap(owner: ModuleType | type, **wrappers: Callable) -> None:
    """Put wrappers around functions; each is called with the function that it wraps in front."""

    def around(wrapper: Callable, function: Callable) -> Callable:
        return lambda *arguments, **keywords: wrapper(function, *arguments, **keywords)

    for name, wrapper in wrappers.items():
        setattr(owner, name, around(wrapper, getattr(owner, name)))
