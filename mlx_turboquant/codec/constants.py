"""Arrays that are made once and used by every thread."""

from typing import Any

import mlx.core as mx


def constant(values: Any) -> mx.array:
    """``values`` as an evaluated array; a lazy one belongs to the thread that made it."""
    array = mx.array(values)
    mx.eval(array)
    return array
