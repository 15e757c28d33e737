"""Arrays that are made once and shared by all threads."""

from typing import Any

import mlx.core as mx


def constant(values: Any) -> mx.array:
    """``values`` as an evaluated array, because a lazy one belongs to the thread that made it."""
    array = mx.array(values)
    mx.eval(array)
    return array
