"""Methods that are settings of :class:`.TurboQuantizer`, by the names of their papers.

With c the cosine of a vector and its code, their relative squared errors are

    turboquant_mse   about D, the error of the codebook; inner products shrink by the factor 1 - D
    eden             1 / c^2 - 1, no bias
    eden_biased      1 - c^2, the least; inner products shrink by the factor c^2
    norm_corrected   2 - 2 c; inner products shrink by the factor c
"""

from ..codec.quantizer import TurboQuantizer


def turboquant_mse(dim: int, bits: int, *, seed: int = 0) -> TurboQuantizer:
    """TurboQuant_mse (arXiv 2504.19874, Algorithm 1): the norm is the scale."""
    return TurboQuantizer(dim, bits, scale="none", gain_search=False, seed=seed)


def eden(dim: int, bits: int, *, seed: int = 0) -> TurboQuantizer:
    """Unbiased EDEN (arXiv 2108.08842): the scale |x|^2 / <Rx, q>."""
    return TurboQuantizer(dim, bits, scale="unbiased", gain_search=False, seed=seed)


def eden_biased(dim: int, bits: int, *, seed: int = 0) -> TurboQuantizer:
    """EDEN with the least squared error (arXiv 2108.08842): the scale <Rx, q> / |q|^2."""
    return TurboQuantizer(dim, bits, scale="least_squares", gain_search=False, seed=seed)


def norm_corrected(dim: int, bits: int, *, seed: int = 0) -> TurboQuantizer:
    """The scale |x| / |q|, which keeps the length: the geometric mean of both scales of EDEN."""
    return TurboQuantizer(dim, bits, scale="norm", gain_search=False, seed=seed)


def drive(dim: int, *, seed: int = 0) -> TurboQuantizer:
    """Unbiased DRIVE (arXiv 2105.08339): the signs of Rx and the scale |x|^2 / |Rx|_1.

    It is :func:`eden` with one bit.
    """
    return eden(dim, 1, seed=seed)


def drive_biased(dim: int, *, seed: int = 0) -> TurboQuantizer:
    """DRIVE with the least squared error (arXiv 2105.08339): the scale |Rx|_1 / dim."""
    return eden_biased(dim, 1, seed=seed)
