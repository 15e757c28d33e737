"""Methods related to TurboQuant, with the interface of :class:`.TurboQuantizer`, for comparison.

Only simulated caches use them. docs/methods.md compares them.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_turboquant.codec.quantizer import TurboQuantizer

from .affine import Affine
from .common import Method
from .presets import drive, drive_biased, eden, eden_biased, norm_corrected, turboquant_mse
from .prod import TurboQuantProd
from .qjl import QJL

__all__ = [
    "METHODS",
    "Affine",
    "Method",
    "QJL",
    "TurboQuantProd",
    "drive",
    "drive_biased",
    "eden",
    "eden_biased",
    "make_method",
    "norm_corrected",
    "turboquant_mse",
]


def _by_dim(make: Callable[..., Method], **settings) -> Callable[[mx.array, int, int], Method]:
    return lambda x, bits, seed: make(x.shape[-1], bits, seed=seed, **settings)


def _affine(x: mx.array, bits: int, seed: int) -> Method:
    return Affine(x.shape[-1], bits, group_size=32 if x.shape[-1] % 64 else 64)


# By name, functions of x, bits and seed that make a method for vectors like x (..., n, dim).
METHODS: dict[str, Callable[[mx.array, int, int], Method]] = {
    "affine": _affine,
    "eden": _by_dim(eden),
    "eden-biased": _by_dim(eden_biased),
    "mse": _by_dim(turboquant_mse),
    "norm": _by_dim(norm_corrected),
    "prod": _by_dim(TurboQuantProd),
    "prod-orthogonal": _by_dim(TurboQuantProd, projection="orthogonal"),
    "qjl": _by_dim(QJL),
    "qjl-orthogonal": _by_dim(QJL, projection="orthogonal"),
    "turboquant": _by_dim(TurboQuantizer),
}


def make_method(name: str, x: mx.array, bits: int, seed: int = 0) -> Method:
    """The method of a name in ``METHODS`` for vectors like x (..., n, dim), a float array.

    Raises:
        ValueError: an unknown name, or bits or a dimension that the method does not support.
    """
    if name not in METHODS:
        raise ValueError(f"Codec {name!r} is not known: use one of {', '.join(METHODS)}.")
    return METHODS[name](x, bits, seed)
