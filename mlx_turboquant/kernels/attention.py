"""Attention of few query rows over the tokens of a compressed cache, which it reads as they are."""

from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import mlx.core as mx

from ..codec.quantizer import TurboQuantizer
from . import arguments, reference
from .runtime import (
    LANES,
    SIMDS,
    THREADGROUP_BYTES,
    Agreement,
    Constant,
    Launch,
    backend,
    build,
    checked,
    compare,
    supports,
    worst,
)
from .tokens import BLOCK, CAPACITY_UNIT, CachedTokens, Span

# Up to so many query rows a call is a decode step (or the check of drafted tokens).
MAX_DECODE_ROWS = 8
# The order is that of MASK in decode_attention.metal.
MASK_KINDS = ("none", "causal", "boolean", "additive")
# What products and short sums of halves may add to an output, relative to the largest one.
HALF_ARITHMETIC = 6e-3
# A row of outputs is in the registers of a SIMD group.
_MAX_DIM = 512
# Tokens that a SIMD group takes in one step.
_PACKED_TOKENS = 64
_EXACT_TOKENS = 8
# Query rows of a threadgroup, at most, and on CUDA those with so many packed tokens in all heads.
# Eight need up to 255 registers, and half as many threadgroups fit a multiprocessor; but a code is
# unpacked once for eight rows, which pays where all have work.
_ROWS, _LONG_ROWS, _LONG_TOKENS = 4, {"cuda": 8}, 96 * 1024
_INPUTS = (
    "queries",
    "key_codes",
    "key_scales",
    "key_mean",
    "value_codes",
    "value_scales",
    "exact_keys",
    "exact_values",
    "constants",
    "sizes",
)


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
    _check_shapes(queries, tokens)
    kernel = DecodeAttention.of(queries, tokens, mask, sinks)
    if kernel is None:
        return reference.decode_attention(queries, tokens, scale, mask, sinks)
    return kernel(queries, tokens, scale, mask, sinks)


class Configuration(NamedTuple):
    """All that decides which kernels an attention needs, besides the machine.

    ``group`` is the number of query heads of a key head, ``rows`` that of queries of a head.
    """

    keys: TurboQuantizer
    values: TurboQuantizer
    query_dtype: mx.Dtype
    key_dtype: mx.Dtype
    value_dtype: mx.Dtype
    group: int
    rows: int
    mask_kind: str = "none"
    has_sinks: bool = False
    is_latent: bool = False


class DecodeAttention:
    """``decode_attention.metal`` and ``combine.metal`` in one configuration."""

    name = "decode_attention"

    def __init__(self, configuration: Configuration):
        wanted = self._configuration = configuration
        dim, value_dim = wanted.keys.dim, wanted.values.dim
        mask = MASK_KINDS.index(wanted.mask_kind)
        order, power = arguments.order_and_power(wanted.keys)
        constants: dict[str, Constant] = {
            "QUERY_T": wanted.query_dtype,
            "KEY_T": wanted.key_dtype,
            "VALUE_T": wanted.value_dtype,
            "DIM": dim,
            "VALUE_DIM": value_dim,
            "ORDER": order,
            "POWER": power,
            "KEY_BITS": wanted.keys.bits,
            "VALUE_BITS": wanted.values.bits,
            "VALUE_STRIDE": BLOCK if wanted.is_latent else 1,
            "SIMDS": SIMDS,
            "MASK": mask,
            "MASK_ARRAY": mask > 1,
        }
        inputs = (*_INPUTS, "mask") if mask > 1 else _INPUTS
        # The kernels by the query rows of a threadgroup: with few packed tokens, with many.
        self._group_rows = wanted.group * wanted.rows
        self._rows, self._long_rows = (
            _rows_per_threadgroup(most, self._group_rows, max(dim, value_dim))
            for most in (_ROWS, _LONG_ROWS.get(backend(), _ROWS))
        )
        self._attend: dict[int, Launch] = {
            rows: build(self.name, inputs, ("partial",), constants | {"ROWS": rows})
            for rows in (self._rows, self._long_rows)
        }
        self._combine_simds = min(8, THREADGROUP_BYTES // (16 * value_dim))
        self._combine = self._build_combine()

    def _build_combine(self) -> Launch:
        wanted = self._configuration
        order, power = arguments.order_and_power(wanted.values)
        inputs = ("partial", "mean", "rotation", "sizes")
        constants: dict[str, Constant] = {
            "T": wanted.query_dtype,
            "SINKS": wanted.has_sinks,
            "DIM": wanted.values.dim,
            "ORDER": order,
            "POWER": power,
            "SIMDS": self._combine_simds,
        }
        return build(
            "combine", (*inputs, "sinks") if wanted.has_sinks else inputs, ("out",), constants
        )

    @classmethod
    def of(
        cls,
        queries: mx.array,
        tokens: CachedTokens,
        mask: None | str | mx.array,
        sinks: mx.array | None,
    ) -> "DecodeAttention | None":
        """The kernels for such arguments; None where plain MLX takes their place."""
        dim = max(tokens.keys.quantizer.dim, tokens.values.quantizer.dim)
        if not supports(cls.name, dim, _MAX_DIM):
            return None
        return checked(cls, cls.configuration(queries, tokens, mask, sinks))

    @staticmethod
    def configuration(
        queries: mx.array,
        tokens: CachedTokens,
        mask: None | str | mx.array,
        sinks: mx.array | None,
    ) -> Configuration:
        """What decides which kernels such arguments need."""
        _, query_heads, rows, _ = queries.shape
        return Configuration(
            tokens.keys.quantizer,
            tokens.values.quantizer,
            queries.dtype,
            tokens.exact_keys.dtype,
            tokens.exact_values.dtype,
            query_heads // tokens.exact_keys.shape[1],
            rows,
            mask_kind(mask),
            sinks is not None,
            tokens.is_latent,
        )

    def check(self) -> Agreement:
        """Compares the attention over 90 tokens, for every number of rows of a threadgroup."""
        wanted = self._configuration
        sides = 1 if wanted.is_latent else 2
        dtypes = (wanted.key_dtype, wanted.value_dtype)[:sides]
        tokens = reference.example_tokens(dtypes, (wanted.keys, wanted.values)[:sides])
        query_heads = wanted.group * tokens.exact_keys.shape[1]
        shape = (1, query_heads, wanted.rows, tokens.count)
        masks = {
            "none": None,
            "causal": "causal",
            "boolean": reference.normal(shape, 4) > -1,
            "additive": reference.normal(shape, 4),
        }
        queries = reference.normal((*shape[:3], wanted.keys.dim), 5).astype(wanted.query_dtype)
        scale, mask = wanted.keys.dim**-0.5, masks[wanted.mask_kind]
        sinks = reference.normal((query_heads,), 6) if wanted.has_sinks else None
        expected = reference.decode_attention(queries, tokens, scale, mask, sinks)
        outputs = (self(queries, tokens, scale, mask, sinks, rows) for rows in self._attend)
        dtype = wanted.query_dtype
        return worst([compare(output, expected, dtype, HALF_ARITHMETIC) for output in outputs])

    def __call__(
        self,
        queries: mx.array,
        tokens: CachedTokens,
        scale: float,
        mask: None | str | mx.array,
        sinks: mx.array | None,
        tile: int | None = None,
    ) -> mx.array:
        """Two launches for :func:`decode_attention`, with its arguments.

        A threadgroup has ``tile`` query rows, or as many as suit the number of packed tokens.
        """
        batch, query_heads, rows, _ = queries.shape
        keys, values = tokens.keys, tokens.values
        masks, strides = [], (0, 0, 0)
        if isinstance(mask, mx.array):
            mask, strides = _mask_arguments(mask, (batch, query_heads, rows, tokens.count))
            masks = [mask]
        heads, group_rows = batch * tokens.exact_keys.shape[1], self._group_rows
        if tile is None:
            is_long = heads * tokens.packed_count >= _LONG_TOKENS
            tile = self._long_rows if is_long else self._rows
        tiles = -(-group_rows // tile)
        fitting = 2048 // max(tile, _ROWS)  # threadgroups that fill a GPU
        splits, packed_splits, sizes = _divided(
            fitting // (heads * tiles),
            tokens.packed_count,
            tokens.exact_count,
            tokens.sink_count,
            tokens.recent_start,
            tokens.spans,
            strides,
        )
        inputs = [
            queries,
            keys.codes,
            keys.scales,
            keys.mean,
            values.codes,
            values.scales,
            tokens.exact_keys,
            tokens.exact_values,
            arguments.attention(keys.quantizer, values.quantizer, scale),
            sizes,
            *masks,
        ]
        value_dim = self._configuration.values.dim
        [partial] = self._attend[tile](
            inputs=inputs,
            grid=(heads * LANES * SIMDS, splits, tiles),
            threadgroup=(LANES * SIMDS, 1, 1),
            output_shapes=[(heads * group_rows, splits, value_dim + 2)],
            output_dtypes=[mx.float32],
        )
        inputs = [
            partial,
            values.mean,
            arguments.rotation(values.quantizer),
            arguments.sizes(packed_splits, group_rows, rows, query_heads),
        ]
        if sinks is not None:
            inputs.append(sinks.astype(mx.float32))
        threads = LANES * self._combine_simds
        [output] = self._combine(
            inputs=inputs,
            grid=(heads * group_rows * threads, 1, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[(batch, query_heads, rows, value_dim)],
            output_dtypes=[queries.dtype],
        )
        return output


def mask_kind(mask: None | str | mx.array) -> str:
    """One of ``MASK_KINDS``."""
    if mask is None or isinstance(mask, str):
        return mask or "none"
    return "boolean" if mask.dtype == mx.bool_ else "additive"


@lru_cache(maxsize=64)
def _divided(
    most: int,
    packed_count: int,
    exact_count: int,
    sink_count: int,
    recent_start: int,
    spans: tuple[Span, ...],
    mask_strides: tuple[int, int, int],
) -> tuple[int, int, mx.array]:
    """Threadgroups of a head, those of its packed tokens (at most ``most``), and the sizes.

    Those of packed tokens all take the same number of steps; those of exact tokens few enough to
    run beside them. ``sizes`` are those of decode_attention.metal, for all layers of a step.
    """
    blocks = -(-packed_count // (_PACKED_TOKENS * SIMDS))
    steps = max(1, -(-blocks // max(1, most)))
    packed_splits = max(1, -(-blocks // steps))
    splits = packed_splits - (-exact_count // (2 * steps * _EXACT_TOKENS * SIMDS))
    sizes = arguments.sizes(
        exact_count,
        splits,
        packed_splits,
        sink_count,
        sink_count + packed_count - recent_start,
        *mask_strides,
        *chain(*(spans or [(packed_count, sink_count, recent_start)])),
    )
    return splits, packed_splits, sizes


def _rows_per_threadgroup(most: int, group_rows: int, dim: int) -> int:
    """A power of two of query rows, at most ``most``, whose outputs fit in the registers.

    These are up to 32 floats a lane. Queries and outputs then fit in the threadgroup memory too.
    """
    most = 1 << (min(most, 1024 // dim).bit_length() - 1)
    return min(most, 1 << (group_rows - 1).bit_length())


def _mask_arguments(
    mask: mx.array, shape: tuple[int, ...]
) -> tuple[mx.array, tuple[int, int, int]]:
    """The mask of decode_attention.metal, and its strides of sequence, query head and row."""
    mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    if any(size not in (1, full) for size, full in zip(mask.shape, shape)):
        raise ValueError(f"A mask of shape {mask.shape} does not fit scores of shape {shape}.")
    mask = mx.broadcast_to(mask, (*mask.shape[:3], shape[3]))
    strides, step = [], shape[3]
    for size in mask.shape[2::-1]:
        strides.append(step if size > 1 else 0)
        step *= size
    if mask.dtype != mx.bool_:
        mask = mask.astype(mx.float32)
    return mask, tuple(reversed(strides))


def _check_shapes(queries: mx.array, tokens: CachedTokens) -> None:
    _, heads, room, dim = tokens.exact_keys.shape
    if queries.shape[-1] != dim or queries.shape[1] % heads:
        raise ValueError(
            f"Queries of shape {queries.shape} do not fit {heads} heads of {dim} values: "
            f"use a multiple of {heads} heads of {dim} values."
        )
    capacity = tokens.keys.capacity
    if tokens.exact_count > room or tokens.packed_count > capacity:
        raise ValueError(
            f"{tokens.exact_count} exact and {tokens.packed_count} packed tokens are not in "
            f"buffers of {room} and {capacity}: use fewer."
        )
    if capacity % CAPACITY_UNIT:
        raise ValueError(
            f"A buffer of {capacity} packed tokens ends within a step of the kernel: "
            f"use a multiple of {CAPACITY_UNIT}."
        )
