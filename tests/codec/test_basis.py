import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_turboquant.codec.basis import Basis, learned_basis
from mlx_turboquant.codec.packing import words_per_vector
from mlx_turboquant.codec.quantizer import TurboQuantizer

HEADS, DIM, TOKENS = 2, 64, 512
IDENTITY = np.broadcast_to(np.eye(DIM), (HEADS, DIM, DIM))
SPREAD = 2 ** np.linspace(3, -3, DIM)


def keys_of(deviations: np.ndarray, seed: int = 0) -> mx.array:
    """Keys (HEADS, TOKENS, DIM), Gaussian with these deviations along random axes."""
    axes = np.linalg.qr(np.random.default_rng(9).standard_normal((HEADS, DIM, DIM)))[0]
    x = np.random.default_rng(seed).standard_normal((HEADS, TOKENS, DIM)) * deviations
    return mx.array((x @ axes).astype(np.float32))


def basis_of(keys: mx.array, queries: np.ndarray = IDENTITY) -> Basis:
    x = np.array(keys, np.float64)
    return learned_basis(x.swapaxes(1, 2) @ x / TOKENS, queries)


def relative_error(quantizer: TurboQuantizer, keys: mx.array) -> float:
    restored = quantizer.dequantize(quantizer.quantize(keys))
    return (mx.square(restored - keys).sum() / mx.square(keys).sum()).item()


def test_coordinates_have_the_same_variance_and_give_the_vectors_back():
    """Rounding of float32, with variances that differ by 4,000."""
    keys = keys_of(SPREAD)
    basis = basis_of(keys)
    coordinates = basis.apply(keys)
    groups = mx.square(coordinates).reshape(HEADS, TOKENS, -1, 4, 8).mean(axis=(1, 2, 4))
    assert mx.allclose(groups, groups[:, :1], rtol=1e-3)
    assert mx.allclose(basis.invert(coordinates), keys, rtol=1e-3, atol=1e-3)


def test_queries_have_the_same_products_with_coordinates_as_with_vectors():
    keys, queries = keys_of(SPREAD), mx.random.normal((HEADS, 5, DIM), key=mx.random.key(0))
    basis = basis_of(keys)
    products = basis.apply_to_queries(queries) @ basis.apply(keys).swapaxes(-1, -2)
    assert mx.allclose(products, queries @ keys.swapaxes(-1, -2), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_unequal_variances_are_worth_more_than_a_bit(bits):
    """Deviations from 8 to 1/8: the coding gain of their variances is above 10."""
    basis, keys = basis_of(keys_of(SPREAD)), keys_of(SPREAD, seed=1)  # others of the same kind
    learned, random = TurboQuantizer(DIM, bits, basis=basis), TurboQuantizer(DIM, bits + 1)
    assert relative_error(learned, keys) < relative_error(random, keys)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_equal_variances_have_the_error_of_a_random_rotation(bits):
    """Rotations differ by some percent on 1,024 vectors of 64 values."""
    keys = keys_of(np.ones(DIM))
    learned = TurboQuantizer(DIM, bits, basis=learned_basis(IDENTITY, IDENTITY))
    assert learned.pattern == bits
    random = relative_error(TurboQuantizer(DIM, bits), keys)
    assert relative_error(learned, keys) == pytest.approx(random, rel=0.1)


def test_directions_that_queries_ignore_take_the_error():
    looked_at = np.diag([1.0] * 16 + [1e-3] * (DIM - 16))
    keys = keys_of(np.ones(DIM))
    weighted = basis_of(keys, np.broadcast_to(looked_at, IDENTITY.shape))
    errors = []
    for basis in (basis_of(keys), weighted):
        quantizer = TurboQuantizer(DIM, 2, basis=basis)
        restored = quantizer.dequantize(quantizer.quantize(keys))
        errors.append(mx.square(restored - keys)[..., :16].sum().item())
    assert errors[1] < errors[0] / 4


@given(st.integers(1, 8), st.sampled_from([32, 64, 96, 128, 256]), st.floats(0, 8))
def test_a_pattern_has_its_mean_and_takes_no_more_words(bits, dim, spread):
    variances = 2 ** np.linspace(spread, -spread, dim)
    pattern = learned_basis(np.diag(variances)[None], np.eye(dim)[None]).pattern(bits)
    assert np.mean(pattern) == bits
    assert words_per_vector(dim, pattern) == words_per_vector(dim, bits)


def test_a_larger_variance_gets_more_bits():
    basis = basis_of(keys_of(SPREAD))
    assert basis.pattern(3) == (6, 3, 2, 1)
    first, *_, last = basis.weights[0, 0].reshape(-1, 4, 8).mean(axis=(0, 2)).tolist()
    assert first > 500 * last


def test_inner_products_are_those_of_the_restored_vectors():
    keys, queries = keys_of(SPREAD), mx.random.normal((HEADS, 5, DIM), key=mx.random.key(0))
    quantizer = TurboQuantizer(DIM, 3, basis=basis_of(keys))
    packed = quantizer.quantize(keys)
    expected = queries @ quantizer.dequantize(packed).swapaxes(-1, -2)
    assert mx.allclose(quantizer.inner_product(queries, packed), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("rank", [0, 1, 8])
def test_vectors_that_fill_few_dimensions_give_a_basis_that_serves_others(rank):
    basis = basis_of(keys_of(np.where(np.arange(DIM) < rank, 1.0, 0.0)))
    keys = keys_of(np.ones(DIM), seed=1)
    quantizer = TurboQuantizer(DIM, 3, basis=basis)
    assert mx.isfinite(quantizer.dequantize(quantizer.quantize(keys))).all()


def test_zeros_and_infinities_are_restored_as_without_a_basis():
    quantizer = TurboQuantizer(DIM, 3, basis=basis_of(keys_of(SPREAD)))
    x = mx.zeros((HEADS, 2, DIM))
    x[0, 1, 3] = mx.inf
    restored = quantizer.dequantize(quantizer.quantize(x))
    assert (restored[1] == 0).all() and (restored[0, 0] == 0).all()
    assert mx.isnan(restored[0, 1]).all()


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        learned_basis(IDENTITY * np.nan, IDENTITY)
    with pytest.raises(ValueError, match="multiple of 32"):
        learned_basis(np.eye(80)[None], np.eye(80)[None])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_error_is_larger_than_a_vector_however_unlike_others_it_is(bits):
    """Vectors along single coordinates; the queries are all alike, so all errors count alike."""
    basis = basis_of(keys_of(2 ** np.linspace(6, -6, DIM)))
    quantizer = TurboQuantizer(DIM, bits, basis=basis)
    vectors = basis.invert(mx.broadcast_to(mx.eye(DIM), (HEADS, DIM, DIM)))
    restored = quantizer.dequantize(quantizer.quantize(vectors))
    errors = mx.square(restored - vectors).sum(axis=-1) / mx.square(vectors).sum(axis=-1)
    assert errors.max().item() <= 1.001  # rounding of float32 and of the inverse
