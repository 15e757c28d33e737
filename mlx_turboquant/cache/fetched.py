"""What a cache returns to a model: keys and values that hooked attention reads as packed tokens."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..kernels.quantize import dense
from ..kernels.tokens import VisibleTokens


@dataclass(eq=False)
class Link:
    """All that the caches of a model know of it; one object for all its layers.

    ``is_hooked`` says that its attention reads :class:`.VisibleTokens`, and ``needs_arrays`` that
    other code of it wants arrays of keys and values as well. ``shared_reads`` are those of the
    caches of its layers: how often layers without keys of their own ask for those of each.
    ``weights`` are those of the model that reads the tokens, or None if nobody has said.

    Left to itself, MLX computes the dense tokens of many layers of a chunk in advance, because they
    need nothing but packed ones. So the attention of a layer is submitted when that of the layer
    before has ended, while the GPU still has the rest of that layer to do. The last layer has its
    turn too, though no cache needs its attention: that is one of all layers.
    """

    is_hooked: bool = False
    needs_arrays: bool = True
    shared_reads: tuple[int, ...] = ()
    weights: Any = None
    # A number of the last attention that was submitted, and whether a layer has submitted its own.
    _last_attention: mx.array | None = None
    _attention_is_submitted: bool = False

    @property
    def reads_tokens(self) -> bool:
        """Whether nothing but attention, which reads tokens, uses what a step fetches."""
        return self.is_hooked and not self.needs_arrays

    def submit_keys(self, new: list[mx.array]) -> None:
        """Compute the keys and values (B, H, n, dim) of a layer of a chunk."""
        if self._attention_is_submitted:
            mx.async_eval(new)
        else:
            mx.eval(new)  # no hook saw the attention of the layer before: its end is seen here
        self._attention_is_submitted = False

    def submit_attention(self, output: mx.array) -> None:
        """Compute the attention (B, query_heads, n, dim) of a layer of a chunk."""
        if self._last_attention is not None:
            mx.eval(self._last_attention)
        self._last_attention = output[0, 0, 0, 0] * 1  # which holds nothing else
        mx.async_eval(output, self._last_attention)
        self._attention_is_submitted = True

    def __getstate__(self) -> dict[str, Any]:
        return {"weights": self.weights}  # elsewhere there is no hooked attention

    def __deepcopy__(self, memo: dict) -> "Link":
        return self  # the model is not copied with its caches


class KVArray(mx.array):
    """Keys or values as an ordinary, lazily dequantized array that knows where they came from.

    Attention that recognises it reads ``tokens`` and never evaluates the array; any other code
    gets correct dense values.
    """

    tokens: VisibleTokens
    link: Link


class KVHandle:
    """Keys or values for attention that reads ``tokens``: there is no array.

    A lazy array costs the host as much as the attention itself. Any use but for ``shape`` and
    ``dtype`` raises a TypeError or an AttributeError.
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


@dataclass(slots=True)
class Step:
    """What the last step of one token returned, and for how many more steps it holds.

    Until then nothing changes but the exact buffers, which get one token, and their count: it
    saves the host of a fast GPU half of its work between the layers.
    """

    returned: Fetched
    left: int

    @classmethod
    def of(cls, fetched: Fetched, left: int) -> "Step | None":
        """There is none if other code than attention was given arrays of all tokens."""
        return None if type(fetched[0]) is KVArray else cls(fetched, left)

    def repeat(self) -> Fetched:
        """Count one more token, which has been written."""
        self.left -= 1
        self.returned[0].tokens.exact_count += 1
        return self.returned


def fetch(tokens: VisibleTokens, new: int, link: Link) -> Fetched:
    """All keys and all values, or all latent vectors, after ``new`` tokens have come."""
    if new == 1 and link.reads_tokens and tokens.packed_count:
        return tuple([KVHandle(tokens, exact) for _, exact in tokens.sides])
    arrays = tuple(map(KVArray, dense(tokens)))
    for array in arrays:
        array.tokens, array.link = tokens, link
    return arrays
