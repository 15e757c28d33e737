"""KV-cache compression for MLX: see the README for the commands and ``enable`` for the library.

The library is imported with its first use: a command starts without MLX, so that Ctrl-C ends it
quietly, and errors of its options take no second.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .library import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    return getattr(importlib.import_module(".library", __name__), name)


def __dir__() -> list[str]:
    return [*__getattr__("__all__"), "__version__"]
