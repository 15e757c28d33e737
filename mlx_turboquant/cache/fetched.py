"""The keys and values that a cache returns to a model; hooked attention reads packed tokens."""

import threading
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..kernels.quantize import dense
from ..kernels.tokens import VisibleTokens


@dataclass(eq=False)
class Link:
    """What the caches of a model know of it; one object for all its layers.

    ``is_hooked``: its attention reads :class:`.VisibleTokens`. ``needs_arrays``: other code of the
    model uses arrays of keys and values as well. ``shared_reads``: for the cache of each layer, how
    often layers without keys of their own read it in a call. ``weights``: those that compute the
    tokens, or None if they are unknown.
    """

    is_hooked: bool = False
    needs_arrays: bool = True
    shared_reads: tuple[int, ...] = ()
    weights: Any = None

    @property
    def reads_tokens(self) -> bool:
        """Whether only hooked attention, which reads tokens, uses what a step fetches."""
        return self.is_hooked and not self.needs_arrays

    def __getstate__(self) -> dict[str, Any]:
        return {"weights": self.weights}  # another process has no hooked attention

    def __deepcopy__(self, memo: dict) -> "Link":
        return self  # the model is not copied with its caches


class _Submitted(threading.local):
    """What this thread has submitted: an array can only be evaluated by the thread that made it.

    ``attention`` is one value of the last attention. ``is_new``: there were no keys since.

    On its own, MLX would compute the dense tokens of many layers of a chunk in advance, because
    they depend on packed tokens only. The attention of a layer is therefore submitted once that of
    the previous layer has ended, while the GPU still computes the rest of that layer. The last
    layer synchronizes too, although no cache depends on it.
    """

    attention: mx.array | None = None
    is_new: bool = False


_submitted = _Submitted()


def submit_keys(new: list[mx.array]) -> None:
    """Compute the keys and values (B, H, n, dim) of a layer of a chunk."""
    if _submitted.is_new:
        mx.async_eval(new)
    else:
        mx.eval(new)  # no hook saw the attention of the previous layer: wait for it here
    _submitted.is_new = False


def submit_attention(output: mx.array) -> None:
    """Compute the attention (B, query_heads, n, dim) of a layer of a chunk."""
    if _submitted.attention is not None:
        mx.eval(_submitted.attention)
    _submitted.attention = output[0, 0, 0, 0] * 1  # a copy, which does not hold the output
    mx.async_eval(output, _submitted.attention)
    _submitted.is_new = True


class KVArray(mx.array):
    """Keys or values as a lazily dequantized array, with the ``tokens`` that it is made from.

    Hooked attention reads ``tokens`` and never evaluates the array; any other code gets correct
    dense values.
    """

    tokens: VisibleTokens


class KVHandle:
    """Keys or values without an array, for attention that reads ``tokens``.

    A lazy array would cost the host as much time as the attention itself. Any use other than of
    ``shape`` and ``dtype`` raises a TypeError or an AttributeError.
    """

    __slots__ = ("tokens", "_exact")

    def __init__(self, tokens: VisibleTokens, exact: mx.array):
        self.tokens = tokens
        self._exact = exact

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array, (B, H, count, dim)."""
        batch, heads, _, dim = self._exact.shape
        return batch, heads, self.tokens.count, dim

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the dense array."""
        return self._exact.dtype


Fetched = tuple[KVArray | KVHandle, ...]


def fetch(tokens: VisibleTokens, new: int, link: Link) -> Fetched:
    """All keys and all values, or all latent vectors, after ``new`` tokens were appended."""
    if new == 1 and link.reads_tokens and tokens.packed_count:
        return tuple([KVHandle(tokens, exact) for _, exact in tokens.sides])
    arrays = tuple(map(KVArray, dense(tokens)))
    for array in arrays:
        array.tokens = tokens
    return arrays
