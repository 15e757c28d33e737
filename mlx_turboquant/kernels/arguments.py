"""Kernel inputs other than tokens: levels, rotations and sizes, as cached arrays."""

import math
from functools import cache, lru_cache

import mlx.core as mx
import numpy as np

from ..codec import trellis
from ..codec.basis import Basis
from ..codec.codebook import POLYNOMIAL_BITS, codebook, level_polynomial
from ..codec.constants import constant
from ..codec.packing import EIGHT, RUN, Bits
from ..codec.quantizer import TurboQuantizer
from ..codec.rotation import gaussian_matrix


def example(quantizer: TurboQuantizer) -> TurboQuantizer:
    """The quantizer with which the kernels for ``quantizer`` are checked.

    Bases of all layers that have the same bits share kernels, which are given coordinates.
    """
    if quantizer.basis is None:
        return quantizer
    codec = "trellis" if quantizer.is_trellis else "scalar"
    return patterned(quantizer.dim, quantizer.bits, quantizer.pattern, codec)


@cache
def patterned(dim: int, bits: int, pattern: Bits, codec: str = "scalar") -> TurboQuantizer:
    """A quantizer whose basis, of two heads, has this pattern of bits."""
    deviations = 2.0 ** np.array(pattern if isinstance(pattern, tuple) else (0,) * 4)
    weights = np.tile(np.repeat(deviations**2 / (deviations**2).mean(), EIGHT), (2, 1, dim // RUN))
    axes = np.linalg.qr(gaussian_matrix(dim, dim, 0))[0] / np.sqrt(dim * weights)
    return TurboQuantizer(dim, bits, basis=Basis(*map(_float32, (axes, weights))), codec=codec)


def _float32(x: np.ndarray) -> mx.array:
    return mx.array(x.astype(np.float32))


def pattern(quantizer: TurboQuantizer) -> int:
    """The bits of the eights of a run as digits, those of the first eight last; see layout.h.

    Those of a trellis code have digits from 9 on.
    """
    more = 8 if quantizer.is_trellis else 0
    return sum((bits and bits + more) << 4 * i for i, bits in enumerate(eights(quantizer)))


def eights(quantizer: TurboQuantizer) -> tuple[int, ...]:
    """The bits of the four eights of a run."""
    bits = quantizer.pattern
    return (bits,) * 4 if isinstance(bits, int) else bits


@cache
def levels(quantizer: TurboQuantizer) -> mx.array:
    """Return the float32 input of ``levels.h``: a table of levels, or polynomial coefficients.

    All bits of a pattern have theirs once, in the order of the eights.
    """
    found = [bits for bits in dict.fromkeys(eights(quantizer)) if bits]
    if quantizer.is_trellis:
        return constant(mx.concatenate([trellis.table(bits) for bits in found]))
    return constant(mx.concatenate([_levels(quantizer.dim, bits) for bits in found]))


@cache
def cells(quantizer: TurboQuantizer) -> mx.array:
    """The positive levels with the threshold above each: float32 (n, 2), thresholds first.

    All bits of a pattern have theirs once, in the order of the eights. A trellis code has its
    :func:`levels` in their place.
    """
    if quantizer.is_trellis:
        return levels(quantizer)
    found = []
    for bits in dict.fromkeys(eights(quantizer)):
        if bits:
            book = codebook(quantizer.dim, bits)
            limits = np.append(book.thresholds[2 ** (bits - 1) :], np.inf)
            found.append(np.stack([limits, book.levels[2 ** (bits - 1) :]], 1))
    return constant(np.concatenate(found).astype(np.float32))


def weights(basis: Basis | None) -> mx.array:
    """The weights of the eights of a run for each head: float32 (H, 4), ones without a basis."""
    return _ones() if basis is None else mx.contiguous(basis.weights[:, 0, :RUN:EIGHT])


@cache
def _ones() -> mx.array:
    return constant(mx.ones((1, 4)))


def _levels(dim: int, bits: int) -> mx.array:
    if bits > POLYNOMIAL_BITS:
        return mx.array(codebook(dim, bits).levels.astype(np.float32))
    polynomial = level_polynomial(dim, bits)
    return mx.array((*polynomial, *_half_coefficients(polynomial, bits)))


def _half_coefficients(polynomial: tuple[float, float, float], bits: int) -> tuple[float, ...]:
    """Return the input of ``level_pair``: two coefficients, an offset, a power of two, a unit."""
    power = 2.0**bits
    first, second, fifth = (x * power**n for x, n in zip(polynomial, (1, 3, 5)))
    base, unit = 128 / power, 1.0
    if bits > 2:
        # Complete the square: a + b s + c s^2 = c ((s + q)^2 + p).
        unit, q = fifth, second / (2 * fifth)
        first, second = q, first / unit - q * q
    return first, second, 1 / power - 1 - base, base, unit


@cache
def rotation(quantizer: TurboQuantizer) -> mx.array:
    """Signs and matrix of the rotation in one array, see ``rotation.h``: float32."""
    parts = quantizer.rotation
    return constant(mx.concatenate([parts.signs, parts.matrix.flatten()]))


@cache
def levels_and_rotation(quantizer: TurboQuantizer) -> mx.array:
    """The constants of ``dequantize.metal`` for keys or values: float32."""
    return constant(mx.concatenate([levels(quantizer), rotation(quantizer)]))


@cache
def attention(keys: TurboQuantizer, values: TurboQuantizer, scale: float) -> mx.array:
    """The ``constants`` of ``decode_attention.metal``, which no token changes: float32."""
    factor = mx.full((8,), scale, mx.float32)
    return constant(mx.concatenate([factor, levels(keys), levels(values), rotation(keys)]))


@lru_cache(maxsize=64)
def sizes(*numbers: int) -> mx.array:
    """Return an int32 array that all layers of a step share, because each new one costs the host.

    It is padded to eight numbers. MLX keeps arrays of up to 8 bytes in pages that CPU and GPU
    share, and a kernel that reads one may wait for a page to move.
    """
    padding = (0,) * (8 - len(numbers))
    return constant((*numbers, *padding))


def mask_and_strides(
    mask: mx.array, shape: tuple[int, ...]
) -> tuple[mx.array, tuple[int, int, int]]:
    """The mask of decode_attention.metal, and its strides by sequence, query head and row."""
    mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    if any(size not in (1, full) for size, full in zip(mask.shape, shape)):
        raise ValueError(f"A mask of shape {mask.shape} does not fit scores of shape {shape}.")
    mask = mx.broadcast_to(mask, (*mask.shape[:3], shape[3]))
    sizes = mask.shape
    strides = tuple(math.prod(sizes[i + 1 :]) if sizes[i] > 1 else 0 for i in range(3))
    if mask.dtype != mx.bool_:
        mask = mask.astype(mx.float32)
    return mask, strides
