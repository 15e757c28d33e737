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
_ATTENTION_INPUTS = (
    *("queries", "key_codes", "key_scales", "key_mean", "value_codes", "value_scales"),
    *("exact_keys", "exact_values", "constants", "mask", "sizes"),
)
_COMBINE_INPUTS = ("partial", "mean", "rotation", "sinks", "sizes")
_QUANTIZE_PARAMETERS = ("mean", "levels", "thresholds", "gains", "signs", "matrix")
_QUANTIZE_INPUTS = (
    *("keys", *(f"key_{name}" for name in _QUANTIZE_PARAMETERS)),
    *("values", *(f"value_{name}" for name in _QUANTIZE_PARAMETERS)),
    "sizes",
)
_QUANTIZE_OUTPUTS = ("key_codes", "key_scales", "value_codes", "value_scales")

# Threadgroups of 256 threads that fit the registers of a CUDA multiprocessor: 2 leave a thread 128
# registers, 3 leave it 80, which is enough where nothing spills.
_CUDA_BLOCKS = {"quantize": 3}

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
    ``MLX_TURBOQUANT_BACKEND``, then what the machine has.

    Raises:
        ValueError: the variable names a backend that this machine does not have.
    """
    if _forced:
        return _forced[0]
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
    """Vectors to quantize: x (B, H, n, dim), float32 mean (B, H, 1, dim) to subtract, and how.

    The quantizer's scale must be "unbiased".
    """

    x: mx.array
    mean: mx.array
    quantizer: TurboQuantizer


def quantize(*blocks: Block) -> list[QuantizedVectors]:
    """Pack one block, or keys and values of the same tokens in one launch.

    Codes are (B, H, n, words), scales bfloat16 (B, H, n).
    """
    quantizers = [block.quantizer for block in blocks]
    if supports("quantize", max(q.dim for q in quantizers), _MAX_QUANTIZE_DIM):
        if agrees(check_quantize, blocks[0].x.dtype, *quantizers):
            return _launch_quantize(*blocks)
    return [_reference_quantize(*block) for block in blocks]


def dequantize(
    codes: mx.array,
    scales: mx.array,
    mean: mx.array,
    count: int,
    quantizer: TurboQuantizer,
    interleaved: bool,
    dtype: mx.Dtype,
) -> mx.array:
    """The first ``count`` tokens (B, H, count, dim) of whole buffers as in :mod:`.storage`.

    Raises:
        ValueError: more tokens than the buffers hold.
    """
    if count > scales.shape[-1]:
        raise ValueError(f"{count} tokens are not in a buffer of {scales.shape[-1]}: use fewer.")
    arguments = (codes, scales, mean, count, quantizer, interleaved, dtype)
    if agrees(check_dequantize, quantizer, interleaved, dtype):
        return _launch_dequantize(*arguments)
    return _reference_dequantize(*arguments)


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


def _reference_quantize(x, mean, quantizer) -> QuantizedVectors:
    packed = quantizer.quantize(x.astype(mx.float32) - mean)
    return QuantizedVectors(packed.codes, packed.scales.astype(mx.bfloat16))


def _reference_dequantize(codes, scales, mean, count, quantizer, interleaved, dtype) -> mx.array:
    packed = token_major(codes, scales, count, interleaved)
    return (quantizer.dequantize(packed) + mean).astype(dtype)


def _launch_quantize(*blocks: Block) -> list[QuantizedVectors]:
    *heads, count, dim = blocks[0].x.shape
    inputs, template, shapes, dtypes, threadgroups = [], [], [], [], []
    # A single block is quantized as keys and again as values: the decode path has both.
    for name, block in zip(("", "VALUE_"), (*blocks, blocks[0])):
        quantizer, dim = block.quantizer, block.x.shape[-1]
        levels, signs, gains = _constants(quantizer)
        order, power = _rotation_order(quantizer)
        lanes = 32 if dim > 256 else 16 if dim > 128 else 8
        inputs += [block.x, block.mean, levels, quantizer.thresholds, gains, signs]
        inputs += [quantizer.rotation.matrix]
        template += [(f"{name}DIM", dim), (f"{name}ORDER", order), (f"{name}POWER", power)]
        template += [(f"{name or 'KEY_'}BITS", quantizer.bits)]
        template += [(f"{name or 'KEY_'}GAINS", gains.size), (f"{name}LANES", lanes)]
        shapes += [(*heads, count, words_per_vector(dim, quantizer.bits)), (*heads, count)]
        dtypes += [mx.uint32, mx.bfloat16]
        threadgroups.append(-(-block.x.size // dim * lanes // (32 * _SIMDS)))
    outputs = _kernel("quantize", _QUANTIZE_INPUTS, _QUANTIZE_OUTPUTS)(
        inputs=[*inputs, _sizes(math.prod(heads), count)],
        template=[*template, ("GROUPS", _SIMDS)],
        grid=(max(threadgroups) * 32 * _SIMDS, 2, 1),
        threadgroup=(32 * _SIMDS, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )
    packed = [QuantizedVectors(*outputs[:2]), QuantizedVectors(*outputs[2:])]
    return packed[: len(blocks)]


def _launch_dequantize(codes, scales, mean, count, quantizer, interleaved, dtype) -> mx.array:
    *heads, capacity = scales.shape
    groups = _groups(quantizer.dim)
    rows = scales.size // capacity
    kernel = _kernel(
        "dequantize",
        ("codes", "scales", "mean", "levels", "signs", "matrix", "sizes"),
        ("out",),
    )
    levels, signs, _ = _constants(quantizer)
    return kernel(
        inputs=[
            codes,
            scales.reshape(rows, capacity),
            mean,
            levels,
            signs,
            quantizer.rotation.matrix,
            _sizes(count, capacity),
        ],
        template=[("T", dtype), ("INTERLEAVED", interleaved), *_template(quantizer, groups)],
        output_shapes=[(*heads, count, quantizer.dim)],
        output_dtypes=[dtype],
        **_grid(rows * count, groups),
    )[0]


def _launch_inner_product(queries, packed, quantizer) -> mx.array:
    *leading, query_count, dim = queries.shape
    count = packed.scales.shape[-1]
    rows = packed.scales.size // count
    tile = max(1, min(8, _THREADGROUP_BYTES // (4 * dim)))
    levels, _, _ = _constants(quantizer)
    kernel = _kernel("inner_product", ("queries", "codes", "scales", "levels", "sizes"), ("out",))
    return kernel(
        inputs=[
            *(quantizer.rotation.apply(queries), packed.codes, packed.scales, levels),
            _sizes(query_count, count),
        ],
        template=[("DIM", dim), ("BITS", quantizer.bits), ("QUERIES", tile), ("SIMDS", _SIMDS)],
        grid=(-(-count // (32 * _SIMDS)) * 32 * _SIMDS, rows, -(-query_count // tile)),
        threadgroup=(32 * _SIMDS, 1, 1),
        output_shapes=[(*leading, query_count, count)],
        output_dtypes=[mx.float32],
    )[0]


def launch_decode_attention(queries, tokens, scale, mask, sinks) -> mx.array:
    """Two launches for :func:`.attention.decode_attention`, with its arguments."""
    batch, query_heads, rows, dim = queries.shape
    keys, values = tokens.keys, tokens.values
    heads, value_dim = tokens.exact_keys.shape[1], tokens.exact_values.shape[-1]
    group_rows = query_heads // heads * rows
    kind = MASK_KINDS.index(mask_kind(mask))
    mask, mask_strides = _mask_arguments(mask, (batch, query_heads, rows, tokens.count))
    constants = _attention_constants(keys.quantizer, values.quantizer, scale)
    order, power = _rotation_order(keys.quantizer)
    tile = _rows_per_threadgroup(group_rows, max(dim, value_dim))
    tiles = -(-group_rows // tile)
    packed_splits, exact_splits = _splits(keys.count, tokens.exact_count, batch * heads * tiles)
    splits = packed_splits + exact_splits
    threads = 32 * _SIMDS
    count = batch * query_heads * rows
    sinks_and_packed = tokens.sink_count + keys.count
    sizes = (
        *(tokens.exact_count, splits, packed_splits, tokens.sink_count),
        *(sinks_and_packed - tokens.recent_start, *mask_strides),
        *itertools.chain(*tokens.extents),
    )
    (partial,) = _kernel("decode_attention", _ATTENTION_INPUTS, ("partial",))(
        inputs=[
            *(queries, keys.codes, keys.scales, keys.mean, values.codes, values.scales),
            *(tokens.exact_keys, tokens.exact_values, constants),
            *(constants if mask is None else mask, _sizes(*sizes)),
        ],
        template=[
            *(("DIM", dim), ("VALUE_DIM", value_dim), ("ORDER", order), ("POWER", power)),
            *(("KEY_BITS", keys.bits), ("VALUE_BITS", values.bits)),
            ("VALUE_STRIDE", BLOCK if values.interleaved else 1),
            *(("ROWS", tile), ("SIMDS", _SIMDS), ("MASK", kind)),
        ],
        grid=(batch * heads * threads, splits, tiles),
        threadgroup=(threads, 1, 1),
        output_shapes=[(count, splits, value_dim + 2)],
        output_dtypes=[mx.float32],
    )
    order, power = _rotation_order(values.quantizer)
    simds = min(8, _THREADGROUP_BYTES // (16 * value_dim))
    return _kernel("combine", _COMBINE_INPUTS, ("out",))(
        inputs=[
            *(partial, values.mean, _rotation_constants(values.quantizer)),
            values.mean if sinks is None else sinks.astype(mx.float32),
            _sizes(packed_splits, group_rows, rows, query_heads),
        ],
        template=[
            *(("T", queries.dtype), ("SINKS", sinks is not None), ("DIM", value_dim)),
            *(("ORDER", order), ("POWER", power), ("SIMDS", simds)),
        ],
        grid=(count * 32 * simds, 1, 1),
        threadgroup=(32 * simds, 1, 1),
        output_shapes=[(batch, query_heads, rows, value_dim)],
        output_dtypes=[queries.dtype],
    )[0]


def _splits(packed_count: int, exact_count: int, heads: int) -> tuple[int, int]:
    """Threadgroups of a head for its packed tokens, enough to fill a GPU, and for its exact ones.

    The former all take the same number of steps; the latter few enough to run beside them.
    """
    blocks = -(-packed_count // (_PACKED_TOKENS * _SIMDS))
    steps = max(1, -(-blocks // max(1, 512 // heads)))
    packed = max(1, -(-blocks // steps))
    return packed, -(-exact_count // (2 * steps * _EXACT_TOKENS * _SIMDS))


def _rows_per_threadgroup(group_rows: int, dim: int) -> int:
    """A power of two of query rows whose outputs fit in the registers: at most 32 floats a lane.

    With that, queries and outputs fit in the threadgroup memory as well.
    """
    most = 1 << (min(4, 1024 // dim).bit_length() - 1)
    return min(most, 1 << (group_rows - 1).bit_length())


def mask_kind(mask: None | str | mx.array) -> str:
    """One of ``MASK_KINDS``, whose order is that of MASK in decode_attention.metal."""
    if mask is None or isinstance(mask, str):
        return mask or "none"
    return "boolean" if mask.dtype == mx.bool_ else "additive"


def _mask_arguments(mask, shape) -> tuple[mx.array | None, tuple[int, int, int]]:
    """The mask of decode_attention.metal, and its strides of sequence, query head and row."""
    if mask is None or isinstance(mask, str):
        return None, (0, 0, 0)
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


def _template(quantizer: TurboQuantizer, groups: int) -> list[tuple[str, int]]:
    order, power = _rotation_order(quantizer)
    constants = {"DIM": quantizer.dim, "BITS": quantizer.bits, "ORDER": order, "POWER": power}
    return [*constants.items(), ("GROUPS", groups)]


def _groups(dim: int) -> int:
    """SIMD groups, of one vector each, in a threadgroup: as many as its memory holds, at most 4."""
    return min(4, _THREADGROUP_BYTES // (4 * dim))


def _grid(vectors: int, groups: int) -> dict[str, tuple[int, int, int]]:
    threads = 32 * groups
    return {"grid": (-(-vectors // groups) * threads, 1, 1), "threadgroup": (threads, 1, 1)}


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
    """For ``level_pair`` of codec.h: two coefficients, an offset, a power of two, the unit."""
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
def _attention_constants(keys: TurboQuantizer, values: TurboQuantizer, scale: float) -> mx.array:
    """All that a layer's attention needs and no token changes, in one array."""
    levels = [_constants(quantizer)[0] for quantizer in (keys, values)]
    factor = mx.full((8,), scale, mx.float32)
    return constant(mx.concatenate([factor, *levels, _rotation_constants(keys)]))


def _file(name: str) -> Path:
    return Path(str(files(f"{__package__}.metal").joinpath(name)))


def _kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]):
    """The kernel of metal/NAME.metal, callable as ``mx.fast.metal_kernel`` describes."""
    return _built_kernel(backend(), name, inputs, outputs)


@cache
def _built_kernel(target: str, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]):
    names = {"input_names": list(inputs), "output_names": list(outputs)}
    file = _file(f"{name}.metal")
    source = file.read_text(encoding="ascii")
    if target == "cuda":
        # MLX handles the text at each launch, .2 microseconds a kilobyte: the compiler gets the
        # files' names, and a comment has the shapes that MLX looks for in the text.
        shapes = " ".join(sorted(set(re.findall(r"\w+_shape\b", source))))
        source = f'TURBOQUANT_USING_DECLARATIONS  // {shapes}\n#include "{file}"\n'
        blocks = _CUDA_BLOCKS.get(name, 2)
        header = f'#define TURBOQUANT_BLOCKS {blocks}\n#include "{_file("metal_on_cuda.h")}"\n'
        return mx.fast.cuda_kernel(f"turboquant_{name}", **names, header=header, source=source)
    header = _file("codec.h").read_text(encoding="ascii")
    return mx.fast.metal_kernel(f"turboquant_{name}", **names, header=header, source=source)


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
    blocks = [Block(*_check_data(quantizer, dtype), quantizer) for quantizer in quantizers]
    worst = 0.0
    for packed, block in zip(_launch_quantize(*blocks), blocks):
        x = block.x.astype(mx.float32) - block.mean
        error, expected = (
            ((block.quantizer.dequantize(p) - x) ** 2).mean().item()
            for p in (packed, _reference_quantize(*block))
        )
        # Not max(): an error that is not a number must stay one.
        worst = mx.maximum(worst, abs(error / expected - 1)).item()
    return Agreement(worst, 0.02)


def check_dequantize(quantizer: TurboQuantizer, interleaved: bool, dtype: mx.Dtype) -> Agreement:
    """Compares the restored vectors."""
    x, mean = _check_data(quantizer, dtype)
    codes, scales = _reference_quantize(x, mean, quantizer)
    count = x.shape[2]
    padding = [(0, 0), (0, 0), (0, -count % BLOCK)]
    codes, scales = mx.pad(codes, [*padding, (0, 0)]), mx.pad(scales, padding)
    if interleaved:
        codes = mx.unflatten(codes, 2, (-1, BLOCK)).swapaxes(-1, -2)
    arguments = (codes, scales, mean, count, quantizer, interleaved, dtype)
    return compare(_launch_dequantize(*arguments), _reference_dequantize(*arguments), dtype)


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
