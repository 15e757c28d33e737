import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_turboquant.codec.codebook import (
    codebook,
    distortion,
    evaluate_polynomial,
    level_polynomial,
    lloyd_max_levels,
)

# Positive levels in standard deviations, from an independent computation of partial moments.
POSITIVE_LEVELS = {
    (64, 1): [0.80101],
    (64, 2): [0.45212, 1.49997],
    (64, 3): [0.24375, 0.75066, 1.32934, 2.11131],
    (128, 1): [0.79944],
    (128, 2): [0.45245, 1.50519],
    (128, 3): [0.24442, 0.75333, 1.33660, 2.13147],
    (128, 4): [0.12787, 0.38638, 0.65362, 0.93710, 1.24777, 1.60434, 2.04593, 2.68886],
    (256, 4): [0.12813, 0.38721, 0.65519, 0.93971, 1.25199, 1.61117, 2.05741, 2.71057],
    (576, 2): [0.45271, 1.50926],
}
# Mean squared error of a unit vector for 1 to 8 bits, from the same computation.
DISTORTION = {
    64: [0.3583874, 0.1145258, 0.0333908, 0.0091315, 0.0023992, 0.0006160, 0.0001561, 0.0000393],
    128: [0.3608886, 0.1160001, 0.0339659, 0.0093148, 0.0024515, 0.0006300, 0.0001598, 0.0000402],
    256: [0.3621356, 0.1167400, 0.0342560, 0.0094075, 0.0024779, 0.0006371, 0.0001616, 0.0000407],
}
dims = st.integers(8, 8192)
bit_widths = st.integers(1, 8)


@pytest.mark.parametrize("dim, bits", POSITIVE_LEVELS)
def test_levels_match_the_table(dim, bits):
    positive = lloyd_max_levels(dim, bits)[2 ** (bits - 1) :]
    np.testing.assert_allclose(positive, POSITIVE_LEVELS[dim, bits], atol=6e-6)  # five digits


@pytest.mark.parametrize("dim", DISTORTION)
def test_distortion_matches_the_table(dim):
    computed = [distortion(dim, lloyd_max_levels(dim, bits)) for bits in range(1, 9)]
    np.testing.assert_allclose(computed, DISTORTION[dim], atol=6e-8)  # seven digits


@given(dims, bit_widths)
def test_every_level_is_the_mean_of_its_cell(dim, bits):
    """The optimality condition, checked with a plain Riemann sum of the density."""
    levels = lloyd_max_levels(dim, bits)
    u = np.linspace(-np.sqrt(dim), np.sqrt(dim), 400_001)[1:-1]
    u = u if dim < 400 else np.linspace(-12, 12, 400_001)
    density = np.exp((dim - 3) / 2 * np.log1p(-u * u / dim))
    cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, u)
    mass = np.bincount(cell, density, minlength=len(levels))
    moment = np.bincount(cell, density * u, minlength=len(levels))
    # A cell holds about 50 points or more, and its edges shift its mean by up to half a spacing.
    np.testing.assert_allclose(moment / mass, levels, atol=2 * (u[1] - u[0]))


@given(dims, bit_widths)
def test_levels_are_symmetric_and_ascending(dim, bits):
    for levels in (lloyd_max_levels(dim, bits), codebook(dim, bits).levels):
        np.testing.assert_array_equal(levels, -levels[::-1])
        assert (np.diff(levels) > 0).all()


def test_one_bit_has_a_closed_form():
    """E|x| of a coordinate is Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)); at d = 9 that is 35/128."""
    assert lloyd_max_levels(9, 1)[1] / 3 == pytest.approx(35 / 128, rel=1e-12)


@given(dims, st.integers(1, 6))
def test_the_polynomial_costs_little(dim, bits):
    exact = distortion(dim, lloyd_max_levels(dim, bits))
    most = {5: 1.013, 6: 1.035}.get(bits, 1.002)
    assert exact * (1 - 1e-9) <= distortion(dim, codebook(dim, bits).levels) <= exact * most


@given(dims, st.integers(1, 2))
def test_the_polynomial_is_exact_for_one_and_two_bits(dim, bits):
    np.testing.assert_allclose(codebook(dim, bits).levels, lloyd_max_levels(dim, bits), atol=1e-9)


@given(dims, st.integers(1, 6))
def test_a_code_is_evaluated_at_an_odd_integer(dim, bits):
    x = 2.0 * np.arange(2**bits) + 1 - 2**bits
    levels = evaluate_polynomial(level_polynomial(dim, bits), x)
    np.testing.assert_allclose(levels, codebook(dim, bits).levels, atol=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: codebook(7, 4), "7 values"),
        (lambda: codebook(8193, 4), "8193 values"),
        (lambda: codebook(128, 0), "0 bits"),
        (lambda: codebook(128, 9), "9 bits"),
        (lambda: codebook(128, 2.5), "2.5 bits"),
        (lambda: level_polynomial(128, 7), "7 bits"),
    ],
)
def test_a_size_without_codebook_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
