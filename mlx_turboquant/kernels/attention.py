"""Attention of a few query rows over a compressed cache, whose tokens are read packed."""

from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import mlx.core as mx

from ..codec.quantizer import TurboQuantizer
from ..codec.trellis import MOST_BITS, WINDOW
from . import arguments, reference, runtime
from .runtime import LANES, THREADGROUP_BYTES, Agreement, Constant, Launch
from .tokens import BLOCK, CAPACITY_UNIT, Span, VisibleTokens
from .tuning import TARGETS, Tuning, Tunings, tuning_for, tunings

# A call with at most this many query rows is a decode step or a check of drafted tokens.
MAX_DECODE_ROWS = 8
# A kind's index is MASK in decode_attention.metal.
MASK_KINDS = ("none", "causal", "boolean", "additive")
# Error that half-precision products and short sums may add, relative to the largest output.
HALF_ARITHMETIC = 6e-3
# A SIMD group holds a row of outputs in its registers.
_MAX_DIM = 512
# Exact tokens in a step of a SIMD group.
_EXACT_TOKENS = 8
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
# Indices of the array ``sizes``, which decode_attention.metal knows by these names. The columns of
# a mask are sinks, packed tokens and recent tokens. A recent token is in the exact buffers at its
# column minus RECENT_SHIFT. From SPANS on there is one Span for all sequences, or one for each.
_SIZES = (
    "EXACT_COUNT",
    "SPLITS",
    "PACKED_SPLITS",
    "SINK_COLUMNS",
    "RECENT_SHIFT",
    "MASK_BATCH_STRIDE",
    "MASK_HEAD_STRIDE",
    "MASK_ROW_STRIDE",
    "SPANS",
)


def decode_attention(
    queries: mx.array,
    tokens: VisibleTokens,
    scale: float,
    mask: None | str | mx.array = None,
    sink_logits: mx.array | None = None,
) -> mx.array:
    """Compute softmax attention of queries (B, query_heads, L, dim) over packed and exact tokens.

    Args:
        queries: float16, bfloat16 or float32; query_heads is a multiple of the key heads.
        tokens: All tokens, including those of the queries.
        scale: Factor of the scores.
        mask: None, "causal" (the last query sees all tokens), boolean (True: visible) or additive,
            broadcastable to (B, query_heads, L, count).
        sink_logits: Logits (query_heads,) that take part in the softmax without a value.

    Returns:
        (B, query_heads, L, value_dim) in the dtype of the queries.

    Raises:
        ValueError: shapes that do not fit each other, counts beyond the buffers, or packed buffers
            whose capacity is not a multiple of 64.
    """
    _check_shapes(queries, tokens)
    wanted = DecodeAttention.configuration(queries, tokens, mask, sink_logits)
    fits = runtime.supports(DecodeAttention.name, max(wanted.keys.dim, wanted.values.dim), _MAX_DIM)
    kernel = runtime.checked(DecodeAttention, wanted) if fits else None
    if kernel is None:
        return reference.decode_attention(queries, tokens, scale, mask, sink_logits)
    return kernel(queries, tokens, scale, mask, sink_logits)


class Configuration(NamedTuple):
    """The properties of an attention call that select its kernels.

    ``group`` is the number of query heads per key head, ``rows`` that of query rows per head.
    """

    keys: TurboQuantizer
    values: TurboQuantizer
    query_dtype: mx.Dtype
    key_dtype: mx.Dtype
    value_dtype: mx.Dtype
    group: int
    rows: int
    mask_kind: str = "none"
    has_sink_logits: bool = False
    is_latent: bool = False


class DecodeAttention:
    """``decode_attention.metal`` and ``combine.metal`` in one configuration.

    ``chosen`` overrides the tunings of this machine.
    """

    name = "decode_attention"

    def __init__(self, configuration: Configuration, chosen: Tunings | None = None):
        wanted = self._configuration = configuration
        self._group_rows = wanted.group * wanted.rows
        self._wider = max(wanted.keys.dim, wanted.values.dim)
        self._target = TARGETS["cuda" if runtime.backend() == "cuda" else "metal"]
        self.tunings = chosen or tunings(
            runtime.backend(), wanted.keys.dim, wanted.values.dim, self._group_rows
        )
        self._attend: dict[Tuning, Launch] = {
            tuning: self._build(tuning) for _, tuning in self.tunings
        }
        # Threadgroups that share the query rows of a key head.
        self._tiles = {each: -(-self._group_rows // self._rows(each)) for each in self._attend}
        self._combine_simds = min(8, THREADGROUP_BYTES // (16 * wanted.values.dim))
        self._combine = self._build_combine()

    def _build(self, tuning: Tuning) -> Launch:
        wanted = self._configuration
        order, power = wanted.keys.rotation.factors
        mask = MASK_KINDS.index(wanted.mask_kind)
        rows, coordinates = self._rows(tuning), self._coordinates(tuning)
        constants: dict[str, Constant] = {
            "QUERY_T": wanted.query_dtype,
            "KEY_T": wanted.key_dtype,
            "VALUE_T": wanted.value_dtype,
            "DIM": wanted.keys.dim,
            "VALUE_DIM": wanted.values.dim,
            "ORDER": order,
            "POWER": power,
            "KEY_BITS": wanted.keys.bits,
            "KEY_PATTERN": arguments.pattern(wanted.keys),
            "BASIS": wanted.keys.basis is not None,
            "VALUE_PATTERN": arguments.pattern(wanted.values),
            "VALUE_STRIDE": BLOCK if wanted.is_latent else 1,
            "MASK": mask,
            "MASK_ARRAY": mask > 1,
            "ROWS": rows,
            "COORDINATES": coordinates,
            "TOKENS": tuning.tokens,
            "BATCH": tuning.batch,
            "SIMDS": tuning.simds,
            "PAIR_TABLE": self._looks_up_pairs(tuning),
            "HALF_SUMS": self._target.half_sums,
            "AHEAD": self._target.ahead,
            **{name: place for place, name in enumerate(_SIZES)},
        }
        inputs = _INPUTS if wanted.keys.basis is None else (*_INPUTS, "axes")
        inputs = (*inputs, "mask") if mask > 1 else inputs
        blocks = 1 if rows * self._lane_values(coordinates) > 32 else 2
        return runtime.build(self.name, inputs, ("partial",), constants, blocks)

    def _rows(self, tuning: Tuning) -> int:
        """Query rows per threadgroup: the fewest threadgroups, evenly filled."""
        most = max(1, min(tuning.rows, LANES * tuning.accumulators // self._wider))
        return -(-self._group_rows // -(-self._group_rows // most))

    def _looks_up_pairs(self, tuning: Tuning) -> bool:
        """Whether tables have pairs of levels, which for trellis codes must fit the memory."""
        sides = self._configuration.keys, self._configuration.values
        digits = {b for side in sides if side.is_trellis for b in arguments.eights(side)}
        if not digits:
            return bool(tuning.pair_table)
        words = sum(2 ** (WINDOW + bits) for bits in digits if 0 < bits <= MOST_BITS)
        return 4 * words <= self._target.pair_bytes

    def _coordinates(self, tuning: Tuning) -> int:
        """Neighbouring coordinates of a value per lane."""
        return 8 if self._rows(tuning) * self._lane_values(8) <= tuning.accumulators else 4

    def _lane_values(self, coordinates: int) -> int:
        """Output floats that a lane holds per row."""
        run = LANES * coordinates
        return -(-self._configuration.values.dim // run) * coordinates

    def _build_combine(self) -> Launch:
        wanted = self._configuration
        order, power = wanted.values.rotation.factors
        inputs = ("partial", "mean", "rotation", "sizes")
        coordinates = -(-wanted.values.dim // LANES)
        constants: dict[str, Constant] = {
            "T": wanted.query_dtype,
            "SINKS": wanted.has_sink_logits,
            "DIM": wanted.values.dim,
            "ORDER": order,
            "POWER": power,
            "SIMDS": self._combine_simds,
            "BATCH": max(1, self._target.combined // max(4, coordinates)),
        }
        return runtime.build(
            "combine", (*inputs, "sinks") if wanted.has_sink_logits else inputs, ("out",), constants
        )

    @staticmethod
    def configuration(
        queries: mx.array,
        tokens: VisibleTokens,
        mask: None | str | mx.array,
        sink_logits: mx.array | None,
    ) -> Configuration:
        """Return the configuration for these arguments."""
        _, query_heads, rows, _ = queries.shape
        if isinstance(mask, mx.array):
            mask = "boolean" if mask.dtype == mx.bool_ else "additive"
        return Configuration(
            arguments.example(tokens.keys.quantizer),
            tokens.values.quantizer,
            queries.dtype,
            tokens.exact_keys.dtype,
            tokens.exact_values.dtype,
            query_heads // tokens.exact_keys.shape[1],
            rows,
            mask or "none",
            sink_logits is not None,
            tokens.is_latent,
        )

    def check(self) -> Agreement:
        """Compare attention over 90 tokens with plain MLX, for every tuning."""
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
        sink_logits = reference.normal((query_heads,), 6) if wanted.has_sink_logits else None
        expected = reference.decode_attention(queries, tokens, scale, mask, sink_logits)
        outputs = (self(queries, tokens, scale, mask, sink_logits, each) for each in self._attend)
        dtype = wanted.query_dtype
        return runtime.worst(
            [runtime.compare(output, expected, dtype, HALF_ARITHMETIC) for output in outputs]
        )

    def __call__(
        self,
        queries: mx.array,
        tokens: VisibleTokens,
        scale: float,
        mask: None | str | mx.array,
        sink_logits: mx.array | None,
        tuning: Tuning | None = None,
    ) -> mx.array:
        """Launch both kernels, with the arguments of :func:`decode_attention`.

        ``tuning`` is one of :attr:`tunings`; None selects it by the number of tokens.
        """
        batch, query_heads, rows, _ = queries.shape
        keys, values = tokens.keys, tokens.values
        masks, strides = [], (0, 0, 0)
        if isinstance(mask, mx.array):
            mask, strides = arguments.mask_and_strides(
                mask, (batch, query_heads, rows, tokens.count)
            )
            masks = [mask]
        heads, group_rows = batch * tokens.exact_keys.shape[1], self._group_rows
        if tuning is None:
            tuning = tuning_for(self.tunings, heads * tokens.packed_count)
        tiles = self._tiles[tuning]
        most = tuning.threadgroups // (heads * tiles)
        columns = Span(tokens.packed_count, tokens.sink_count, tokens.recent_start)
        splits, packed_splits, sizes = _divided(
            tuning, most, tokens.exact_count, columns, tokens.spans, strides
        )
        basis = keys.quantizer.basis
        inputs = [
            queries,
            keys.codes,
            keys.scales,
            keys.mean,
            values.codes,
            values.scales,
            tokens.exact_keys,
            tokens.exact_values,
            arguments.attention(self._configuration.keys, self._configuration.values, scale),
            sizes,
            *([] if basis is None else [basis.query_axes]),
            *masks,
        ]
        value_dim = self._configuration.values.dim
        threads = LANES * tuning.simds
        [partial] = self._attend[tuning](
            inputs=inputs,
            grid=(heads * threads, splits, tiles),
            threadgroup=(threads, 1, 1),
            output_shapes=[(heads * group_rows, splits, value_dim + 2)],
            output_dtypes=[mx.float32],
        )
        inputs = [
            partial,
            values.mean,
            arguments.rotation(values.quantizer),
            arguments.sizes(packed_splits, group_rows, rows, query_heads),
        ]
        if sink_logits is not None:
            inputs.append(sink_logits.astype(mx.float32))
        threads = LANES * self._combine_simds
        [output] = self._combine(
            inputs=inputs,
            grid=(heads * group_rows * threads, 1, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[(batch, query_heads, rows, value_dim)],
            output_dtypes=[queries.dtype],
        )
        return output


@lru_cache(maxsize=64)
def _divided(
    tuning: Tuning,
    most: int,
    exact_count: int,
    columns: Span,
    spans: tuple[Span, ...],
    mask_strides: tuple[int, int, int],
) -> tuple[int, int, mx.array]:
    """Return the splits of a head, those of its packed tokens (at most ``most``), and ``sizes``.

    All packed splits take the same number of steps. An exact split takes at most twice as many,
    of fewer tokens, and runs beside them. ``sizes`` is cached for all layers of a decode step. All
    sequences are divided alike: ``columns`` has the largest counts.
    """
    blocks = -(-columns.packed // (tuning.tokens * LANES * tuning.simds))
    steps = max(1, -(-blocks // max(1, most)))
    packed_splits = max(1, -(-blocks // steps))
    splits = packed_splits - (-exact_count // (2 * steps * _EXACT_TOKENS * tuning.simds))
    recent_shift = columns.sinks + columns.packed - columns.recent_start
    sizes = (exact_count, splits, packed_splits, columns.sinks, recent_shift, *mask_strides)
    return splits, packed_splits, arguments.sizes(*sizes, *chain(*(spans or (columns,))))


def _check_shapes(queries: mx.array, tokens: VisibleTokens) -> None:
    _, heads, room, dim = tokens.exact_keys.shape
    if queries.shape[-1] != dim or queries.shape[1] % heads:
        raise ValueError(
            f"Queries of shape {queries.shape} do not fit {heads} heads of {dim} values: "
            f"use a multiple of {heads} heads of {dim} values."
        )
    capacity = tokens.keys.capacity
    if tokens.exact_count > room or tokens.packed_count > capacity:
        raise ValueError(
            f"{tokens.exact_count} exact and {tokens.packed_count} packed tokens do not fit into "
            f"buffers of {room} and {capacity}: use fewer."
        )
    if capacity % CAPACITY_UNIT:
        raise ValueError(
            f"A buffer of {capacity} packed tokens ends within a step of the kernel: "
            f"use a multiple of {CAPACITY_UNIT}."
        )
