"""Running a command of mlx-lm with some of its functions replaced."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def replaced(owner: ModuleType | type, **replacements: Any) -> Iterator[None]:
    """Give names of a module or class other values for the time of a ``with`` block."""
    originals = {name: getattr(owner, name) for name in replacements}
    _set(owner, replacements)
    try:
        yield
    finally:
        _set(owner, originals)


def _set(owner: ModuleType | type, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(owner, name, value)
