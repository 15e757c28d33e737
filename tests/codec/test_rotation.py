import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokens import normal

from mlx_turboquant.codec.rotation import Rotation, hadamard_factors

HADAMARD_DIMS = [8, 12, 20, 24, 28, 40, 56, 64, 80, 96, 112, 128, 192, 224, 256, 512, 640, 1536]
# Sizes for which mx.hadamard_transform corrupts memory or returns something else.
UNSAFE_DIMS = [36, 60, 72, 84, 100, 120, 144, 240, 480, 576]
rotations = st.builds(
    Rotation,
    st.sampled_from(HADAMARD_DIMS + UNSAFE_DIMS[:6]),
    st.sampled_from(["hadamard", "haar"]),
    st.integers(0, 3),
)
# Rounding of a float32 sum of up to 1,536 terms of size 1 / sqrt(dim).
TOLERANCE = 2e-5


@given(rotations)
def test_inverting_returns_the_vector(rotation):
    x = normal((5, rotation.dim))
    assert mx.abs(rotation.invert(rotation.apply(x)) - x).max() < TOLERANCE


@given(rotations)
def test_inner_products_are_invariant(rotation):
    x, y = normal((5, rotation.dim), 1), normal((5, rotation.dim), 2)
    rotated = rotation.apply(x) @ rotation.apply(y).T
    assert mx.abs(rotated - x @ y.T).max() < TOLERANCE * rotation.dim**0.5


@given(st.sampled_from(HADAMARD_DIMS), st.integers(0, 3))
def test_a_hadamard_rotation_spreads_a_single_value_evenly(dim, seed):
    rotated = Rotation(dim, seed=seed).apply(mx.eye(dim))
    np.testing.assert_allclose(np.abs(np.array(rotated)), dim**-0.5, rtol=1e-5)


@given(st.integers(1, 10_000))
def test_factors_multiply_to_the_dimension(dim):
    factors = hadamard_factors(dim)
    if factors is not None:
        order, power = factors
        assert order * power == dim and order in (1, 12, 20, 28) and power & (power - 1) == 0


@pytest.mark.parametrize("dim", UNSAFE_DIMS)
def test_sizes_that_mlx_gets_wrong_use_a_dense_matrix(dim):
    assert hadamard_factors(dim) is None
    assert Rotation(dim).matrix.shape == (dim, dim)


def test_signs_of_a_seed_never_change():
    """Stored caches depend on them."""
    signs = [
        "".join("+" if sign > 0 else "-" for sign in Rotation(16, seed=seed).signs.tolist())
        for seed in (0, 1, -1)
    ]
    assert signs == ["-++-+++-+-+-----", "-++-+-+++----++-", "--++-++---+++-++"]


def test_a_haar_matrix_has_no_preferred_direction():
    """Without the sign correction of QR, the diagonal would have a mean of about -1 / sqrt(dim)."""
    diagonals = [np.diag(np.array(Rotation(64, "haar", seed).matrix)) for seed in range(50)]
    # 3,200 entries of standard deviation 1 / 8: the mean has a standard error of 0.0022.
    assert abs(np.mean(diagonals)) < 4 * 0.0022


def test_an_unknown_rotation_is_refused():
    with pytest.raises(ValueError, match="'fourier'.*'hadamard' or 'haar'"):
        Rotation(64, "fourier")
