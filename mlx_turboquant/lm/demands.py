"""What quantizing keys does to the attention of each layer: a stand-in for calibration.

The error of a quantized key k with mean c is spread evenly over the dimensions by the rotation, so
a score of query q has noise of variance

    scale^2 |q|^2 |k - c|^2 D(b) / d,

D(b) being the relative mean squared error of b bits in d dimensions. To second order, noise of
variance s_j in the scores moves a softmax p by a KL divergence of half of sum p_j (1 - p_j) s_j.
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ..kernels.storage import removable_mean
from .compressible import (
    HOOKED_NAME,
    Compressible,
    attention_scopes,
    plain_caches,
    text_arguments,
)

_TOKENS = 256
# A demand is the mean over the last queries, which have the most tokens to look at.
_QUERIES = 16


def key_demands(model: nn.Module, compressible: list[Compressible]) -> list[float]:
    """KL divergence of the attention weights of each layer, in nats per unit of D.

    The model reads pseudo-random tokens. It is 0 for layers that have an attention of their own.
    """
    demands: dict[int, mx.array] = {}

    def recording(attention, queries, keys, values, cache=None, scale=1.0, mask=None, **others):
        if keys.shape[-1] == queries.shape[-1]:
            demands[id(cache)] = key_demand(queries, keys, scale)
        return attention(queries, keys, values, cache=cache, scale=scale, mask=mask, **others)

    caches = plain_caches(model)
    vocabulary = getattr(text_arguments(model), "vocab_size", 128)
    tokens = mx.random.randint(0, vocabulary, (1, _TOKENS), key=mx.random.key(0))
    originals = [(scope, scope[HOOKED_NAME]) for scope in attention_scopes(model)]
    for scope, original in originals:
        scope[HOOKED_NAME] = partial(recording, original)
    try:
        model(tokens, cache=caches)
    finally:
        for scope, original in originals:
            scope[HOOKED_NAME] = original
    mx.eval(demands, [cache.state for cache in caches])
    found = (demands.get(id(each.of(caches))) for each in compressible)
    return [0.0 if demand is None else demand.item() for demand in found]


def key_demand(queries: mx.array, keys: mx.array, scale: float) -> mx.array:
    """KL divergence of the attention weights in nats per unit of D: a lazy float32 scalar.

    ``queries`` (B, query_heads, L, dim), of which the last row sees all tokens, and ``keys``
    (B, H, n, dim) have any float dtype; ``scale`` is the factor of the scores.
    """
    batch, heads, count, dim = keys.shape
    keys = keys.astype(mx.float32)
    rows = min(_QUERIES, queries.shape[2])
    queries = queries[:, :, -rows:].astype(mx.float32) * scale
    visible = mx.arange(count) <= mx.arange(count - rows, count)[:, None]
    scores = queries.reshape(batch, heads, -1, rows, dim) @ keys[:, :, None].swapaxes(-1, -2)
    weights = mx.softmax(mx.where(visible, scores, -1e30), axis=-1)
    deviations = ((keys - removable_mean(keys)) ** 2).sum(axis=-1)
    noise = ((weights * (1 - weights)) * deviations[:, :, None, None]).sum(axis=-1)
    squared = (queries.reshape(*noise.shape, dim) ** 2).sum(axis=-1)
    return (noise * squared).mean() / (2 * dim)
