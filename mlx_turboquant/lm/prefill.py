"""Attention of the chunk of a prompt, in parts whose scores fit into bounded memory.

Where MLX does not fuse attention, it holds the scores of all queries of a chunk: 12.9 GB for 24
heads, 2,048 queries and 131,072 tokens.
"""

from collections.abc import Callable
from functools import lru_cache
from io import StringIO
from typing import Any

import mlx.core as mx

from ..cache.fetched import submit_attention
from .loading import memory_nbytes

# Of the memory that MLX can use. Smaller parts take longer: products of few rows are slow.
_SHARE = 16
_LEAST_ROWS = 16


def scores_nbytes(memory: float | None = None) -> int:
    """The bytes that the scores of a part may take, on this machine or with that memory."""
    return int(memory or memory_nbytes()) // _SHARE


def attend_in_parts(
    attention: Callable[..., mx.array],
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: None | str | mx.array = None,
    **keywords: Any,
) -> mx.array:
    """Call ``attention`` for all queries of a chunk (B, query_heads, L, dim), and submit it.

    If it is not fused, each call gets as few queries as keep its scores below
    :func:`scores_nbytes`, and with a causal mask only the keys that these queries see.
    """
    batch, heads, rows, _ = queries.shape
    count = keys.shape[2]
    scores = batch * heads * count * max(x.dtype.size for x in (queries, keys, values))
    if keywords.get("sinks") is not None:
        scores *= 2  # MLX copies them to append a column
    most = max(_LEAST_ROWS, scores_nbytes() // scores)
    if most >= rows or _is_fused(*map(_like, (queries, keys, values, mask))):
        output = attention(queries, keys, values, mask=mask, **keywords)
        submit_attention(output)
        return output
    parts = []
    most = 1 << (most.bit_length() - 1)  # whole tiles of matrix products
    for start in range(0, rows, most):
        stop = min(start + most, rows)
        end = count - rows + stop if isinstance(mask, str) else count
        own = mask
        if isinstance(mask, mx.array) and mask.ndim > 1 and mask.shape[-2] > 1:
            own = mask[..., start:stop, :]
        seen = (x[:, :, :end] for x in (keys, values))
        parts.append(attention(queries[:, :, start:stop], *seen, mask=own, **keywords))
        submit_attention(parts[-1])
    return mx.concatenate(parts, axis=2)


def _like(x: Any) -> Any:
    """What :func:`_is_fused` has to know of an argument."""
    return (x.shape, x.dtype) if isinstance(x, mx.array) else x


@lru_cache(maxsize=64)
def _is_fused(*arguments: Any) -> bool:
    """Whether MLX has one kernel for queries, keys, values and a mask; nothing is computed."""
    *arrays, mask = (mx.zeros(*x) if isinstance(x, tuple) else x for x in arguments)
    output = mx.fast.scaled_dot_product_attention(*arrays, scale=1.0, mask=mask)
    graph = StringIO()
    mx.export_to_dot(graph, output)
    return "ScaledDotProductAttention" in graph.getvalue()
