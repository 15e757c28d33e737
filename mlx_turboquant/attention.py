"""Attention over the tokens of a compressed cache: the kernels, and plain MLX to check them."""

from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from . import kernels
from .quantizer import TurboQuantizer
from .storage import CAPACITY_UNIT, PackedTokens

# Up to so many query rows a call is a decode step (or the check of drafted tokens).
MAX_DECODE_ROWS = 8
# What products and short sums of halves may add to an output, relative to the largest one.
HALF_ARITHMETIC = 6e-3
# The kernel holds a row of outputs in the registers of a SIMD group.
_MAX_KERNEL_DIM = 512


class Extent(NamedTuple):
    """What one sequence holds of shared buffers; its recent tokens begin at ``recent_start``."""

    packed: int
    sinks: int
    recent_start: int


@dataclass(slots=True)
class CachedTokens:
    """The tokens that one attention call sees, in order: sinks, packed tokens, recent tokens.

    ``exact_keys`` and ``exact_values`` are (B, H, capacity, dim) in the model's dtype: first come
    the ``sink_count`` sinks, and from ``recent_start`` to ``exact_count`` the recent tokens.

    Sequences of different length share these buffers and end at the same ``exact_count``.
    ``extents`` has then one entry for each; a column that a sequence has no token in belongs to
    none.

    ``new`` are key and value (B, H, 1, dim) of the last token, if they are still to be stored in
    the exact buffers, where recent tokens then follow the sinks: by the attention kernel, or by
    :meth:`settle`.
    """

    keys: PackedTokens
    values: PackedTokens
    exact_keys: mx.array
    exact_values: mx.array
    exact_count: int
    sink_count: int
    recent_start: int
    extents: tuple[Extent, ...] = ()
    new: list[mx.array] | None = None

    def settle(self) -> None:
        """Store the new token, unless that has been done."""
        if self.new is None:
            return
        exact = [self.exact_keys, self.exact_values]
        sinks, recent = self.sink_count, self.recent_start
        if recent > sinks:
            parts = [(0, sinks), (recent, exact[0].shape[2]), (sinks, recent)]
            exact = [mx.concatenate([x[:, :, a:b] for a, b in parts], axis=2) for x in exact]
        last = self.exact_count - 1 - (recent - sinks)
        for buffer, x in zip(exact, self.new):
            buffer[:, :, last : last + 1] = x
        self.store(exact)

    def store(self, exact: list[mx.array]) -> None:
        """Go on with exact buffers in which the new token follows the others without a gap."""
        self.exact_keys, self.exact_values = exact
        self.exact_count -= self.recent_start - self.sink_count
        self.recent_start, self.new = self.sink_count, None

    @property
    def count(self) -> int:
        """All columns: sinks, packed and recent tokens of the longest sequence of each."""
        return self.sink_count + self.keys.count + self.exact_count - self.recent_start

    @property
    def kinds(self) -> list[tuple[PackedTokens, mx.array]]:
        """Packed and exact tokens: of keys and of values, or of keys that are the values."""
        keys, values = (self.keys, self.exact_keys), (self.values, self.exact_values)
        return [keys] if self.values is self.keys else [keys, values]

    def dense(self) -> list[mx.array]:
        """All keys and all values, (B, H, count, dim), in the model's dtype, for each of ``kinds``.

        They are lazy, and what is evaluated is one launch.
        """
        self.settle()
        if self.keys.count == 0:
            return [self._exact_tokens(exact) for _, exact in self.kinds]
        dtypes = (exact.dtype for _, exact in self.kinds)
        quantizers = (packed.quantizer for packed, _ in self.kinds)
        if kernels.agrees(check_dequantize, *dtypes, *quantizers):
            return kernels.launch_dequantize(self)
        return self.reference_dense()

    def _exact_tokens(self, exact: mx.array) -> mx.array:
        if self.recent_start == self.sink_count:
            return exact[:, :, : self.exact_count]
        return mx.concatenate(self.split(exact), axis=2)

    def reference_dense(self) -> list[mx.array]:
        """:meth:`dense` in plain MLX."""
        arrays = []
        for packed, exact in self.kinds:
            sinks, recent = self.split(exact)
            parts = [sinks, packed.dense(exact.dtype), recent]
            arrays.append(mx.concatenate(parts, axis=2))
        return arrays

    def visible(self) -> mx.array:
        """Which columns hold a token of a sequence: boolean (B or 1, 1, 1, count)."""
        columns = (self.sink_count, self.keys.count, self.recent_start, self.exact_count)
        return visible_columns(self.extents, *columns)

    def split(self, exact: mx.array) -> tuple[mx.array, mx.array]:
        """Sinks and recent tokens of an exact buffer."""
        return exact[:, :, : self.sink_count], exact[:, :, self.recent_start : self.exact_count]


def visible_columns(
    extents: tuple[Extent, ...], sinks: int, packed: int, recent_start: int, end: int
) -> mx.array:
    """:meth:`CachedTokens.visible`, for so many columns of each kind."""
    packed_counts, sink_counts, starts = (mx.array(x)[:, None] for x in zip(*extents))
    parts = [
        mx.arange(sinks) < sink_counts,
        mx.arange(packed) < packed_counts,
        mx.arange(recent_start, end) >= starts,
    ]
    return mx.concatenate(parts, axis=-1)[:, None, None]


def decode_attention(
    queries: mx.array,
    tokens: CachedTokens,
    scale: float,
    mask: None | str | mx.array = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Softmax attention of queries (B, query_heads, L, dim) over all tokens, some of them packed.

    Args:
        queries: float16, bfloat16 or float32; query_heads is a multiple of the key heads.
        tokens: The tokens, among them those of the queries themselves.
        scale: Factor of the scores.
        mask: None, "causal" (the last query sees all tokens), boolean (True: visible) or additive,
            broadcastable to (B, query_heads, L, count).
        sinks: Logits (query_heads,) that take part in the softmax without a value.

    Returns:
        (B, query_heads, L, value_dim) in the dtype of the queries.

    Raises:
        ValueError: shapes that do not fit each other, or counts beyond the buffers.
    """
    plan = _plan(queries, tokens, scale, mask, sinks)
    if plan is None:
        tokens.settle()
        return reference_decode_attention(queries, tokens, scale, mask, sinks)
    return kernels.launch_decode_attention(plan, queries, tokens, mask, sinks)


def _plan(queries, tokens, scale, mask, sinks) -> kernels.AttentionPlan | None:
    """The kernels, which the packed keys remember: most steps are like the one before."""
    keys, plain = tokens.keys, mask is None and sinks is None
    bits = (keys.bits, tokens.values.bits)
    target = kernels.backend()
    step = (target, queries.shape, queries.dtype, scale, bits, tokens.new is None)
    if plain and keys.attended is not None and keys.attended.step == step:
        return keys.attended.plan
    _check_shapes(queries, tokens)
    configuration = kernels.attention_configuration(queries, tokens, mask, sinks)
    plan = _checked_plan(target, scale, configuration)
    if plain:
        keys.attended = _Attended(step, plan)
    return plan


class _Attended(NamedTuple):
    """The last attention over packed keys, and its kernels."""

    step: tuple[Any, ...]
    plan: kernels.AttentionPlan | None

    def __deepcopy__(self, memo: dict) -> "_Attended":
        """The same: dtypes and kernels cannot be copied, and caches are."""
        return self


@cache
def _checked_plan(
    target: str, scale: float, configuration: kernels.AttentionConfiguration
) -> kernels.AttentionPlan | None:
    """The kernels of a configuration, unless there are none or they are wrong."""
    dim = max(configuration.keys.dim, configuration.values.dim)
    if target == "reference" or not kernels.supports("decode_attention", dim, _MAX_KERNEL_DIM):
        return None
    if not kernels.agrees(check_decode_attention, *configuration):
        return None
    return kernels.attention_plan(target, scale, configuration)


def reference_decode_attention(queries, tokens, scale, mask=None, sinks=None) -> mx.array:
    """:func:`decode_attention` in plain MLX, in the rotated domain and in float32.

    The queries are rotated once and the output is rotated back once, so that no packed token is.
    The means of keys and values enter as one product with the query and one with the total weight
    of the packed tokens.
    """
    batch, query_heads, rows, _ = queries.shape
    heads = tokens.exact_keys.shape[1]
    grouped = (queries.astype(mx.float32) * scale).reshape(
        batch, heads, query_heads // heads * rows, -1
    )
    quantizer = tokens.keys.quantizer
    rotated = quantizer.stored_order(quantizer.rotation.apply(grouped))
    # The scales multiply scores and weights, of which there are fewer than values. With the long
    # matrix in front a CPU takes half the time.
    levels, scales = tokens.keys.stored_levels()
    packed = (levels @ rotated.swapaxes(-1, -2)).swapaxes(-1, -2) * scales[:, :, None]
    packed = packed + grouped @ tokens.keys.mean.swapaxes(-1, -2)
    sink, recent = (
        grouped @ keys.astype(mx.float32).swapaxes(-1, -2)
        for keys in tokens.split(tokens.exact_keys)
    )
    scores = mx.concatenate([sink, packed, recent], axis=-1)
    scores = _masked(scores.reshape(batch, query_heads, rows, tokens.count), mask)
    if len(tokens.extents) > 1:
        scores = _masked(scores, tokens.visible())
    weights = _softmax(scores, sinks).reshape(batch, heads, -1, tokens.count)
    start, stop = tokens.sink_count, tokens.sink_count + tokens.values.count
    sink, packed, recent = mx.split(weights, [start, stop], axis=-1)
    levels, scales = tokens.values.stored_levels()
    quantizer = tokens.values.quantizer
    output = quantizer.from_stored_order(packed * scales[:, :, None] @ levels)
    output = quantizer.rotation.invert(output)
    output = output + packed.sum(axis=-1, keepdims=True) * tokens.values.mean
    for part, values in zip((sink, recent), tokens.split(tokens.exact_values)):
        output = output + part @ values.astype(mx.float32)
    return output.reshape(batch, query_heads, rows, -1).astype(queries.dtype)


def check_decode_attention(*configuration: Any) -> kernels.Agreement:
    """Compare the kernels of one configuration with plain MLX on 90 tokens.

    Takes the fields of an :class:`.kernels.AttentionConfiguration`.
    """
    wanted = kernels.AttentionConfiguration(*configuration)
    kinds = 1 if wanted.shared else 2
    dtypes = (wanted.key_dtype, wanted.value_dtype)[:kinds]
    tokens = _random_tokens(dtypes, (wanted.keys, wanted.values)[:kinds])
    settled = copy(tokens)
    if wanted.new_token:
        tokens.recent_start = settled.recent_start = tokens.sink_count + 3
        tokens.new = [x[:, :, -1:] for _, x in tokens.kinds]
        settled.exact_keys, settled.exact_values = (x * 1 for _, x in tokens.kinds)
        settled.new = tokens.new
        settled.settle()
    query_heads = wanted.group * tokens.exact_keys.shape[1]
    shape = (1, query_heads, wanted.rows, settled.count)
    masks = {
        "none": None,
        "causal": "causal",
        "boolean": _random(shape, 4) > -1,
        "additive": _random(shape, 4),
    }
    queries = _random((*shape[:3], wanted.keys.dim), 5, wanted.query_dtype)
    scale, mask = wanted.keys.dim**-0.5, masks[wanted.mask_kind]
    sinks = _random((query_heads,), 6) if wanted.sinks else None
    expected = reference_decode_attention(queries, settled, scale, mask, sinks)
    agreements = []
    for plan in kernels.attention_plan(kernels.backend(), scale, wanted).variants():
        seen = copy(tokens)
        output = kernels.launch_decode_attention(plan, queries, seen, mask, sinks)
        agreement = kernels.compare(output, expected, wanted.query_dtype, HALF_ARITHMETIC)
        if not _same_exact_tokens(seen, settled):
            agreement = agreement._replace(error=mx.inf)
        agreements.append(agreement)
    return _worst(agreements)


def _same_exact_tokens(tokens: CachedTokens, expected: CachedTokens) -> bool:
    pairs = zip(tokens.kinds, expected.kinds)
    count = expected.exact_count
    return all(mx.array_equal(x[:, :, :count], y[:, :, :count]) for (_, x), (_, y) in pairs)


def _worst(agreements: list[kernels.Agreement]) -> kernels.Agreement:
    # Not max() of the errors: one that is not a number must stay one.
    return next((each for each in agreements if not each.holds), max(agreements))


def check_dequantize(*configuration: mx.Dtype | TurboQuantizer) -> kernels.Agreement:
    """Compare dense keys and values of 90 tokens, or of keys that are the values, with plain MLX.

    ``configuration`` are the dtypes of the exact tokens, then the quantizers.
    """
    kinds = len(configuration) // 2
    dtypes, quantizers = configuration[:kinds], configuration[kinds:]
    tokens = _random_tokens(dtypes, quantizers, mean=2.0)
    pairs = zip(kernels.launch_dequantize(tokens), tokens.reference_dense())
    return _worst([kernels.compare(*pair, dtype) for pair, dtype in zip(pairs, dtypes)])


def _random_tokens(dtypes, quantizers, mean: float = 0.0) -> CachedTokens:
    """70 packed and 20 exact tokens of two heads, 4 of them sinks, with free space behind them."""
    packed, exact = [], []
    for i, (dtype, quantizer) in enumerate(zip(dtypes, quantizers)):
        store = PackedTokens(quantizer.bits, quantizer.seed, interleaved=i == 0)
        # A check depends on no other kernel, and none has to be compiled for it.
        store.append_without_kernels(_random((1, 2, 70, quantizer.dim), i) + mean)
        packed.append(store)
        exact.append(_random((1, 2, 24, quantizer.dim), 2 + i, dtype))
    return CachedTokens(packed[0], packed[-1], exact[0], exact[-1], 20, 4, 4)


def _random(shape: tuple[int, ...], seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _check_shapes(queries: mx.array, tokens: CachedTokens) -> None:
    heads, dim = tokens.exact_keys.shape[1], tokens.exact_keys.shape[-1]
    if queries.shape[-1] != dim or queries.shape[1] % heads:
        raise ValueError(
            f"Queries of shape {queries.shape} do not fit {heads} heads of {dim} values: "
            f"use a multiple of {heads} heads of {dim} values."
        )
    room = (tokens.exact_keys.shape[2], tokens.keys.capacity)
    if tokens.exact_count > room[0] or tokens.keys.count > room[1]:
        raise ValueError(
            f"{tokens.exact_count} exact and {tokens.keys.count} packed tokens are not in buffers "
            f"of {room[0]} and {room[1]}: use fewer."
        )
    if room[1] % CAPACITY_UNIT:
        raise ValueError(
            f"A buffer of {room[1]} packed tokens ends within a step of the kernel: "
            f"use a multiple of {CAPACITY_UNIT}."
        )


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
