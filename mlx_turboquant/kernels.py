"""Loads the kernels of ``metal/`` and launches them, or computes the same in plain MLX.

The same text runs on Metal and, behind ``metal_on_cuda.h``, on CUDA. Every configuration of a
kernel is compared with plain MLX on small data before its first use; one that does not compile
or disagrees is replaced for the rest of the process, with a warning.
"""

import itertools
import logging
import math
import os
import re
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from .codebook import POLYNOMIAL_BITS, level_polynomial
from .constants import constant
from .packing import words_per_vector
from .quantizer import QuantizedVectors, TurboQuantizer

# Keys are interleaved in blocks of this many tokens, the width of a SIMD group.
BLOCK = 32
MASK_KINDS = ("none", "causal", "boolean", "additive")
BACKEND_VARIABLE = "MLX_TURBOQUANT_BACKEND"
_THREADGROUP_BYTES = 32768
# The kernel keeps the coordinates of a vector in the registers of one SIMD group.
_MAX_QUANTIZE_DIM = 1024

# SIMD groups in a threadgroup of the attention and inner-product kernels.
_SIMDS = 4
# Tokens that a SIMD group of the attention kernel takes in one step.
_PACKED_TOKENS = 64
_EXACT_TOKENS = 8
# Tokens that a SIMD group of dequantize restores.
_RESTORED_TOKENS = 32
_ATTENTION_INPUTS = (
    *("queries", "key_codes", "key_scales", "key_mean", "value_codes", "value_scales"),
    *("exact_keys", "exact_values", "constants", "sizes"),
)
_NEW_TOKEN_INPUTS = ("new_keys", "new_values")
_NEW_TOKEN_OUTPUTS = ("next_keys", "next_values")
_COMBINE_INPUTS = ("partial", "mean", "rotation", "sizes")
_QUANTIZE_PARAMETERS = ("mean", "levels", "thresholds", "gains", "signs", "matrix")
_QUANTIZE_INPUTS = (
    *("keys", *(f"key_{name}" for name in _QUANTIZE_PARAMETERS)),
    *("values", *(f"value_{name}" for name in _QUANTIZE_PARAMETERS)),
    "sizes",
)
_DEQUANTIZE_PARAMETERS = ("codes", "scales", "mean", "constants")
_DEQUANTIZE_INPUTS = (
    *(*(f"key_{name}" for name in _DEQUANTIZE_PARAMETERS), "exact_keys"),
    *(*(f"value_{name}" for name in _DEQUANTIZE_PARAMETERS), "exact_values", "sizes"),
)
_DEQUANTIZE_OUTPUTS = ("keys", "values")
# Headers of the functions that a kernel uses, where it has none of its own name.
_FUNCTIONS = {"combine": "rotation.h", "inner_product": "levels.h"}
_QUANTIZE_OUTPUTS = ("key_codes", "key_scales", "value_codes", "value_scales")

# Threadgroups of 256 threads that fit the registers of a CUDA multiprocessor: 2 leave a thread 128
# registers, 3 leave it 80, which is enough where nothing spills.
_CUDA_BLOCKS = {"quantize": 3}
# Query rows of a threadgroup of the attention kernel, at most, and on CUDA those with many packed
# tokens in all heads. Eight need up to 255 registers, and half as many threadgroups fit a
# multiprocessor; but a code is unpacked once for eight heads, which pays where all have work.
_ROWS, _MANY_ROWS, _MANY_TOKENS = 4, {"cuda": 8}, 96 * 1024

# What a kernel's text calls the types that it is compiled for.
_TYPES = {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.float32: "float"}
Constant = int | mx.Dtype

_log = logging.getLogger("mlx_turboquant")
_forced: list[str] = []


class Agreement(NamedTuple):
    """How far a kernel is from plain MLX on small data, and how far rounding alone may take it."""

    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the kernel may be used; an error that is not a number does not hold."""
        return self.error <= self.allowed


def backend() -> str:
    """Where kernels run: "metal", "cuda", or "reference" for plain MLX operations.

    What :func:`force_backend` was given comes first, then the environment variable
    ``MLX_TURBOQUANT_BACKEND``, which is read once, then what the machine has.

    Raises:
        ValueError: the variable names a backend that this machine does not have.
    """
    return _forced[0] if _forced else _machine_backend()


@cache
def _machine_backend() -> str:
    return _checked_backend(os.environ.get(BACKEND_VARIABLE), BACKEND_VARIABLE)


def force_backend(name: str | None) -> None:
    """Use the backend ``name`` in this process; None goes back to the choice of the machine.

    Raises:
        ValueError: a backend that this machine does not have.
    """
    _forced[:] = [] if name is None else [_checked_backend(name, "backend")]


@cache
def _checked_backend(name: str | None, origin: str) -> str:
    available = ["reference"]
    if mx.default_device().type == mx.DeviceType.gpu:
        available.insert(0, "metal" if mx.metal.is_available() else "cuda")
    if name is not None and name not in available:
        raise ValueError(f"{origin} is {name!r}: use {' or '.join(available)} on this machine.")
    _log.info("Kernels run on: %s", name or available[0])
    return name or available[0]


class Block(NamedTuple):
    """Vectors to quantize: ``count`` tokens of x (B, H, capacity, dim) from ``start`` on.

    The float32 ``mean`` (B, H, 1, dim) is subtracted. The quantizer's scale must be "unbiased".
    """

    x: mx.array
    mean: mx.array
    quantizer: TurboQuantizer
    start: int
    count: int


def quantize(*blocks: Block) -> list[QuantizedVectors]:
    """Pack one block, or keys and values of the same tokens in one launch.

    Codes are (B, H, n, words), scales bfloat16 (B, H, n).
    """
    quantizers = [block.quantizer for block in blocks]
    if supports("quantize", max(q.dim for q in quantizers), _MAX_QUANTIZE_DIM):
        if agrees(check_quantize, blocks[0].x.dtype, *quantizers):
            return _launch_quantize(*blocks)
    return [reference_quantize(*block) for block in blocks]


def inner_product(
    queries: mx.array, packed: QuantizedVectors, quantizer: TurboQuantizer
) -> mx.array:
    """:meth:`.TurboQuantizer.inner_product` without unpacking the vectors to memory.

    Queries are (..., q, dim), packed vectors (..., n) with the same leading axes: float32
    (..., q, n).

    Raises:
        ValueError: leading axes that differ.
    """
    if queries.shape[:-2] != packed.scales.shape[:-1]:
        raise ValueError(
            f"Queries of shape {queries.shape} and packed vectors of shape {packed.scales.shape} "
            "have different leading axes: use the same."
        )
    if agrees(check_inner_product, quantizer):
        return _launch_inner_product(queries, packed, quantizer)
    return quantizer.inner_product(queries, packed)


def token_major(
    codes: mx.array, scales: mx.array, count: int, interleaved: bool
) -> QuantizedVectors:
    """The first ``count`` tokens of whole buffers, (B, H, count, words) and (B, H, count)."""
    if interleaved:
        codes = codes[:, :, : -(-count // BLOCK)].swapaxes(-1, -2).flatten(2, 3)
    return QuantizedVectors(codes[:, :, :count], scales[..., :count])


def reference_quantize(x, mean, quantizer, start, count) -> QuantizedVectors:
    """:func:`quantize` in plain MLX, for the fields of one block."""
    packed = quantizer.quantize(x[:, :, start : start + count].astype(mx.float32) - mean)
    return QuantizedVectors(packed.codes, packed.scales.astype(mx.bfloat16))


def _launch_quantize(*blocks: Block) -> list[QuantizedVectors]:
    # A single block is quantized as keys and again as values: the decode path has both.
    both = (*blocks, blocks[0])[:2]
    batch, heads, _, _ = blocks[0].x.shape
    kinds = tuple((block.x.dtype, block.quantizer) for block in both)
    kernel, constants, lanes = _quantize_plan(backend(), *kinds)
    rows, count, start = batch * heads, blocks[0].count, blocks[0].start
    inputs, shapes = [], []
    for block, own in zip(both, constants):
        inputs += [block.x, block.mean, *own]
        words = words_per_vector(block.quantizer.dim, block.quantizer.bits)
        shapes += [(batch, heads, count, words), (batch, heads, count)]
    threadgroups = -(-rows * count * lanes // (32 * _SIMDS))
    outputs = kernel(
        inputs=[*inputs, _sizes(rows, count, start)],
        grid=(threadgroups * 32 * _SIMDS, 2, 1),
        threadgroup=(32 * _SIMDS, 1, 1),
        output_shapes=shapes,
        output_dtypes=[mx.uint32, mx.bfloat16] * 2,
    )
    packed = [QuantizedVectors(*outputs[:2]), QuantizedVectors(*outputs[2:])]
    return packed[: len(blocks)]


@cache
def _quantize_plan(target: str, *kinds: tuple[mx.Dtype, TurboQuantizer]) -> tuple[Any, ...]:
    """The kernel, the constant inputs of keys and of values, and the most lanes of a vector."""
    definitions: dict[str, Constant] = {"GROUPS": _SIMDS}
    constants, most_lanes = [], 0
    for name, (dtype, quantizer) in zip(("", "VALUE_"), kinds):
        levels, signs, gains = _constants(quantizer)
        order, power = _rotation_order(quantizer)
        dim = quantizer.dim
        lanes = 32 if dim > 256 else 16 if dim > 128 else 8
        definitions |= {f"{name}T": dtype, f"{name}DIM": dim, f"{name}ORDER": order}
        definitions |= {f"{name}POWER": power, f"{name}LANES": lanes}
        definitions |= {f"{name or 'KEY_'}BITS": quantizer.bits}
        definitions |= {f"{name or 'KEY_'}GAINS": gains.size}
        constants.append((levels, quantizer.thresholds, gains, signs, quantizer.rotation.matrix))
        most_lanes = max(most_lanes, lanes)
    kernel = _kernel("quantize", _QUANTIZE_INPUTS, _QUANTIZE_OUTPUTS, definitions)
    return kernel, constants, most_lanes


def launch_dequantize(tokens) -> list[mx.array]:
    """All tokens of a :class:`.attention.CachedTokens`, (B, H, count, dim): keys and values.

    Where the keys are the values, keys alone.
    """
    stores, exact = [tokens.keys, tokens.values], [tokens.exact_keys, tokens.exact_values]
    kinds = 1 if tokens.values is tokens.keys else 2
    constants: dict[str, Constant] = {"KINDS": kinds}
    inputs, shapes = [], []
    for name, store, x in zip(("", "VALUE_"), stores, exact):
        quantizer, (batch, heads, _, dim) = store.quantizer, x.shape
        order, power = _rotation_order(quantizer)
        constants |= {f"{name}T": x.dtype, f"{name}DIM": dim, f"{name}ORDER": order}
        constants |= {f"{name}POWER": power, f"{name or 'KEY_'}BITS": quantizer.bits}
        inputs += [store.codes, store.scales, store.mean, _restoring_constants(quantizer), x]
        shapes.append((batch, heads, tokens.count, dim))
    groups = min(4, _THREADGROUP_BYTES // (4 * max(shape[3] for shape in shapes)))
    runs = math.prod(shapes[0][:2]) * -(-tokens.count // _RESTORED_TOKENS)
    sizes = (tokens.sink_count, tokens.keys.count, tokens.recent_start, tokens.count)
    kernel = _kernel(
        *("dequantize", _DEQUANTIZE_INPUTS, _DEQUANTIZE_OUTPUTS), {**constants, "GROUPS": groups}
    )
    return kernel(
        inputs=[*inputs, _sizes(*sizes)],
        grid=(-(-runs // groups) * 32 * groups, kinds, 1),
        threadgroup=(32 * groups, 1, 1),
        output_shapes=shapes if kinds == 2 else [shapes[0], (1,)],
        output_dtypes=[x.dtype for x in exact],
    )[:kinds]


def _launch_inner_product(queries, packed, quantizer) -> mx.array:
    *leading, query_count, dim = queries.shape
    count = packed.scales.shape[-1]
    rows = packed.scales.size // count
    tile = max(1, min(8, _THREADGROUP_BYTES // (4 * dim)))
    levels, _, _ = _constants(quantizer)
    names = ("queries", "codes", "scales", "levels", "sizes")
    constants = {"DIM": dim, "BITS": quantizer.bits, "QUERIES": tile, "SIMDS": _SIMDS}
    return _kernel("inner_product", names, ("out",), constants)(
        inputs=[
            *(quantizer.rotation.apply(queries), packed.codes, packed.scales, levels),
            _sizes(query_count, count),
        ],
        grid=(-(-count // (32 * _SIMDS)) * 32 * _SIMDS, rows, -(-query_count // tile)),
        threadgroup=(32 * _SIMDS, 1, 1),
        output_shapes=[(*leading, query_count, count)],
        output_dtypes=[mx.float32],
    )[0]


class AttentionShape(NamedTuple):
    """What the extents of the grids of an attention depend on, besides its arrays.

    ``tiles`` are the query rows of a threadgroup with few and with many packed tokens.
    """

    value_dim: int
    group_rows: int
    tiles: tuple[int, int]
    combine_simds: int


class AttentionPlan(NamedTuple):
    """What the launches of one configuration have in common: the host makes it once.

    ``attend`` are the kernels for few and for many packed tokens, which may be the same.
    """

    attend: tuple[Callable[..., list[mx.array]], ...]
    attend_dtypes: list[mx.Dtype]
    combine: Callable[..., list[mx.array]]
    combine_dtypes: list[mx.Dtype]
    constants: mx.array
    rotation: mx.array
    shape: AttentionShape

    def variants(self) -> "list[AttentionPlan]":
        """Plans that take one of the kernels, however many tokens there are."""
        return [
            self._replace(attend=(kernel, kernel), shape=self.shape._replace(tiles=(tile, tile)))
            for tile, kernel in dict(zip(self.shape.tiles, self.attend)).items()
        ]


class AttentionConfiguration(NamedTuple):
    """All that decides which kernels an attention needs, besides the machine and the scale."""

    keys: TurboQuantizer
    values: TurboQuantizer
    query_dtype: mx.Dtype
    key_dtype: mx.Dtype
    value_dtype: mx.Dtype
    group: int
    rows: int
    mask_kind: str
    sinks: bool
    shared: bool
    new_token: bool


def attention_configuration(queries, tokens, mask, sinks) -> AttentionConfiguration:
    """That of :func:`.attention.decode_attention` with these arguments."""
    _, query_heads, rows, _ = queries.shape
    keys, values, exact_keys = tokens.keys, tokens.values, tokens.exact_keys
    return AttentionConfiguration(
        *(keys.quantizer, values.quantizer, queries.dtype, exact_keys.dtype),
        *(tokens.exact_values.dtype, query_heads // exact_keys.shape[1], rows),
        *(mask_kind(mask), sinks is not None, values is keys, tokens.new is not None),
    )


@cache
def attention_plan(target: str, scale: float, wanted: AttentionConfiguration) -> AttentionPlan:
    """The kernels for a configuration on the backend ``target``."""
    dim, value_dim = wanted.keys.dim, wanted.values.dim
    order, power = _rotation_order(wanted.keys)
    value_order, value_power = _rotation_order(wanted.values)
    group_rows = wanted.group * wanted.rows
    tiles = tuple(
        _rows_per_threadgroup(most, group_rows, max(dim, value_dim))
        for most in (_ROWS, _MANY_ROWS.get(target, _ROWS))
    )
    simds = min(8, _THREADGROUP_BYTES // (16 * value_dim))
    types = {"QUERY_T": wanted.query_dtype, "KEY_T": wanted.key_dtype}
    attend: dict[str, Constant] = {**types, "VALUE_T": wanted.value_dtype}
    attend |= {"DIM": dim, "VALUE_DIM": value_dim, "ORDER": order, "POWER": power}
    attend |= {"KEY_BITS": wanted.keys.bits, "VALUE_BITS": wanted.values.bits}
    attend |= {"VALUE_STRIDE": BLOCK if wanted.shared else 1, "SIMDS": _SIMDS}
    mask = MASK_KINDS.index(wanted.mask_kind)
    attend |= {"MASK": mask, "MASK_ARRAY": mask > 1, "NEW_TOKEN": wanted.new_token}
    inputs, outputs, dtypes = _ATTENTION_INPUTS, ("partial",), [mx.float32]
    if mask > 1:
        inputs = (*inputs, "mask")
    if wanted.new_token:
        inputs, outputs = inputs + _NEW_TOKEN_INPUTS, outputs + _NEW_TOKEN_OUTPUTS
        dtypes += [wanted.key_dtype, wanted.value_dtype]
    combine: dict[str, Constant] = {"T": wanted.query_dtype, "SINKS": wanted.sinks}
    combine |= {"DIM": value_dim, "ORDER": value_order, "POWER": value_power, "SIMDS": simds}
    combine_inputs = (*_COMBINE_INPUTS, "sinks") if wanted.sinks else _COMBINE_INPUTS
    return AttentionPlan(
        tuple(_kernel("decode_attention", inputs, outputs, attend | {"ROWS": n}) for n in tiles),
        dtypes,
        _kernel("combine", combine_inputs, ("out",), combine),
        [wanted.query_dtype],
        _attention_constants(wanted.keys, wanted.values, scale),
        _rotation_constants(wanted.values),
        AttentionShape(value_dim, group_rows, tiles, simds),
    )


def launch_decode_attention(plan: AttentionPlan, queries, tokens, mask, sinks) -> mx.array:
    """Two launches for :func:`.attention.decode_attention`, with its arguments.

    A new token of ``tokens`` is stored in their exact buffers.
    """
    keys, values = tokens.keys, tokens.values
    exact, new = (tokens.exact_keys, tokens.exact_values), tokens.new or ()
    masks, strides = (), ()
    if isinstance(mask, mx.array):
        batch, query_heads, rows, _ = queries.shape
        mask, strides = _mask_arguments(mask, (batch, query_heads, rows, tokens.count))
        masks = (mask,)
    many, sizes, attend, combine_sizes, combine = _attention_launches(
        *(plan.shape, queries.shape, exact[0].shape, exact[1].shape if new else None, strides),
        *(keys.count, tokens.exact_count, tokens.sink_count, tokens.recent_start, tokens.extents),
    )
    partial, *following = plan.attend[many](
        inputs=[
            *(queries, keys.codes, keys.scales, keys.mean, values.codes, values.scales),
            *(*exact, plan.constants, sizes, *masks, *new),
        ],
        output_dtypes=plan.attend_dtypes,
        **attend,
    )
    if new:
        tokens.store(following)
    logits = () if sinks is None else (sinks.astype(mx.float32),)
    return plan.combine(
        inputs=[partial, values.mean, plan.rotation, combine_sizes, *logits],
        output_dtypes=plan.combine_dtypes,
        **combine,
    )[0]


@lru_cache(maxsize=64)
def _attention_launches(
    attention: AttentionShape,
    queries: tuple[int, ...],
    exact_keys: tuple[int, ...],
    exact_values: tuple[int, ...] | None,
    mask_strides: tuple[int, ...],
    packed_count: int,
    exact_count: int,
    sink_count: int,
    recent_start: int,
    extents: tuple[tuple[int, int, int], ...],
) -> tuple[bool, mx.array, dict[str, Any], mx.array, dict[str, Any]]:
    """What all layers of a step have in common, for decode_attention.metal and combine.metal.

    Whether packed tokens are many; then for each kernel the array of sizes, and extents of the grid
    and the shapes of the outputs. With ``exact_values`` a new token is stored.
    """
    batch, query_heads, rows, _ = queries
    count = batch * query_heads * rows
    heads = count // attention.group_rows
    many = heads * packed_count >= _MANY_TOKENS
    tile = attention.tiles[many]
    tiles = -(-attention.group_rows // tile)
    fitting = 2048 // max(tile, _ROWS)  # threadgroups that fill a GPU
    packed_splits, exact_splits = _splits(packed_count, exact_count, fitting // (heads * tiles))
    splits = packed_splits + exact_splits
    sizes = _sizes(
        *(exact_count, splits, packed_splits, sink_count),
        *(sink_count + packed_count - recent_start, *(mask_strides or (0, 0, 0))),
        *itertools.chain(*(extents or [(packed_count, sink_count, recent_start)])),
    )
    shapes = [(count, splits, attention.value_dim + 2)]
    attend = {
        "grid": (heads * 32 * _SIMDS, splits, tiles),
        "threadgroup": (32 * _SIMDS, 1, 1),
        "output_shapes": shapes + [exact_keys, exact_values] if exact_values else shapes,
    }
    threads = 32 * attention.combine_simds
    combine = {
        "grid": (count * threads, 1, 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": [(batch, query_heads, rows, attention.value_dim)],
    }
    combine_sizes = _sizes(packed_splits, attention.group_rows, rows, query_heads)
    return many, sizes, attend, combine_sizes, combine


def _splits(packed_count: int, exact_count: int, most: int) -> tuple[int, int]:
    """Threadgroups of a head for its packed tokens, 1 to ``most``, and for its exact ones.

    The former all take the same number of steps; the latter few enough to run beside them.
    """
    blocks = -(-packed_count // (_PACKED_TOKENS * _SIMDS))
    steps = max(1, -(-blocks // max(1, most)))
    packed = max(1, -(-blocks // steps))
    return packed, -(-exact_count // (2 * steps * _EXACT_TOKENS * _SIMDS))


def _rows_per_threadgroup(most: int, group_rows: int, dim: int) -> int:
    """A power of two of query rows, at most ``most``, whose outputs fit in the registers.

    These are up to 32 floats a lane. Queries and outputs then fit in the threadgroup memory too.
    """
    most = 1 << (min(most, 1024 // dim).bit_length() - 1)
    return min(most, 1 << (group_rows - 1).bit_length())


def mask_kind(mask: None | str | mx.array) -> str:
    """One of ``MASK_KINDS``, whose order is that of MASK in decode_attention.metal."""
    if mask is None or isinstance(mask, str):
        return mask or "none"
    return "boolean" if mask.dtype == mx.bool_ else "additive"


def _mask_arguments(mask: mx.array, shape) -> tuple[mx.array, tuple[int, ...]]:
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


def _rotation_order(quantizer: TurboQuantizer) -> tuple[int, int]:
    return quantizer.rotation.factors or (quantizer.dim, 1)


@cache
def _constants(quantizer: TurboQuantizer) -> tuple[mx.array, mx.array, mx.array]:
    """Levels or their coefficients, signs and gains, as the kernels take them."""
    levels, signs = quantizer.levels, constant(mx.ones(quantizer.dim))
    if quantizer.bits <= POLYNOMIAL_BITS:
        polynomial = level_polynomial(quantizer.dim, quantizer.bits)
        levels = constant((*polynomial, *_half_coefficients(polynomial, quantizer.bits)))
    if quantizer.rotation.factors is not None:
        signs = quantizer.rotation.signs
    return levels, signs, constant(quantizer.gains)


def _half_coefficients(polynomial: tuple[float, float, float], bits: int) -> tuple[float, ...]:
    """For ``level_pair`` of levels.h: two coefficients, an offset, a power of two, the unit."""
    power = 2.0**bits
    first, second, fifth = (x * power**n for x, n in zip(polynomial, (1, 3, 5)))
    base, unit = 128 / power, 1.0
    if bits > 2:
        # The square is completed: a + b s + c s^2 = c ((s + q)^2 + p).
        unit, q = fifth, second / (2 * fifth)
        first, second = q, first / unit - q * q
    return first, second, 1 / power - 1 - base, base, unit


@lru_cache(maxsize=64)
def _sizes(*sizes: int) -> mx.array:
    """One array for all layers of a step, because the host pays for each new one.

    At least eight numbers: MLX keeps arrays of up to 8 bytes in pages that CPU and GPU share, and a
    kernel that reads one may wait for a page to move.
    """
    padding = (0,) * (8 - len(sizes))
    return constant((*sizes, *padding))


@cache
def _rotation_constants(quantizer: TurboQuantizer) -> mx.array:
    _, signs, _ = _constants(quantizer)
    return constant(mx.concatenate([signs, quantizer.rotation.matrix.flatten()]))


@cache
def _restoring_constants(quantizer: TurboQuantizer) -> mx.array:
    return constant(mx.concatenate([_constants(quantizer)[0], _rotation_constants(quantizer)]))


@cache
def _attention_constants(keys: TurboQuantizer, values: TurboQuantizer, scale: float) -> mx.array:
    """All that a layer's attention needs and no token changes, in one array."""
    levels = [_constants(quantizer)[0] for quantizer in (keys, values)]
    factor = mx.full((8,), scale, mx.float32)
    return constant(mx.concatenate([factor, *levels, _rotation_constants(keys)]))


def _file(name: str) -> Path:
    return Path(str(files(f"{__package__}.metal").joinpath(name)))


def _kernel(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], constants: dict[str, Constant]
) -> Callable[..., list[mx.array]]:
    """The kernel of metal/NAME.metal with these constants, called as ``mx.fast`` describes."""
    return _built_kernel(backend(), name, inputs, outputs, tuple(constants.items()))


@cache
def _built_kernel(
    target: str,
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    constants: tuple[tuple[str, Constant], ...],
) -> Callable[..., list[mx.array]]:
    # Constants are part of the text: as template arguments they would cost the host time at each
    # launch. All types are among them: MLX tells compiled kernels apart by their names alone.
    definitions = " ".join(_definition(*pair) for pair in constants)
    label = "_".join(_TYPES.get(value, str(value)) for _, value in constants)
    names = {"input_names": list(inputs), "output_names": list(outputs)}
    names |= {"name": f"turboquant_{name}_{label}"}
    file, functions = _file(f"{name}.metal"), _FUNCTIONS.get(name, f"{name}.h")
    body = file.read_text(encoding="ascii")
    if target == "metal" and not _metal_reads_files():
        source = f"{definitions}\n{_without_comments(body)}"
        return mx.fast.metal_kernel(**names, header=_joined(functions, set()), source=source)
    # MLX copies the text at each launch, a microsecond a kilobyte: the compiler gets the files'
    # names, and a comment has what MLX looks for in the text.
    used = " ".join(sorted(set(re.findall(r"\w+_shape\b|thread\w*_in_\w+|simd\w+_in_\w+", body))))
    source = f'{definitions}  // {used}\n#include "{file}"\n'
    if target == "metal":
        return mx.fast.metal_kernel(**names, header=_including(functions), source=source)
    blocks = 1 if ("ROWS", 8) in constants else _CUDA_BLOCKS.get(name, 2)
    header = f"#define TURBOQUANT_BLOCKS {blocks}\n"
    header += f'#define TURBOQUANT_FUNCTIONS "{_file(functions)}"\n{_including("metal_on_cuda.h")}'
    return mx.fast.cuda_kernel(
        **names, header=header, source=f"TURBOQUANT_USING_DECLARATIONS\n{source}"
    )


def _including(name: str) -> str:
    return f'#include "{_file(name)}"\n'


@cache
def _metal_reads_files() -> bool:
    """Whether Metal's compiler takes the name of a file in place of its text: tried once."""
    kernel = mx.fast.metal_kernel(
        name="turboquant_include",
        input_names=["x"],
        output_names=["out"],
        header=_including("levels.h"),
        source="out[0] = x[0] + float(vector_words<128, 4>());",
    )
    try:
        (out,) = kernel(
            inputs=[mx.ones(1)],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
        )
        return out.item() == 17
    except RuntimeError:
        return False


def _definition(name: str, value: Constant) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {_TYPES[value]};"
    if isinstance(value, bool):  # which decides whether arguments exist
        return f"\n#define {name} {int(value)}\n"
    return f"constexpr int {name} = {value};"


def _joined(name: str, seen: set[str]) -> str:
    """The text of a header, with those that it includes in their places, each once."""
    if name in seen:
        return ""
    seen.add(name)
    text = _file(name).read_text(encoding="ascii").replace("#pragma once\n", "")
    text = re.sub(r'#include "(.*)"', lambda match: _joined(match[1], seen), text)
    return _without_comments(text)


def _without_comments(text: str) -> str:
    return re.sub(r"\n\s*", "\n", re.sub(r"//.*", "", text))


@cache
def supports(kernel: str, dim: int, most: int) -> bool:
    """Whether a kernel takes vectors of ``dim`` values; if not, the log says so once."""
    if dim > most:
        _log.warning(
            "Kernel %s takes up to %d values a vector: plain MLX is used for %d.", kernel, most, dim
        )
    return dim <= most


def agrees(check: Callable[..., Agreement], *configuration: Any) -> bool:
    """Whether a kernel may be used: there is a backend, and ``check`` finds it right.

    ``check(*configuration)`` compares the kernel with plain MLX. A failure to compile counts as
    wrong. The answer, and the warning if it is no, hold for the process.
    """
    target = backend()
    return target != "reference" and _agrees(target, check, *configuration)


@cache
def _agrees(target: str, check: Callable[..., Agreement], *configuration: Any) -> bool:
    try:
        agreement = check(*configuration)
        wrong = f"relative error {agreement.error:.1e}, allowed {agreement.allowed:.1e}"
        if agreement.holds:
            return True
    except (RuntimeError, ValueError) as error:
        wrong = f"{type(error).__name__}: {error}"
    kernel = check.__name__.removeprefix("check_")
    device = mx.device_info().get("device_name", target)
    _log.warning("Kernel %s is replaced by plain MLX on %s: %s", kernel, device, wrong)
    return False


def check_quantize(dtype: mx.Dtype, *quantizers: TurboQuantizer) -> Agreement:
    """Compares squared errors: codes may differ where values or gains tie within rounding."""
    start, count = 3, 3 * BLOCK
    blocks = [Block(*_check_data(q, dtype), q, start, count) for q in quantizers]
    worst = 0.0
    for packed, block in zip(_launch_quantize(*blocks), blocks):
        x = block.x[:, :, start : start + count].astype(mx.float32) - block.mean
        error, expected = (
            ((block.quantizer.dequantize(p) - x) ** 2).mean().item()
            for p in (packed, reference_quantize(*block))
        )
        # Not max(): an error that is not a number must stay one.
        worst = mx.maximum(worst, abs(error / expected - 1)).item()
    return Agreement(worst, 0.02)


def check_inner_product(quantizer: TurboQuantizer) -> Agreement:
    """Compares the products of five queries."""
    x, _ = _check_data(quantizer, mx.float32)
    packed, queries = quantizer.quantize(x), x[:, :, :5]
    expected = quantizer.inner_product(queries, packed)
    return compare(_launch_inner_product(queries, packed, quantizer), expected, mx.float32)


def compare(
    output: mx.array, expected: mx.array, dtype: mx.Dtype, arithmetic: float | None = None
) -> Agreement:
    """Allows two roundings to the output's dtype, and ``arithmetic`` on the way there.

    The default is for float32 sums in another order, in which MLX's own products on CUDA round the
    factors to TF32.
    """
    if arithmetic is None:
        tf32 = backend() == "cuda" and os.environ.get("MLX_ENABLE_TF32") != "0"
        arithmetic = 1e-3 if tf32 else 2e-5
    expected = expected.astype(mx.float32)
    difference = mx.abs(output.astype(mx.float32) - expected).max() / mx.abs(expected).max()
    return Agreement(difference.item(), 2 * mx.finfo(dtype).eps + arithmetic)


def _check_data(quantizer: TurboQuantizer, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    x = mx.random.normal((1, 2, 3 * BLOCK + 5, quantizer.dim), key=mx.random.key(0)).astype(dtype)
    return x, x[:, :, :1].astype(mx.float32)
