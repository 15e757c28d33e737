"""How sensitive the attention of each layer is to quantized keys: a stand-in for calibration.

The error of a quantized key k with mean c is spread evenly over the dimensions by the rotation, so
a score of query q has noise of variance

    scale^2 |q|^2 |k - c|^2 D(b) / d,

where D(b) is the relative mean squared error of b bits in d dimensions. To second order, noise of
variance s_j in the scores changes a softmax p by a KL divergence of half of sum p_j (1 - p_j) s_j.
"""

import mlx.core as mx
import mlx.nn as nn

from ..kernels.storage import removable_mean
from .compressible import Compressible, plain_caches, text_arguments
from .hook import observed_attention

_TOKENS = 256
# A sensitivity is the mean over the last queries, which see the most tokens.
_QUERIES = 16


def key_sensitivities(model: nn.Module, compressible: list[Compressible]) -> list[float]:
    """KL divergence of the attention weights of each layer, in nats per unit of D.

    The model reads pseudo-random tokens. Layers with an attention of their own get 0.
    """
    found: dict[int, mx.array] = {}

    def observe(queries, keys, cache=None, scale=1.0, *_, **others):
        if keys.shape[-1] == queries.shape[-1]:
            found[id(cache)] = key_sensitivity(queries, keys, scale)

    caches = plain_caches(model)
    vocabulary = getattr(text_arguments(model), "vocab_size", 128)
    tokens = mx.random.randint(0, vocabulary, (1, _TOKENS), key=mx.random.key(0))
    with observed_attention(model, observe):
        model(tokens, cache=caches)
    mx.eval(found, [cache.state for cache in caches])
    sensitivities = (found.get(id(each.of(caches))) for each in compressible)
    return [0.0 if each is None else each.item() for each in sensitivities]


def key_sensitivity(queries: mx.array, keys: mx.array, scale: float) -> mx.array:
    """KL divergence of the attention weights in nats per unit of D: a lazy float32 scalar.

    ``queries`` (B, query_heads, L, dim) and ``keys`` (B, H, n, dim) have any float dtype. The last
    query row sees all tokens. ``scale`` is the factor of the scores.
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
