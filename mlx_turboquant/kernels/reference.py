"""The kernels in plain MLX: they run without a GPU, and kernels are compared with them.

The counterpart of ``inner_product.metal`` is :meth:`.TurboQuantizer.inner_product`.
"""

import mlx.core as mx

from ..codec.quantizer import QuantizedVectors, TurboQuantizer
from .tokens import BLOCK, PackedSide, VisibleTokens, longer, visible_columns, whole_steps


def quantize(x: mx.array, mean: mx.array, quantizer: TurboQuantizer) -> QuantizedVectors:
    """Quantize x (B, H, n, dim) minus the float32 mean (B, H, 1, dim); scales are bfloat16."""
    packed = quantizer.quantize(x.astype(mx.float32) - mean)
    return QuantizedVectors(packed.codes, packed.scales.astype(mx.bfloat16))


def packed_side(
    x: mx.array, mean: mx.array, quantizer: TurboQuantizer, interleaved: bool
) -> PackedSide:
    """Quantize into buffers that end with a whole step of the attention kernel."""
    codes, scales = quantize(x, mean, quantizer)
    capacity = whole_steps(x.shape[2])
    codes = longer(codes, capacity)
    if interleaved:
        codes = interleave(codes)
    return PackedSide(quantizer, interleaved, codes, longer(scales, capacity), mean)


def interleave(codes: mx.array) -> mx.array:
    """Interleave codes (B, H, n, words) of whole blocks to (B, H, n / 32, words, 32)."""
    # MLX would copy a transposed view for every kernel that reads it.
    return mx.contiguous(mx.unflatten(codes, 2, (-1, BLOCK)).swapaxes(-1, -2))


def token_major(packed: PackedSide, count: int) -> QuantizedVectors:
    """Return the first ``count`` codes (B, H, count, words) and scales (B, H, count)."""
    codes = packed.codes
    if packed.interleaved:
        codes = codes[:, :, : -(-count // BLOCK)].swapaxes(-1, -2).flatten(2, 3)
    return QuantizedVectors(codes[:, :, :count], packed.scales[..., :count])


def restored(packed: PackedSide, count: int, dtype: mx.Dtype) -> mx.array:
    """Dequantize the first ``count`` vectors: (B, H, count, dim)."""
    return (packed.quantizer.dequantize(token_major(packed, count)) + packed.mean).astype(dtype)


def dense(tokens: VisibleTokens) -> list[mx.array]:
    """Return all keys and values, or latent vectors: (B, H, count, dim) in the model's dtype."""
    arrays = []
    for packed, exact in tokens.sides:
        sinks, recent = tokens.split(exact)
        middle = restored(packed, tokens.packed_count, exact.dtype)
        arrays.append(mx.concatenate([sinks, middle, recent], axis=2))
    return arrays


def decode_attention(
    queries: mx.array,
    tokens: VisibleTokens,
    scale: float,
    mask: None | str | mx.array = None,
    sink_logits: mx.array | None = None,
) -> mx.array:
    """Compute :func:`.attention.decode_attention` in rotated coordinates and float32.

    Only queries and outputs are rotated, never a packed token. The mean of the keys is multiplied
    by the query, the mean of the values by the total weight of the packed tokens.
    """
    batch, query_heads, rows, _ = queries.shape
    heads = tokens.exact_keys.shape[1]
    grouped = (queries.astype(mx.float32) * scale).reshape(
        batch, heads, query_heads // heads * rows, -1
    )
    keys, values = tokens.keys, tokens.values
    quantizer = keys.quantizer
    rotated = quantizer.stored_order(quantizer.rotation.apply_to_queries(grouped))
    # Scales multiply scores and weights, which are fewer than levels. A CPU takes half the time
    # with the long matrix in front.
    codes = token_major(keys, tokens.packed_count)
    levels = quantizer.stored_levels(codes)
    packed = (levels @ rotated.swapaxes(-1, -2)).swapaxes(-1, -2) * codes.scales[:, :, None]
    packed = packed + grouped @ keys.mean.swapaxes(-1, -2)
    sink, recent = (
        grouped @ exact.astype(mx.float32).swapaxes(-1, -2)
        for exact in tokens.split(tokens.exact_keys)
    )
    scores = mx.concatenate([sink, packed, recent], axis=-1)
    scores = _masked(scores.reshape(batch, query_heads, rows, tokens.count), mask)
    if tokens.spans:
        counts = (tokens.sink_count, tokens.packed_count, tokens.recent_start, tokens.exact_count)
        scores = _masked(scores, visible_columns(tokens.spans, *counts))
    weights = _softmax(scores, sink_logits).reshape(batch, heads, -1, tokens.count)
    start, stop = tokens.sink_count, tokens.sink_count + tokens.packed_count
    sink, packed, recent = mx.split(weights, [start, stop], axis=-1)
    codes, quantizer = token_major(values, tokens.packed_count), values.quantizer
    levels = quantizer.stored_levels(codes)
    output = quantizer.from_stored_order(packed * codes.scales[:, :, None] @ levels)
    output = quantizer.rotation.invert(output)
    output = output + packed.sum(axis=-1, keepdims=True) * values.mean
    for part, exact in zip((sink, recent), tokens.split(tokens.exact_values)):
        output = output + part @ exact.astype(mx.float32)
    return output.reshape(batch, query_heads, rows, -1).astype(queries.dtype)


def _masked(scores: mx.array, mask: None | str | mx.array) -> mx.array:
    if mask is None:
        return scores
    if isinstance(mask, str):
        rows, count = scores.shape[-2:]
        mask = mx.arange(count) <= mx.arange(count - rows, count)[:, None]
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return scores + mask


def _softmax(scores: mx.array, sink_logits: mx.array | None) -> mx.array:
    if sink_logits is None:
        return mx.softmax(scores, axis=-1)
    column = mx.broadcast_to(
        sink_logits.astype(scores.dtype).reshape(1, -1, 1, 1), (*scores.shape[:-1], 1)
    )
    return mx.softmax(mx.concatenate([column, scores], axis=-1), axis=-1)[..., 1:]


def example_tokens(
    dtypes: tuple[mx.Dtype, ...], quantizers: tuple[TurboQuantizer, ...], mean: float = 0.0
) -> VisibleTokens:
    """Return 70 packed and 20 exact tokens, 4 of them sinks, of two heads, to check kernels.

    The buffers have free space. With one dtype and one quantizer the tokens are latent vectors.
    """
    packed, exact = [], []
    for i, (dtype, quantizer) in enumerate(zip(dtypes, quantizers)):
        x = normal((1, 2, 70, quantizer.dim), i) + mean
        means = x.mean(axis=2, keepdims=True)
        packed.append(packed_side(x, means, quantizer, interleaved=i == 0))
        exact.append(normal((1, 2, 24, quantizer.dim), 2 + i).astype(dtype))
    return VisibleTokens(packed[0], packed[-1], 70, exact[0], exact[-1], 20, 4, 4)


def normal(shape: tuple[int, ...], seed: int) -> mx.array:
    """Return normal random numbers for checks, reproducible by their seed: float32."""
    return mx.random.normal(shape, key=mx.random.key(seed))
