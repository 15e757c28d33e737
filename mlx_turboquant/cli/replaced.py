"""Running a command of mlx-lm with some of its functions replaced."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def replaced(module: ModuleType, **replacements: Any) -> Iterator[None]:
    """Give names of ``module`` other values for the time of a ``with`` block."""
    originals = {name: getattr(module, name) for name in replacements}
    vars(module).update(replacements)
    try:
        yield
    finally:
        vars(module).update(originals)
