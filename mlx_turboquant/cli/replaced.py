"""Running a command of mlx-lm with some of its functions replaced."""

from collections.abc import Iterator
from contextlib import contextmanager
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
