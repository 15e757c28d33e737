"""Methods that are settings of :class:`.TurboQuantizer`, by the names of their papers.

They take dim, bits and a seed; ``drive`` and ``drive_biased`` have one bit and take dim and a seed.
With y = Rx the rotated vector, q the levels of its code and c the cosine of both, their scales and
relative squared errors are

    turboquant_mse   the norm, |x| / sqrt(dim)   about D, the error of the codebook; inner products
                                                 shrink by the factor 1 - D
    eden             |x|^2 / <y, q>              1 / c^2 - 1, no bias
    eden_biased      <y, q> / |q|^2              1 - c^2, the least; inner products shrink by c^2
    norm_corrected   |x| / |q|, which keeps      2 - 2 c; inner products shrink by the factor c
                     the length: the geometric
                     mean of both scales of EDEN

TurboQuant_mse is Algorithm 1 of arXiv 2504.19874, EDEN is arXiv 2108.08842. DRIVE (arXiv
2105.08339) is EDEN with one bit: the signs of y and the scale |x|^2 / |y|_1, without bias, or
|y|_1 / dim, with the least squared error.
"""

from functools import partial

from mlx_turboquant.codec.quantizer import TurboQuantizer

turboquant_mse = partial(TurboQuantizer, scale="none", gain_search=False)
eden = partial(TurboQuantizer, scale="unbiased", gain_search=False)
eden_biased = partial(TurboQuantizer, scale="least_squares", gain_search=False)
norm_corrected = partial(TurboQuantizer, scale="norm", gain_search=False)
drive = partial(eden, bits=1)
drive_biased = partial(eden_biased, bits=1)
