"""TurboQuant_prod: codes, and one bit of QJL per value for their error."""

from typing import NamedTuple

import mlx.core as mx

from mlx_turboquant.codec.codebook import MAX_BITS, check_bits
from mlx_turboquant.codec.quantizer import QuantizedVectors

from .common import Method
from .presets import turboquant_mse
from .qjl import QJL, SignVectors


class ProdVectors(NamedTuple):
    """The packed vectors of the first stage, and the packed residuals."""

    first: QuantizedVectors
    second: SignVectors


class TurboQuantProd(Method):
    """``bits`` - 1 bits of TurboQuant_mse and the QJL of the residual (arXiv 2504.19874, Alg. 2).

    Inner products are unbiased. For a query orthogonal to a unit vector, their variance times dim
    is (pi / 2) D with a Gaussian projection (Theorem 2) and about (pi / 2 - 1) D with an orthogonal
    one, where D is the squared error of the first stage.

    Args:
        dim: Values per vector, 8 to 8,192.
        bits: Bits per value, 2 to 8. A vector takes two float32 numbers more.
        projection: "gaussian", as in the paper, or "orthogonal", see :class:`.qjl.QJL`.
        seed: Seed of the rotation and of the projection, which are independent of each other.

    Raises:
        ValueError: another value of an argument.
    """

    def __init__(self, dim: int, bits: int, *, projection: str = "gaussian", seed: int = 0):
        check_bits(bits)
        if bits == 1:
            raise ValueError(
                f"TurboQuant_prod with 1 bit has no first stage: use QJL, or 2 to {MAX_BITS} bits."
            )
        self.dim = dim
        self.bits = bits
        self.first = turboquant_mse(dim, bits - 1, seed=seed)
        self.second = QJL(dim, projection=projection, seed=seed)
        self.bits_per_value = self.first.bits_per_value + self.second.bits_per_value

    def _pack(self, x: mx.array) -> ProdVectors:
        first = self.first.quantize(x)
        residual = x.astype(mx.float32) - self.first.dequantize(first)
        return ProdVectors(first, self.second.quantize(residual))

    def _values(self, packed: ProdVectors) -> mx.array:
        return self.first.dequantize(packed.first) + self.second.dequantize(packed.second)
