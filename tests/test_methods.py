"""Every method, also those of the studies, against its paper and against closed forms.

Data and rotations or projections have different seeds.
"""

from functools import partial
from math import exp, lgamma, pi, sin, sqrt

import mlx.core as mx
import numpy as np
import pytest
from channel_split import ChannelSplit, largest_channels, qjl_with_outliers, turboquant_split
from hypothesis import given, settings
from hypothesis import strategies as st
from kvarn import KVarN
from methods import (
    QJL,
    Affine,
    TurboQuantProd,
    drive,
    drive_biased,
    eden,
    eden_biased,
    make_method,
    norm_corrected,
    turboquant_mse,
)
from mlx.utils import tree_flatten
from other_methods import ALL_METHODS
from polar_quant import PolarQuant, angle_levels
from tokens import normal, unit_vectors

from mlx_turboquant.codec.codebook import distortion, lloyd_max_levels

SEED = 7
COUNT = 20_000


def stored_nbytes(packed) -> int:
    return sum(array.nbytes for _, array in tree_flatten(packed))


def errors(make, x: mx.array, seeds: int = 4) -> tuple[float, float, float]:
    """Squared error, relative bias along x, and dim times the variance in orthogonal directions.

    They are those of ``make(seed)`` for several seeds, each with its part of x.
    """
    sums = np.zeros(3)
    for seed, part in enumerate(mx.split(x, seeds), SEED):
        method = make(seed=seed)
        restored = method.dequantize(method.quantize(part))
        along = (restored * part).sum(axis=-1, keepdims=True)
        across = mx.square(restored - along * part).sum(axis=-1) * x.shape[1] / (x.shape[1] - 1)
        squared = mx.square(restored - part).sum(axis=-1)
        sums += [values.sum().item() for values in (squared, along - 1, across)]
    return tuple(sums / len(x))


mse_of_3_bits = partial(turboquant_mse, 128, 3)


def all_methods(x: mx.array, bits: int) -> dict[str, object]:
    """The methods with this number of bits that can quantize vectors like x."""
    made = {}
    for name, make in ALL_METHODS.items():
        try:
            made[name] = make(x, bits, SEED)
        except ValueError:
            continue
    return made


# References are from 100,000 vectors in float64 at 128 dimensions; d * variance is known to half a
# percent. The 20,000 vectors here are accurate to 0.5 %, the polynomial levels of 3 and 4 bits
# cost up to 0.17 %, and four Gaussian projections differ by 0.6 % from their average.
@pytest.mark.parametrize(
    "make, references",
    [
        (turboquant_mse, {1: (0.3608886, 0.23353), 2: (0.1160001, 0.102297)}),
        (turboquant_mse, {3: (0.0339659, 0.0322536), 4: (0.0093148, 0.00911404)}),
        (eden, {1: (0.567286, 0.574929), 3: (0.0347408, 0.0347488), 4: (0.00924994, 0.00932254)}),
        (norm_corrected, {2: (0.118881, 0.116263), 4: (0.00918237, 0.00923179)}),
        (TurboQuantProd, {2: (0.565284, 0.569502), 3: (0.181806, 0.18103)}),
        (TurboQuantProd, {4: (0.053267, 0.0532545)}),
        (QJL, {1: (1.56488, 1.57188)}),
    ],
)  # fmt: skip
def test_errors_and_variances_are_those_of_the_papers(make, references):
    x = unit_vectors(COUNT, 128)
    for bits, (error, variance) in references.items():
        measured_error, _, measured_variance = errors(partial(make, 128, bits), x)
        assert measured_error == pytest.approx(error, rel=0.02)
        assert measured_variance == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize(
    "make, bits, error, variance",
    [
        (QJL, 1, 0.56689, 0.573787),
        (TurboQuantProd, 2, 0.204504, 0.204146),
        (TurboQuantProd, 4, 0.0192678, 0.0193467),
    ],
)
def test_an_orthogonal_projection_has_the_smaller_variance(make, bits, error, variance):
    """The spread of orthogonal projections is a tenth of that of Gaussian ones."""
    make = partial(make, 128, bits, projection="orthogonal")
    measured = errors(make, unit_vectors(COUNT, 128))
    assert measured[0] == pytest.approx(error, rel=0.02)
    assert measured[2] == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_theorem_2_of_prod_follows_from_its_first_stage(bits):
    """(pi / 2) D(bits - 1), to 0.5 % because the residual has a part along the query."""
    expected = pi / 2 * distortion(128, lloyd_max_levels(128, bits - 1))
    variance = errors(partial(TurboQuantProd, 128, bits), unit_vectors(COUNT // 2, 128))[2]
    assert variance == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_qjl_has_its_closed_form_error(bits):
    """(pi / 2) / bits - 1 / m, and without - 1 / m across.

    One projection of 64 or more rows differs by 2.7 % from the average, 20 by 0.6 %.
    """
    error, _, variance = errors(partial(QJL, 64, bits), unit_vectors(COUNT, 64), seeds=20)
    assert error == pytest.approx(pi / 2 / bits - 1 / (64 * bits), rel=0.02)
    assert variance == pytest.approx(pi / 2 / bits, rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_unbiased_number_beats_a_residual_bit(bits):
    """At the same bits, by the factors of the references' variances."""
    x = unit_vectors(COUNT // 2, 128)
    prod, one = (errors(partial(make, 128, bits), x)[2] for make in (TurboQuantProd, eden))
    assert prod / one == pytest.approx({2: 4.32, 3: 5.21, 4: 5.71}[bits], rel=0.03)  # both 1 %


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: eden(64, 2, seed=seed),
        lambda seed: drive(64, seed=seed),
        lambda seed: QJL(64, 2, seed=seed),
        lambda seed: QJL(64, 1, projection="orthogonal", seed=seed),
        lambda seed: TurboQuantProd(64, 2, seed=seed),
        lambda seed: TurboQuantProd(64, 3, projection="orthogonal", seed=seed),
        lambda seed: ChannelSplit(mx.arange(8), QJL(8, 4, seed=seed), QJL(56, 1, seed=seed + 1)),
    ],
)
def test_inner_products_are_unbiased_over_the_random_choices(make):
    """One vector and a query that correlates with it, over 400 rotations or projections."""
    x = unit_vectors(1, 64)
    query = x + unit_vectors(1, 64, seed=99)
    estimates = []
    for seed in range(400):
        method = make(seed)
        estimates.append(method.inner_product(query, method.quantize(x)).item())
    standard_error = np.std(estimates) / sqrt(len(estimates))
    assert abs(np.mean(estimates) - (query @ x.T).item()) < 4 * standard_error


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_biased_scales_shrink_products_by_their_closed_forms(bits):
    """1 - D, c^2 and c, where c is the cosine of vector and code."""
    x = unit_vectors(COUNT // 4, 128)
    exact = distortion(128, lloyd_max_levels(128, bits))
    # The mean of 5,000 products has a standard error of at most 0.0007.
    bias = errors(partial(turboquant_mse, 128, bits), x)[1]
    assert bias == pytest.approx(-exact, abs=3e-3)
    method = norm_corrected(128, bits, seed=SEED)
    cosine = (method.dequantize(method.quantize(x)) * x).sum(axis=-1)
    bias = errors(partial(eden_biased, 128, bits), x, seeds=1)[1]
    assert bias == pytest.approx(mx.square(cosine).mean().item() - 1, abs=1e-5)


def test_drive_is_one_bit_with_the_scales_of_its_paper():
    x = unit_vectors(50, 64)
    rotated = drive(64).rotation.apply(x)
    l1 = mx.abs(rotated).sum(axis=-1)
    # The scale of the paper multiplies signs, ours the level of one bit, E|u|.
    level = exp(lgamma(32) - lgamma(32.5)) / sqrt(pi) * sqrt(64)
    assert mx.allclose(drive(64).quantize(x).scales * level, 1 / l1, rtol=1e-5)
    assert mx.allclose(drive_biased(64).quantize(x).scales * level, l1 / 64, rtol=1e-5)


def test_the_angles_of_polar_quant_are_those_of_least_squared_error():
    """Four-level Lloyd-Max angles, from densities integrated on a grid of 100,000 points."""
    grid = (np.arange(100_000) + 0.5) * pi / 2 / 100_000
    for level in (2, 3, 4):
        angles = angle_levels(level)
        density = np.sin(2 * grid) ** (2 ** (level - 1) - 1)
        cell = np.searchsorted((angles[1:] + angles[:-1]) / 2, grid)
        means = np.bincount(cell, density * grid) / np.bincount(cell, density)
        assert np.allclose(angles, means, atol=1e-5)
        assert np.allclose(angles + angles[::-1], pi / 2)


def test_polar_quant_has_its_closed_form_error_at_3_875_bits():
    """2 (1 - p), where p is the product of the mean cosines of the angles' errors."""
    grid = (np.arange(100_000) + 0.5) * pi / 2 / 100_000
    kept = sin(pi / 16) / (pi / 16)
    for level in (2, 3, 4):
        density = np.sin(2 * grid) ** (2 ** (level - 1) - 1)
        offsets = np.abs(grid[:, None] - angle_levels(level)).min(axis=1)
        kept *= (density * np.cos(offsets)).sum() / density.sum()
    assert PolarQuant(128).bits_per_value == 3.875
    error, bias, _ = errors(partial(PolarQuant, 128), unit_vectors(COUNT, 128))
    # The sampling error of 20,000 vectors is 0.3 %.
    assert error == pytest.approx(2 - 2 * kept, rel=0.01)
    assert bias == pytest.approx(kept - 1, rel=0.01)


def test_polar_quant_at_3_875_bits_is_as_far_as_turboquant_mse_at_3_bits():
    x = unit_vectors(2_000, 128)
    polar, three = (errors(make, x)[0] for make in (partial(PolarQuant, 128), mse_of_3_bits))
    assert polar == pytest.approx(three, rel=0.1)  # 0.0321 and 0.0340


def test_the_split_of_the_paper_takes_what_its_parts_take():
    """2.25 bits of codes at 128 dimensions, not the 2.5 of the paper, and two float32 scales."""
    x = unit_vectors(100, 128)
    for bits, codes in ((2, 2.25), (3, 3.25)):
        assert turboquant_split(x, bits).bits_per_value == codes + 2 * 32 / 128
        # With 16-bit scales these are the paper's 2.5 and 3.5 bits.
        assert codes + 2 * 16 / 128 == bits + 0.5


def test_the_split_spends_its_bits_on_the_largest_channels():
    """32 of 128 channels, 10 times as large: their share of the energy has one more bit."""
    channels = mx.array(np.sort(np.random.default_rng(5).choice(128, 32, replace=False)))
    weights = mx.ones(128)
    weights[channels] = 10
    x = normal((4_000, 128), 11) * weights
    method = turboquant_split(x, 2, seed=SEED)
    assert mx.array_equal(method.channels[0], channels)
    squared = mx.square(method.dequantize(method.quantize(x)) - x).mean(axis=0)
    expected = [distortion(n, lloyd_max_levels(n, bits)) for n, bits in ((32, 3), (96, 2))]
    is_outlier = weights > 1
    # Sampling of 4,000 vectors in 32 and 96 channels: below 1 %; polynomial of 3 bits: 0.2 %.
    assert mx.where(is_outlier, squared, 0).sum().item() / 3200 == pytest.approx(
        expected[0], rel=0.03
    )
    assert mx.where(is_outlier, 0, squared).sum().item() / 96 == pytest.approx(
        expected[1], rel=0.03
    )
    plain = turboquant_mse(128, 2, seed=SEED)
    error = mx.square(plain.dequantize(plain.quantize(x)) - x).mean(axis=0).sum().item()
    assert squared.sum().item() < error / 2


def test_qjl_with_outliers_is_better_where_there_are_some():
    weights = mx.where(mx.arange(64) % 8 == 0, 20, 1)
    x = normal((500, 64), 3) * weights
    x = x / mx.linalg.norm(x, axis=-1, keepdims=True)
    method = qjl_with_outliers(x, 1, seed=SEED)
    assert mx.array_equal(method.channels[0], mx.arange(0, 64, 8))
    # Nearly all energy is in 8 channels of 4 projections each: m = 32 instead of 64, but the
    # closed form is that of 8 dimensions, (pi / 2) 8 / 32 instead of (pi / 2) 64 / 64.
    error = errors(lambda seed: method, x)[0]
    assert error == pytest.approx(pi / 2 * 8 / 32, rel=0.2)  # a single projection of 32 rows
    assert errors(partial(QJL, 64), x)[0] > 1.2


def test_every_head_has_outlier_channels_of_its_own():
    x = normal((2, 3, 50, 32), 3)
    x[0, 1, :, 5:13] *= 30
    x[1, 2, :, 20:28] *= 30
    channels = largest_channels(x, 8)
    assert channels.shape == (2, 3, 1, 8)
    assert channels[0, 1, 0].tolist() == list(range(5, 13))
    assert channels[1, 2, 0].tolist() == list(range(20, 28))
    method = turboquant_split(x, 8 - 1)
    restored = method.dequantize(method.quantize(x))
    # 7 and 8 bits leave an error of 1.3 % of the length on average.
    assert mx.linalg.norm(restored - x) < 0.02 * mx.linalg.norm(x)
    queries = normal((2, 3, 4, 32), 4)
    direct = queries @ restored.swapaxes(-1, -2)
    product = method.inner_product(queries, method.quantize(x))
    assert mx.allclose(product, direct, rtol=1e-4, atol=1e-3)  # float32 sums of up to 100


def test_affine_is_what_mlx_computes():
    x = unit_vectors(50, 128)
    for bits in (2, 4, 8):
        method = Affine(128, bits)
        expected = mx.dequantize(
            *mx.quantize(x, bits=bits, group_size=64), bits=bits, group_size=64
        )
        # bfloat16 rounds scales and offsets by at most 0.4 %, of values below 1 / 2.
        assert mx.allclose(method.dequantize(method.quantize(x)), expected, atol=4e-3)
    assert Affine(128, 4).bits_per_value == 4.5


dims = st.sampled_from([32, 64, 80, 128, 192])
bit_widths = st.integers(1, 8)


@settings(max_examples=15)
@given(dims, bit_widths)
def test_bits_per_value_are_the_bytes_that_quantize_returns(dim, bits):
    x = unit_vectors(6, dim).reshape(2, 3, dim)
    made = all_methods(x, bits)
    assert {"turboquant", "eden", "mse", "qjl"} <= set(made)
    for name, method in made.items():
        stored = 8 * stored_nbytes(method.quantize(x)) / x.size
        assert method.bits_per_value == pytest.approx(stored, rel=1e-12), name


@settings(max_examples=15)
@given(dims, bit_widths)
def test_inner_products_are_those_of_the_dequantized_vectors(dim, bits):
    x = unit_vectors(10, dim).reshape(2, 5, dim)
    queries = unit_vectors(6, dim, seed=5).reshape(2, 3, dim)
    for name, method in all_methods(x, bits).items():
        packed = method.quantize(x)
        direct = queries @ method.dequantize(packed).swapaxes(-1, -2)
        # Products of unit vectors in float32.
        assert mx.allclose(method.inner_product(queries, packed), direct, atol=2e-5), name


@settings(max_examples=10)
@given(dims, bit_widths, st.permutations(range(6)), st.integers(-60, 60))
def test_vectors_are_quantized_independently_and_at_any_scale(dim, bits, order, exponent):
    """By a power of two, which float32 multiplies exactly; MLX's affine scales end at 1e-7."""
    x = unit_vectors(6, dim)
    order = mx.array(order)
    for name, method in all_methods(x, bits).items():
        if name == "affine":
            exponent = max(exponent, 0)
        together = method.dequantize(method.quantize(x))
        scaled = method.dequantize(method.quantize(x[order] * 2.0**exponent)) * 2.0**-exponent
        assert mx.allclose(scaled, together[order], atol=1e-5), name


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_vector_comes_back_non_finite_and_harms_no_other(value):
    x = unit_vectors(3, 64)
    poisoned = mx.array(x)
    poisoned[1, 7] = value
    for name, method in all_methods(x, 4).items():
        restored = method.dequantize(method.quantize(poisoned))
        assert mx.isnan(restored[1]).all(), name
        assert mx.array_equal(restored[::2], method.dequantize(method.quantize(x))[::2]), name


@pytest.mark.parametrize("size", [0, 1e-30, 1e30, 1e38])
def test_zero_and_extreme_vectors_survive(size):
    x = unit_vectors(4, 64) / 4
    made = all_methods(x, 4)
    if size == 1e-30:
        del made["affine"]  # MLX's scales end at 1e-7
    for name, method in made.items():
        restored = method.dequantize(method.quantize(x * size))
        assert mx.isfinite(restored).all(), name
        if size == 0:
            assert mx.array_equal(restored, mx.zeros_like(x)), name
        else:
            expected = method.dequantize(method.quantize(x))
            # Relative to vectors of length 1 / 4; sizes other than powers of two are rounded.
            assert mx.allclose(restored / size, expected, atol=2e-3), name


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_any_float_dtype_comes_back_in_the_dtype_that_is_asked_for(dtype):
    x = unit_vectors(4, 64).astype(dtype)
    for name, method in all_methods(x, 4).items():
        restored = method.dequantize(method.quantize(x), dtype)
        assert restored.dtype == dtype and restored.shape == x.shape, name
        assert method.inner_product(x, method.quantize(x)).dtype == mx.float32, name


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 4, 64)])
def test_any_leading_axes_are_kept(shape):
    x = normal(shape, 1)
    for name, method in all_methods(unit_vectors(4, 64), 4).items():
        assert method.dequantize(method.quantize(x)).shape == shape, name


def test_wrong_vectors_are_refused_by_every_method():
    for method in all_methods(unit_vectors(4, 64), 4).values():
        with pytest.raises(ValueError, match="its last axis must be 64"):
            method.quantize(mx.zeros((2, 65)))
        with pytest.raises(ValueError, match="its last axis must be 64"):
            method.inner_product(mx.zeros((2, 63)), method.quantize(mx.zeros((2, 64))))
        with pytest.raises(ValueError, match="int32.* convert them"):
            method.quantize(mx.zeros((2, 64), mx.int32))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TurboQuantProd(64, 1), "1 bit has no first stage: use QJL"),
        (lambda: TurboQuantProd(64, 9), "9 bits per value are not supported"),
        (lambda: TurboQuantProd(64, 4, projection="sparse"), "'sparse' is not known: use one of"),
        (lambda: QJL(4), "4 values cannot be quantized"),
        (lambda: QJL(64, 0), "0 bits per value"),
        (lambda: PolarQuant(72), "72 values: use a multiple of 16"),
        (lambda: PolarQuant(8192 + 16), "8208 values"),
        (lambda: Affine(64, 7), "7 bits is not supported: use 2 to 6 or 8"),
        (lambda: Affine(96, 4), "96 values into groups of 64"),
        (lambda: Affine(128, 4, group_size=16), "groups of 16: use groups of 32, 64 or 128"),
        (lambda: turboquant_split(mx.zeros((2, 24)), 2), "24 values are too short"),
        (lambda: turboquant_split(mx.zeros((2, 64)), 8), "9 bits per value"),
        (lambda: ChannelSplit(mx.arange(9), QJL(8), QJL(56)), "9 outlier channels do not fit"),
        (lambda: make_method("quip", mx.zeros((2, 64)), 4), "'quip' is not known: use one of"),
        (lambda: ALL_METHODS["polar"](mx.zeros((2, 64)), 3, SEED), "PolarQuant with 3 bits"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("by_channel", [True, False])
def test_kvarn_stores_three_eighths_of_a_bit_a_value_beside_the_codes(by_channel):
    method = KVarN(128, 4, by_channel=by_channel)
    packed = method.quantize(normal((2, 256, 128), 1))
    assert method.bits_per_value == 4.375
    assert 8 * stored_nbytes(packed) == 4.375 * 2 * 256 * 128


@pytest.mark.parametrize("by_channel", [True, False])
def test_kvarn_rounds_normal_values_to_even_steps_over_their_range(by_channel):
    """128 normal values span 5.4 standard deviations on average, in 15 steps with even errors."""
    method = KVarN(128, 4, by_channel=by_channel)
    x = normal((64 * 128, 128), 1)
    error = mx.square(method.dequantize(method.quantize(x)) - x).mean().item()
    assert error == pytest.approx((5.4 / 15) ** 2 / 12, rel=0.1)


@given(st.floats(0.5, 100), st.integers(1, 8))
def test_kvarn_is_the_same_whatever_the_size_of_tokens(size, bits):
    """Sizes of tokens are divided out; each of three bfloat16 factors is within 1/256."""
    method = KVarN(64, bits, by_channel=True, tile=32)
    x = normal((32, 64), 1)
    sizes = mx.where(mx.arange(32)[:, None] < 3, size, 1.0)
    one, other = (method.dequantize(method.quantize(each)) for each in (x, sizes * x))
    # A value between two levels may go to either, by rounding.
    close = mx.abs(one - other / sizes) < 0.05 * mx.abs(x).max()
    assert close.mean().item() > 0.9


def test_kvarn_takes_whole_tiles():
    with pytest.raises(ValueError, match="130 vectors are not whole tiles of 128: use a multiple"):
        KVarN(64, 4, by_channel=True).quantize(mx.zeros((130, 64)))


def test_kvarn_of_zeros_is_zeros():
    method = KVarN(64, 2, by_channel=False)
    assert mx.array_equal(
        method.dequantize(method.quantize(mx.zeros((128, 64)))), mx.zeros((128, 64))
    )
