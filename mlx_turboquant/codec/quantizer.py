"""The TurboQuant quantizer: a few bits per value, without training or calibration."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from . import packing, trellis
from .basis import Basis
from .codebook import POLYNOMIAL_BITS, codebook, evaluate_polynomial, level_polynomial
from .constants import constant
from .packing import EIGHT, RUN, Bits, byte_order, words_per_vector
from .rotation import Rotation

# Up to this many, comparing with all thresholds is 6 to 16 times faster on a CPU than a search.
_COMPARED_BITS = 4
# Changes whenever the meaning of stored codes changes.
CODEC_VERSION = "2"
SCALES = ("unbiased", "least_squares", "norm", "none")
CODECS = ("scalar", "trellis")
# The 5th to the 95th percentile of the best gain at 2 to 4 bits and 64 to 256 dimensions.
_GAINS = tuple(round(0.75 + 0.05 * i, 2) for i in range(12))
# Five are 1 to 2 % better.
_TRELLIS_GAINS = (0.9, 1.0, 1.1)
# The largest bfloat16, because caches store scales in this dtype.
LARGEST_SCALE = 3.3895e38
_FLOAT_DTYPES = (mx.float16, mx.bfloat16, mx.float32)


class QuantizedVectors(NamedTuple):
    """Packed vectors: all that is stored of them.

    ``codes`` are uint32 (..., words_per_vector) in the layout of :mod:`.packing`, or those of a
    stream of :mod:`.trellis`. ``scales`` are float32 (...): a level times the scale is a value of
    the rotated vector.
    """

    codes: mx.array
    scales: mx.array

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


class TurboQuantizer:
    """Quantizes vectors of ``dim`` values to ``bits`` bits per value plus one scale per vector.

    A vector x is rotated: y = R x * sqrt(dim) / |x|. Each coordinate of gain * y is rounded to the
    nearest level, q (TurboQuant, arXiv 2504.19874, Algorithm 1). The reconstruction is s * R^T q.

    Args:
        dim: Values per vector, 8 to 8,192.
        bits: Bits per value, 1 to 8.
        rotation: "hadamard" or "haar", see :class:`.rotation.Rotation`.
        seed: Seed of the rotation. Vectors made from the same seed would not be independent of it.
        scale: How s is computed from x and q (DRIVE, arXiv 2105.08339; EDEN, arXiv 2108.08842):
            "unbiased", |x|^2 / <Rx, q>, makes inner products unbiased over the rotation;
            "least_squares", <Rx, q> / |q|^2, has the least mean squared error;
            "norm", |x| / |q|, keeps the length;
            "none", |x| / sqrt(dim) / gain, is the paper's TurboQuant_mse.
        basis: Axes of the vectors, in place of a rotation. Vectors are then (..., H, n, dim), and
            ``bits`` are the mean of the pattern of bits that suits the axes. Errors count by the
            weights of the axes, for the gain and the scale as well.
        gain_search: Try a dozen gains per vector and keep the one with the largest cosine between
            y and q, or three with a trellis and keep that of the least error. Without it, or with
            scalar codes of 1 bit, the gain is 1. Costs time in ``quantize`` only.
        codec: "scalar" codes round each coordinate by itself. "trellis" codes, see
            :mod:`.trellis`, have up to 4 bits and a fifth to a third less error from 48 values on;
            ``quantize`` takes 20 to 50 times as long. With more bits they are scalar.

    ``bits_per_value`` counts the codes, padded to whole words, and the float32 scale. A cache
    stores scales in bfloat16, which takes 16 / dim bits less.

    Raises:
        ValueError: an argument outside these ranges.
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        *,
        rotation: str = "hadamard",
        seed: int = 0,
        scale: str = "unbiased",
        gain_search: bool = True,
        basis: Basis | None = None,
        codec: str = "scalar",
    ):
        codebook(dim, bits)  # raises an error for sizes without one
        if codec not in CODECS:
            raise ValueError(f"Codec {codec!r} is not known: use one of {', '.join(CODECS)}.")
        if scale not in SCALES:
            raise ValueError(f"Scale {scale!r} is not known: use one of {', '.join(SCALES)}.")
        self.dim = dim
        self.bits = bits
        self.scale = scale
        self.seed = seed
        self.rotation = Rotation(dim, rotation, seed) if basis is None else basis
        self.basis = basis
        self.is_trellis = codec == "trellis" and bits <= trellis.MOST_BITS
        # Bits of all coordinates, or of the eights of a run.
        self.pattern: Bits = bits if basis is None else basis.pattern(bits, self.is_trellis)
        gains = _TRELLIS_GAINS if self.is_trellis else _GAINS
        self.gains = constant(gains if gain_search and (self.is_trellis or bits > 1) else (1.0,))
        self.bits_per_value = 32 * (words_per_vector(dim, bits) + 1) / dim
        # At 4 bits a byte holds two codes; one look-up finds both levels.
        self._byte_levels: mx.array | None = None
        if self.pattern == 4 and dim % 8 == 0 and not self.is_trellis:
            levels = self._levels_of(mx.arange(256)[:, None] >> mx.array([0, 4]) & 15)
            self._byte_levels = constant(levels.view(mx.uint64).flatten())
            self._order = constant(byte_order(dim))

    def __deepcopy__(self, memo: dict) -> "TurboQuantizer":
        return self  # it is immutable, and results are cached by its identity

    def quantize(self, x: mx.array) -> QuantizedVectors:
        """Pack vectors (..., dim) of float16, bfloat16 or float32.

        A vector of zeros gets scale 0. One with an infinity or NaN gets scale NaN, so that all its
        values are restored as NaN. No finite vector overflows the scale.

        Raises:
            ValueError: another shape or dtype.
        """
        check_vectors(x, self.dim)
        x = x.astype(mx.float32)
        # Scaled to a largest value of 1, so that no sum of squares overflows or vanishes.
        largest = mx.abs(x).max(axis=-1, keepdims=True)
        rotated = self.rotation.apply(x / mx.where(largest == 0, 1, largest))
        rms = mx.linalg.norm(rotated, axis=-1, keepdims=True) / self.dim**0.5
        codes, gain = self._encode(rotated / mx.where(rms == 0, 1, rms))
        scales = mx.minimum(self._scales(rotated, codes, gain) * largest, LARGEST_SCALE)
        scales = mx.where(mx.isfinite(largest), scales, mx.nan)
        pack = trellis.pack if self.is_trellis else packing.pack
        return QuantizedVectors(pack(codes, self.pattern), scales.squeeze(-1))

    def dequantize(self, packed: QuantizedVectors, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The reconstructed vectors (..., dim) in ``dtype``.

        Raises:
            ValueError: codes of a shape that ``quantize`` does not return.
        """
        # Scaled last, because the sums of the rotation would overflow before the values do.
        values = self.rotation.invert(self.rotated_levels(packed)) * packed.scales[..., None]
        return values.astype(dtype)

    def inner_product(self, queries: mx.array, packed: QuantizedVectors) -> mx.array:
        """Inner products of queries (..., q, dim) and packed vectors (..., n): float32 (..., q, n).

        Queries are float16, bfloat16 or float32. They are rotated, so that the packed vectors need
        not be rotated back.

        Raises:
            ValueError: queries of another shape or dtype, or codes of another shape.
        """
        check_vectors(queries, self.dim)
        queries = self.stored_order(self.rotation.apply_to_queries(queries))
        products = queries @ self.stored_levels(packed).swapaxes(-1, -2)
        return products * packed.scales[..., None, :]

    def stored_levels(self, packed: QuantizedVectors) -> mx.array:
        """:meth:`rotated_levels` in the order of :meth:`stored_order`, which is faster on a CPU."""
        if self._byte_levels is None:
            return self.rotated_levels(packed)
        self._check_packed(packed)
        pairs = mx.take_along_axis(self._byte_levels, packed.codes.view(mx.uint8).flatten(), axis=0)
        return pairs.view(mx.float32).reshape(*packed.scales.shape, self.dim)

    def stored_order(self, rotated: mx.array) -> mx.array:
        """Rotated vectors (..., dim) with their coordinates in the order of the packed bytes."""
        return rotated if self._byte_levels is None else rotated[..., self._order]

    def from_stored_order(self, stored: mx.array) -> mx.array:
        """The inverse of :meth:`stored_order`."""
        return stored if self._byte_levels is None else stored[..., mx.argsort(self._order)]

    def rotated_levels(self, packed: QuantizedVectors) -> mx.array:
        """q, the levels of packed vectors: float32 (..., dim)."""
        self._check_packed(packed)
        unpack = trellis.unpack if self.is_trellis else packing.unpack
        return self._levels_of(unpack(packed.codes, self.pattern, self.dim))

    def _check_packed(self, packed: QuantizedVectors) -> None:
        words = words_per_vector(self.dim, self.pattern)
        if packed.codes.shape != (*packed.scales.shape, words):
            raise ValueError(
                f"Codes of shape {packed.codes.shape} with scales of shape {packed.scales.shape} "
                f"are not vectors of {self.dim} values at {self.bits} bits: use codes of shape "
                f"{(*packed.scales.shape, words)}, as quantize returns them."
            )

    def _levels_of(self, codes: mx.array) -> mx.array:
        """Levels of codes, or of the windows of a trellis, (..., dim) in float32."""
        return self._by_part(_window_levels if self.is_trellis else _levels, codes)

    def _codes_of(self, y: mx.array) -> mx.array:
        """The codes of y (..., dim), or the windows of a trellis: uint8 or uint32."""
        if not self.is_trellis:
            return self._by_part(_codes, y)
        weights = mx.ones(self.dim) if self.basis is None else self.basis.weights
        vectors, weights = (x.reshape(-1, self.dim) for x in mx.broadcast_arrays(y, weights))
        bits = trellis.coordinate_bits(self.pattern, self.dim)
        return trellis.best_windows(vectors, bits, weights).reshape(y.shape)

    def _by_part(self, function: Callable[[int, int, mx.array], mx.array], x: mx.array) -> mx.array:
        """The results of ``function`` for x (..., dim), by the bits of the eights of a run."""
        if isinstance(self.pattern, int):
            return function(self.dim, self.pattern, x)
        runs = mx.unflatten(x, -1, (-1, RUN // EIGHT, EIGHT))
        parts = [function(self.dim, bits, runs[..., i, :]) for i, bits in enumerate(self.pattern)]
        return mx.stack(parts, axis=-2).flatten(-3)

    def _sum(self, x: mx.array) -> mx.array:
        """The sum of x (..., dim) over its coordinates, by their weights in a basis: (..., 1)."""
        return (x if self.basis is None else x * self.basis.weights).sum(axis=-1, keepdims=True)

    def _encode(self, y: mx.array) -> tuple[mx.array, mx.array]:
        """Codes of y (..., dim) and the gain (..., 1) that they were found with."""
        gain = mx.full((*y.shape[:-1], 1), self.gains[0])
        if len(self.gains) > 1:
            fits = []
            for each in self.gains:
                # One after the other: all at once take four times the memory and the time.
                y = mx.depends([y], fits[-1:])[0]
                fits.append(self._fit(self._codes_of(each * y), each, y))
            best = mx.argmax(mx.concatenate(fits, axis=-1), axis=-1, keepdims=True)
            gain = self.gains[best]
        return self._codes_of(gain * y), gain

    def _fit(self, codes: mx.array, gain: mx.array, y: mx.array) -> mx.array:
        """The cosine between the levels of codes and y (..., dim), times |y|: (..., 1).

        For a trellis it is minus the squared error with this gain, which grows with the cosine but
        for a thousandth, and which a search knows before it follows the stream back.
        """
        levels = self._levels_of(codes)
        if self.is_trellis:
            return -self._sum(mx.square(y - levels / gain))
        return self._sum(levels * y) / mx.sqrt(self._sum(levels * levels))

    def _scales(self, rotated: mx.array, codes: mx.array, gain: mx.array) -> mx.array:
        levels = self._levels_of(codes)
        if self.scale == "none":
            return mx.linalg.norm(rotated, axis=-1, keepdims=True) / self.dim**0.5 / gain
        squared_norm, squared_length = self._sum(rotated * rotated), self._sum(levels * levels)
        if self.scale == "norm":
            return mx.sqrt(squared_norm / squared_length)
        product = self._sum(rotated * levels)
        if self.scale == "least_squares":
            return product / squared_length
        # The forced levels of a stream may point away from a vector, which then is nothing.
        unbiased = mx.where(product > 0, squared_norm / mx.where(product > 0, product, 1), 0)
        if self.basis is None:
            return unbiased
        # Then no error is larger than the vector, however unlike those of the basis it is.
        return mx.minimum(unbiased, 2 * mx.maximum(product, 0) / squared_length)


@cache
def _book(dim: int, bits: int) -> tuple[mx.array, mx.array]:
    """The float32 levels and thresholds of a codebook."""
    levels, thresholds = codebook(dim, bits)
    return constant(levels.astype(np.float32)), constant(thresholds.astype(np.float32))


def _levels(dim: int, bits: int, codes: mx.array) -> mx.array:
    """Levels of codes in float32, by their polynomial where there is one; zeros without bits."""
    if bits == 0:
        return mx.zeros(codes.shape)
    if bits > POLYNOMIAL_BITS:
        # Nine times faster than mx.take on a CPU.
        levels = mx.take_along_axis(_book(dim, bits)[0], codes.flatten(), axis=-1)
        return levels.reshape(codes.shape)
    x = codes.astype(mx.float32) * 2 + (1 - 2**bits)
    return evaluate_polynomial(level_polynomial(dim, bits), x)


def _window_levels(dim: int, bits: int, windows: mx.array) -> mx.array:
    return trellis.levels(bits, windows)


def _codes(dim: int, bits: int, y: mx.array) -> mx.array:
    """The number of thresholds below each value: uint8 or uint32."""
    if bits > _COMPARED_BITS:
        return mx.searchsorted(_book(dim, bits)[1], y)
    codes = mx.zeros(y.shape, mx.uint8)
    for threshold in _book(dim, bits)[1] if bits else ():
        codes = codes + (y > threshold)
    return codes


def check_vectors(x: mx.array, dim: int) -> None:
    """Raise ValueError unless x is (..., dim) of float16, bfloat16 or float32."""
    if x.ndim == 0 or x.shape[-1] != dim:
        raise ValueError(
            f"An array of shape {x.shape} does not hold vectors of {dim} values: "
            f"its last axis must be {dim}."
        )
    if x.dtype not in _FLOAT_DTYPES:
        raise ValueError(
            f"Vectors of dtype {x.dtype} cannot be quantized: "
            "convert them to float16, bfloat16 or float32."
        )
