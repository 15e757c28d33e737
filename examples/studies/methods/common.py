"""The interface of every method, and functions that several methods share."""

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx

from mlx_turboquant.codec.quantizer import LARGEST_SCALE, check_vectors


class Method(Protocol):
    """The interface of :class:`.TurboQuantizer`, by which methods are compared.

    ``quantize`` takes vectors (..., dim) of float16, bfloat16 or float32 and returns a named tuple
    of arrays with the leading axes of the vectors: all that is stored for them. ``bits_per_value``
    counts all of these arrays. A zero vector is restored as zeros, one with a non-finite value as
    NaN in every value.

    A subclass defines ``_pack`` and ``_values``. It also defines ``_project`` and ``_restore`` if
    its values are those of a linear map of the vectors.
    """

    dim: int
    bits_per_value: float

    def quantize(self, x: mx.array) -> Any:
        """Pack vectors (..., dim) of float16, bfloat16 or float32.

        Raises:
            ValueError: another shape or dtype.
        """
        check_vectors(x, self.dim)
        return self._pack(x)

    def dequantize(self, packed: Any, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The reconstructed vectors (..., dim) in ``dtype``."""
        return self._restore(self._values(packed)).astype(dtype)

    def inner_product(self, queries: mx.array, packed: Any) -> mx.array:
        """Products of queries (..., q, dim) with packed vectors (..., n): float32 (..., q, n)."""
        check_vectors(queries, self.dim)
        return self._project(queries.astype(mx.float32)) @ self._values(packed).swapaxes(-1, -2)

    def _project(self, queries: mx.array) -> mx.array:
        """The linear map of float32 queries; its transpose is ``_restore``."""
        return queries

    def _restore(self, values: mx.array) -> mx.array:
        return values


def polar_form(x: mx.array) -> tuple[mx.array, mx.array]:
    """Directions, float32 (..., dim), and norms, float32 (..., 1), of x (..., dim).

    Zero vectors have norm 0 and direction 0, vectors with a non-finite value norm NaN and
    direction 0. Nothing overflows: the largest norm is the largest bfloat16.
    """
    x = x.astype(mx.float32)
    largest = mx.abs(x).max(axis=-1, keepdims=True)
    finite = mx.isfinite(largest)
    # Scaled to a largest value of 1, so that no square overflows or vanishes.
    scaled = mx.where(finite, x / mx.where(largest == 0, 1, largest), 0)
    norms = mx.linalg.norm(scaled, axis=-1, keepdims=True)
    directions = scaled / mx.where(norms == 0, 1, norms)
    norms = mx.where(finite, mx.minimum(norms * largest, LARGEST_SCALE), mx.nan)
    return directions, norms


def map_arrays(function: Callable[[mx.array], mx.array], packed: Any) -> Any:
    """Apply ``function`` to each array of what ``quantize`` returned."""
    if isinstance(packed, mx.array):
        return function(packed)
    return type(packed)(*(map_arrays(function, part) for part in packed))
