"""Kernels that quantize, dequantize and multiply vectors, each with plain MLX as its fallback."""

import math
from collections.abc import Sequence
from functools import partial

import mlx.core as mx

from ..codec.packing import EIGHT, words_per_vector
from ..codec.quantizer import QuantizedVectors, TurboQuantizer
from . import arguments, reference, runtime
from .runtime import LANES, SIMDS, THREADGROUP_BYTES, Agreement, Constant
from .tokens import BLOCK, PackedSide, VisibleTokens

_PARAMETERS = ("mean", "cells", "gains", "signs", "matrix", "weights")
_RESTORED = ("codes", "scales", "mean", "constants")
# The lanes that share a vector in quantize.metal belong to one SIMD group.
_MAX_DIM = 1024
_MAX_SEARCHED_DIM = 768
# Bytes of threadgroup memory that the cells of a pattern take at most.
_CELLS = 4096
# Tokens that a SIMD group of dequantize.metal restores.
_RESTORED_TOKENS = 32


def quantize(
    vectors: Sequence[mx.array], means: Sequence[mx.array], quantizers: Sequence[TurboQuantizer]
) -> list[QuantizedVectors]:
    """Quantize keys and values of the same tokens, or one of the two, in one launch.

    The float32 means (B, H, 1, dim) are subtracted from the vectors (B, H, n, dim). Quantizers need
    the "unbiased" scale. Codes are uint32 (B, H, n, words), scales bfloat16 (B, H, n).
    """
    most = _MAX_SEARCHED_DIM if any(each.is_trellis for each in quantizers) else _MAX_DIM
    fits = runtime.supports(Quantize.name, max(each.dim for each in quantizers), most)
    dtypes = tuple(x.dtype for x in vectors)
    examples = tuple(map(arguments.example, quantizers))
    kernel = runtime.checked(Quantize, dtypes, examples) if fits else None
    if kernel is None:
        return [reference.quantize(*each) for each in zip(vectors, means, quantizers)]
    return kernel(vectors, means, quantizers)


def dense(tokens: VisibleTokens) -> list[mx.array]:
    """Return all keys and values, or latent vectors: (B, H, count, dim) in the model's dtype.

    The arrays are lazy; evaluating them takes one launch.
    """
    if tokens.packed_count == 0:
        return [_exact_tokens(tokens, exact) for _, exact in tokens.sides]
    dtypes = tuple(exact.dtype for _, exact in tokens.sides)
    examples = tuple(arguments.example(packed.quantizer) for packed, _ in tokens.sides)
    kernel = runtime.checked(Dequantize, dtypes, examples)
    return reference.dense(tokens) if kernel is None else kernel(tokens)


def _exact_tokens(tokens: VisibleTokens, exact: mx.array) -> mx.array:
    if tokens.recent_start == tokens.sink_count:
        return exact[:, :, : tokens.exact_count]
    return mx.concatenate(tokens.split(exact), axis=2)


def inner_product(
    queries: mx.array, packed: QuantizedVectors, quantizer: TurboQuantizer
) -> mx.array:
    """Compute :meth:`.TurboQuantizer.inner_product` without unpacking the vectors to memory.

    Queries are (..., q, dim), packed vectors (..., n) with the same leading axes, products float32
    (..., q, n).

    Raises:
        ValueError: leading axes that differ.
    """
    if queries.shape[:-2] != packed.scales.shape[:-1]:
        raise ValueError(
            f"Queries of shape {queries.shape} and packed vectors of shape {packed.scales.shape} "
            "have different leading axes: use the same."
        )
    fits = quantizer.basis is None and not quantizer.is_trellis
    kernel = runtime.checked(InnerProduct, quantizer) if fits else None
    if kernel is None:
        return quantizer.inner_product(queries, packed)
    return kernel(queries, packed)


class Quantize:
    """``quantize.metal`` for vectors of these dtypes; a single side is quantized twice."""

    name = "quantize"

    def __init__(self, dtypes: tuple[mx.Dtype, ...], quantizers: tuple[TurboQuantizer, ...]):
        self._dtypes = dtypes
        self._quantizers = quantizers
        given = [x if q.basis is None else mx.float32 for x, q in zip(dtypes, quantizers)]
        lanes = [_vector_lanes(each) for each in _both(quantizers)]
        floats = max(LANES // own * q.dim for own, q in zip(lanes, _both(quantizers)))
        starts = max((-(-q.dim // EIGHT) * EIGHT for q in quantizers if q.is_trellis), default=0)
        room = THREADGROUP_BYTES - _CELLS
        self._groups = min(SIMDS, room // (4 * floats + 33 * starts))
        constants = {"GROUPS": self._groups, **_constants(given, quantizers)}
        constants["VECTOR_LANES"], constants["VALUE_VECTOR_LANES"] = lanes
        weighted = [q.basis is not None for q in _both(quantizers)]
        constants["KEY_WEIGHTED"], constants["VALUE_WEIGHTED"] = map(int, weighted)
        gains = [q.gains.size for q in _both(quantizers)]
        constants["KEY_GAINS"], constants["VALUE_GAINS"] = gains
        self._most_lanes = max(lanes)
        inputs = [
            name
            for side in ("key", "value")
            for name in (f"{side}s", *(f"{side}_{parameter}" for parameter in _PARAMETERS))
        ]
        outputs = ("key_codes", "key_scales", "value_codes", "value_scales")
        self._launch = runtime.build(
            self.name, (*inputs, "sizes"), outputs, constants, cuda_blocks=3
        )

    def check(self) -> Agreement:
        """Compare squared errors with plain MLX; codes may differ where rounding breaks a tie."""
        vectors = [_example(q, dtype) for q, dtype in zip(self._quantizers, self._dtypes)]
        means = [x[:, :, :1].astype(mx.float32) for x in vectors]
        agreements = []
        outputs = self(vectors, means, self._quantizers)
        for packed, *each in zip(outputs, vectors, means, self._quantizers):
            x, mean, quantizer = each
            x = x.astype(mx.float32) - mean
            error, expected = (
                ((quantizer.dequantize(p) - x) ** 2).mean().item()
                for p in (packed, reference.quantize(*each))
            )
            agreements.append(Agreement(abs(error / expected - 1), 0.02))
        return runtime.worst(agreements)

    def __call__(
        self,
        vectors: Sequence[mx.array],
        means: Sequence[mx.array],
        quantizers: Sequence[TurboQuantizer],
    ) -> list[QuantizedVectors]:
        """Return codes, uint32 (B, H, n, words), and scales, bfloat16 (B, H, n), of each side."""
        batch, heads, count, _ = vectors[0].shape
        inputs, shapes = [], []
        own = zip(_both(vectors), _both(means), (each.basis for each in _both(quantizers)))
        for (x, mean, basis), quantizer in zip(own, _both(self._quantizers)):
            if basis is not None:
                x, mean = basis.apply(x.astype(mx.float32) - mean), mx.zeros_like(mean)
            inputs += [
                x,
                mean,
                arguments.cells(quantizer),
                quantizer.gains,
                quantizer.rotation.signs,
                quantizer.rotation.matrix,
                arguments.weights(basis),
            ]
            words = words_per_vector(quantizer.dim, quantizer.pattern)
            shapes += [(batch, heads, count, words), (batch, heads, count)]
        threads = LANES * self._groups
        threadgroups = -(-batch * heads * count * self._most_lanes // threads)
        outputs = self._launch(
            inputs=[*inputs, arguments.sizes(batch * heads, count, heads)],
            grid=(threadgroups * threads, 2, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=shapes,
            output_dtypes=[mx.uint32, mx.bfloat16] * 2,
        )
        packed = [QuantizedVectors(*outputs[:2]), QuantizedVectors(*outputs[2:])]
        return packed[: len(vectors)]


class Dequantize:
    """``dequantize.metal`` for tokens whose exact keys and values have these dtypes."""

    name = "dequantize"

    def __init__(self, dtypes: tuple[mx.Dtype, ...], quantizers: tuple[TurboQuantizer, ...]):
        self._dtypes = dtypes
        self._quantizers = quantizers
        longest = max(quantizer.dim for quantizer in quantizers)
        self._groups = min(4, THREADGROUP_BYTES // (4 * longest))
        constants = {"SIDES": len(quantizers), "GROUPS": self._groups}
        constants |= _constants(dtypes, quantizers)
        inputs = [
            name
            for side in ("key", "value")
            for name in (*(f"{side}_{part}" for part in _RESTORED), f"exact_{side}s")
        ]
        self._launch = runtime.build(self.name, (*inputs, "sizes"), ("keys", "values"), constants)

    def check(self) -> Agreement:
        """Compare dense keys and values of 90 tokens with plain MLX."""
        tokens = reference.example_tokens(self._dtypes, self._quantizers, mean=2.0)
        pairs = zip(self(tokens), reference.dense(tokens))
        return runtime.worst(
            [runtime.compare(*pair, dtype) for pair, dtype in zip(pairs, self._dtypes)]
        )

    def __call__(self, tokens: VisibleTokens) -> list[mx.array]:
        """Return dense keys and values, or latent vectors: (B, H, count, dim) each."""
        inputs, shapes = [], []
        for (packed, exact), quantizer in zip(_both(tokens.sides), _both(self._quantizers)):
            constants = arguments.levels_and_rotation(quantizer)
            inputs += [packed.codes, packed.scales, packed.mean, constants, exact]
            batch, heads, _, dim = exact.shape
            shapes.append((batch, heads, tokens.count, dim))
        sides = len(tokens.sides)
        runs = math.prod(shapes[0][:2]) * -(-tokens.count // _RESTORED_TOKENS)
        sizes = arguments.sizes(
            tokens.sink_count, tokens.packed_count, tokens.recent_start, tokens.count
        )
        outputs = self._launch(
            inputs=[*inputs, sizes],
            grid=(-(-runs // self._groups) * LANES * self._groups, sides, 1),
            threadgroup=(LANES * self._groups, 1, 1),
            output_shapes=shapes if sides == 2 else [shapes[0], (1,)],
            output_dtypes=_both(self._dtypes),
        )
        return [_in_place(*each, tokens) for each in zip(outputs, tokens.sides)]


def _in_place(
    restored: mx.array, side: tuple[PackedSide, mx.array], tokens: VisibleTokens
) -> mx.array:
    """All tokens of a side; those that were packed are still in the coordinates of a basis."""
    packed, exact = side
    if packed.quantizer.basis is None:
        return restored
    sinks, recent = tokens.split(exact)
    inverse = packed.quantizer.basis.inverse.astype(exact.dtype)
    vectors = _moved(restored @ inverse, packed.mean)
    # In place: only exact tokens are written again.
    vectors[:, :, : tokens.sink_count] = sinks
    vectors[:, :, tokens.count - recent.shape[2] :] = recent
    return vectors


@partial(mx.compile, shapeless=True)
def _moved(x: mx.array, mean: mx.array) -> mx.array:
    return (x + mean).astype(x.dtype)


class InnerProduct:
    """``inner_product.metal`` for vectors of one quantizer."""

    name = "inner_product"

    def __init__(self, quantizer: TurboQuantizer):
        self._quantizer = quantizer
        self._queries = max(1, min(8, THREADGROUP_BYTES // (4 * quantizer.dim)))
        constants: dict[str, Constant] = {
            "DIM": quantizer.dim,
            "BITS": quantizer.bits,
            "QUERIES": self._queries,
            "SIMDS": SIMDS,
        }
        inputs = ("queries", "codes", "scales", "levels", "sizes")
        self._launch = runtime.build(self.name, inputs, ("out",), constants)

    def check(self) -> Agreement:
        """Compare the products of five queries with plain MLX."""
        x = _example(self._quantizer, mx.float32)
        packed, queries = self._quantizer.quantize(x), x[:, :, :5]
        expected = self._quantizer.inner_product(queries, packed)
        return runtime.compare(self(queries, packed), expected, mx.float32)

    def __call__(self, queries: mx.array, packed: QuantizedVectors) -> mx.array:
        """Return products, float32 (..., q, n), of queries (..., q, dim) with vectors (..., n)."""
        *leading, query_count, _ = queries.shape
        count = packed.scales.shape[-1]
        threads = LANES * SIMDS
        threadgroups = -(-count // threads)
        rows, tiles = packed.scales.size // count, -(-query_count // self._queries)
        return self._launch(
            inputs=[
                self._quantizer.rotation.apply_to_queries(queries),
                packed.codes,
                packed.scales,
                arguments.levels(self._quantizer),
                arguments.sizes(query_count, count),
            ],
            grid=(threadgroups * threads, rows, tiles),
            threadgroup=(threads, 1, 1),
            output_shapes=[(*leading, query_count, count)],
            output_dtypes=[mx.float32],
        )[0]


def _vector_lanes(quantizer: TurboQuantizer) -> int:
    """Lanes that share a vector in quantize.metal."""
    if quantizer.is_trellis or quantizer.dim > 256:
        return LANES
    return 16 if quantizer.dim > 128 else 8


def _both(sides: Sequence) -> Sequence:
    """Return two sides: kernels always take two, so a single one is passed twice."""
    return sides if len(sides) == 2 else (sides[0], sides[0])


def _constants(
    dtypes: Sequence[mx.Dtype], quantizers: Sequence[TurboQuantizer]
) -> dict[str, Constant]:
    """The constants of keys and values in quantize.metal and dequantize.metal."""
    constants: dict[str, Constant] = {}
    for name, dtype, quantizer in zip(("", "VALUE_"), _both(dtypes), _both(quantizers)):
        order, power = quantizer.rotation.factors
        constants |= {f"{name}T": dtype, f"{name}DIM": quantizer.dim, f"{name}ORDER": order}
        constants |= {
            f"{name}POWER": power,
            f"{name or 'KEY_'}PATTERN": arguments.pattern(quantizer),
        }
    return constants


def _example(quantizer: TurboQuantizer, dtype: mx.Dtype) -> mx.array:
    return reference.normal((1, 2, 3 * BLOCK + 5, quantizer.dim), 0).astype(dtype)
