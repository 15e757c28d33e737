"""Attention over the tokens of a compressed cache, in plain MLX: the reference for the kernels."""

from dataclasses import dataclass

import mlx.core as mx

from .storage import PackedTokens

# Up to so many query rows a call is a decode step (or the check of drafted tokens).
MAX_DECODE_ROWS = 8


@dataclass
class CachedTokens:
    """The tokens that one attention call sees, in order: sinks, packed tokens, recent tokens.

    ``exact_keys`` and ``exact_values`` are (B, H, capacity, dim) in the model's dtype. The first
    ``sink_count`` of their ``exact_count`` tokens come before the packed ones, the others after.
    """

    keys: PackedTokens
    values: PackedTokens
    exact_keys: mx.array
    exact_values: mx.array
    exact_count: int
    sink_count: int

    @property
    def count(self) -> int:
        """All tokens, exact and packed."""
        return self.exact_count + self.keys.count

    def dense(self) -> tuple[mx.array, mx.array]:
        """All keys and all values, (B, H, count, dim), in the model's dtype."""
        return self._join(self.keys, self.exact_keys), self._join(self.values, self.exact_values)

    def _join(self, packed: PackedTokens, exact: mx.array) -> mx.array:
        exact = exact[:, :, : self.exact_count]
        if packed.count == 0:
            return exact
        sinks, recent = exact[:, :, : self.sink_count], exact[:, :, self.sink_count :]
        return mx.concatenate([sinks, packed.dense(exact.dtype), recent], axis=2)


def decode_attention(
    queries: mx.array,
    tokens: CachedTokens,
    scale: float,
    mask: None | str | mx.array = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Softmax attention of queries (B, query_heads, L, dim) over all tokens, some of them packed.

    Works in the rotated domain, in float32: the queries are rotated once and the output is rotated
    back once, so that no packed token is. The means of keys and values enter as one product
    with the query and one with the total weight of the packed tokens.

    Args:
        queries: float16, bfloat16 or float32; query_heads is a multiple of the key heads.
        tokens: The tokens, among them those of the queries themselves.
        scale: Factor of the scores.
        mask: None, "causal" (the last query sees all tokens), boolean (True: visible) or additive,
            broadcastable to (B, query_heads, L, count).
        sinks: Logits (query_heads,) that take part in the softmax without a value.

    Returns:
        (B, query_heads, L, value_dim) in the dtype of the queries.
    """
    batch, query_heads, rows, _ = queries.shape
    heads = tokens.exact_keys.shape[1]
    grouped = (queries.astype(mx.float32) * scale).reshape(
        batch, heads, query_heads // heads * rows, -1
    )
    rotated = tokens.keys.quantizer.rotation.apply(grouped)
    packed = rotated @ tokens.keys.rotated_values().swapaxes(-1, -2)
    packed = packed + grouped @ tokens.keys.mean.swapaxes(-1, -2)
    exact_keys = tokens.exact_keys[:, :, : tokens.exact_count].astype(mx.float32)
    exact = grouped @ exact_keys.swapaxes(-1, -2)
    scores = _in_order(exact, packed, tokens).reshape(batch, query_heads, rows, tokens.count)
    weights = _softmax(_masked(scores, mask), sinks)
    weights = weights.reshape(batch, heads, -1, tokens.count)
    start, stop = tokens.sink_count, tokens.sink_count + tokens.values.count
    packed = weights[..., start:stop]
    exact = mx.concatenate([weights[..., :start], weights[..., stop:]], axis=-1)
    output = tokens.values.quantizer.rotation.invert(packed @ tokens.values.rotated_values())
    output = output + packed.sum(axis=-1, keepdims=True) * tokens.values.mean
    output = output + exact @ tokens.exact_values[:, :, : tokens.exact_count].astype(mx.float32)
    return output.reshape(batch, query_heads, rows, -1).astype(queries.dtype)


def _in_order(exact: mx.array, packed: mx.array, tokens: CachedTokens) -> mx.array:
    sinks, recent = exact[..., : tokens.sink_count], exact[..., tokens.sink_count :]
    return mx.concatenate([sinks, packed, recent], axis=-1)


def _masked(scores: mx.array, mask: None | str | mx.array) -> mx.array:
    if mask is None:
        return scores
    if isinstance(mask, str):
        rows, count = scores.shape[-2:]
        mask = mx.arange(count) <= mx.arange(count - rows, count)[:, None]
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return scores + mask


def _softmax(scores: mx.array, sinks: mx.array | None) -> mx.array:
    if sinks is None:
        return mx.softmax(scores, axis=-1)
    column = mx.broadcast_to(
        sinks.astype(scores.dtype).reshape(1, -1, 1, 1), (*scores.shape[:-1], 1)
    )
    return mx.softmax(mx.concatenate([column, scores], axis=-1), axis=-1)[..., 1:]
