import itertools

import mlx.core as mx
import pytest
from conftest import mean_bits
from hypothesis import given
from hypothesis import strategies as st
from tokens import unit_vectors

from mlx_turboquant.codec.codebook import relative_error
from mlx_turboquant.codec.quantizer import TurboQuantizer
from mlx_turboquant.lm.allocation import (
    BUDGETS,
    Layer,
    Side,
    Vectors,
    allocate,
    check_budget,
    divergences_by_bits,
    expected_divergence,
    uniform_bits,
)

DIMS = (8, 40, 64, 80, 128)
WEIGHTS = st.floats(1e-7, 1.0)


def side(weight: float, dim: int = 64, heads: int = 2, min_bits: int = 1) -> Side:
    return Side(Vectors(heads, dim), divergences_by_bits(dim, {2: weight}), min_bits)


@st.composite
def models(draw) -> list[Layer]:
    layers = []
    for _ in range(draw(st.integers(1, 5))):
        heads = draw(st.integers(1, 3))
        keys = side(draw(WEIGHTS), draw(st.sampled_from(DIMS)), heads, min_bits=2)
        values = side(draw(WEIGHTS), draw(st.sampled_from(DIMS)), heads)
        layers.append(Layer(keys, values if draw(st.booleans()) else None))
    return layers


@given(models(), st.sampled_from(BUDGETS))
def test_the_budget_is_kept_to_the_byte_and_keys_have_two_bits_at_least(layers, budget):
    try:
        bits = allocate(layers, budget)
    except ValueError as error:
        assert "is too small" in str(error)
        return
    assert mean_bits(layers, bits) <= budget
    assert all(2 <= key <= 8 and 1 <= value <= 8 for key, value in bits)


@given(models(), st.sampled_from(BUDGETS[:-1]))
def test_a_larger_budget_is_never_worse(layers, budget):
    try:
        smaller = allocate(layers, budget)
    except ValueError:
        return
    larger = allocate(layers, 8)
    assert expected_divergence(layers, larger) <= expected_divergence(layers, smaller)


@given(st.lists(WEIGHTS, min_size=4, max_size=4), st.sampled_from((2, 3, 4)))
def test_no_other_choice_of_the_same_bytes_is_expected_to_be_better(weights, budget):
    """If a bit takes the same bytes on every side; up to 5 bits, so that all can be tried."""
    layers = [
        Layer(side(weights[0], min_bits=2), side(weights[1])),
        Layer(side(weights[2], min_bits=2), side(weights[3])),
    ]
    chosen = allocate(layers, budget)
    best = min(
        expected_divergence(layers, [(a, b), (c, d)])
        for a, b, c, d in itertools.product(range(2, 9), range(1, 9), range(2, 9), range(1, 9))
        if a + b + c + d <= 4 * budget
    )
    # A greedy choice ends when the next bit does not fit, so at most one bit of one side is left.
    assert best <= expected_divergence(layers, chosen) <= 1.0001 * best


def test_a_side_that_matters_more_has_more_bits():
    layers = [Layer(side(0.1, min_bits=2), side(0.001)), Layer(side(0.001, min_bits=2), side(1e-5))]
    (first_key, first_value), (second_key, second_value) = allocate(layers, 4)
    assert first_key > second_key > second_value and first_key > first_value


def test_with_eight_bits_all_have_eight():
    layers = [Layer(side(0.1, min_bits=2), side(1e-6))] * 3
    assert allocate(layers, 8) == [(8, 8)] * 3


def test_a_side_that_is_fixed_leaves_the_rest_of_the_budget_to_the_other():
    layers = [Layer(side(0.1, min_bits=2), side(0.01)), Layer(side(0.1, min_bits=2), side(0.001))]
    bits = allocate(layers, 4, key_bits=5)
    assert [key for key, _ in bits] == [5, 5]
    assert sum(value for _, value in bits) == 6
    assert allocate(layers, 4, key_bits=3, value_bits=2) == [(3, 2)] * 2


def test_latent_vectors_have_the_bits_of_keys_for_both():
    assert allocate([Layer(side(0.1, 512, 1, min_bits=2), None)], 4) == [(4, 4)]


def test_bits_that_take_no_more_words_than_fewer_ones_are_preferred():
    """Eight values of 2 and of 4 bits take one word, of 3 bits two."""
    layers = [Layer(side(0.1, 8, 1, min_bits=2), None)]
    assert allocate(layers, 4) == [(4, 4)]


@pytest.mark.parametrize("fixed", [{}, {"key_bits": 8, "value_bits": 4}])
def test_a_budget_that_the_fewest_bits_exceed_is_refused(fixed):
    """Forty values of 2 and of 1 bit are padded to 96 and 64 bits: a mean of 2 bits."""
    layers = [Layer(side(0.1, 33, 1, min_bits=2), side(0.1, 33, 1))]
    with pytest.raises(ValueError, match=r"A budget of 2 bits is too small .with .* takes "):
        allocate(layers, 2, **fixed)


@pytest.mark.parametrize("bits", [1.75, 8.25, 3.1, 0, -4, float("nan"), "four", None])
def test_budgets_are_2_to_8_in_quarters(bits):
    with pytest.raises(ValueError, match="bits are not supported: use 2 to 8 in quarters."):
        check_budget(bits)


@pytest.mark.parametrize("bits", [2, 2.25, 4, 7.75, 8])
def test_quarters_are_budgets(bits):
    check_budget(bits)


@given(st.sampled_from(BUDGETS))
def test_the_same_bits_in_all_layers_are_within_the_budget_and_keys_have_more(budget):
    key_bits, value_bits = uniform_bits(budget)
    assert budget - 0.5 < (key_bits + value_bits) / 2 <= budget
    assert key_bits > value_bits or budget > 7.5


def test_divergences_that_were_not_measured_follow_the_error_of_the_codec():
    divergences = divergences_by_bits(64, {2: 0.5, 3: 0.1})
    assert divergences[2:4] == (0.5, 0.1)
    assert divergences[5] == pytest.approx(0.1 * relative_error(64, 5) / relative_error(64, 3))
    assert divergences[1] == pytest.approx(0.5 * relative_error(64, 1) / relative_error(64, 2))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_divergence_of_trellis_codes_follows_their_error(bits):
    x = unit_vectors(256, 96)
    errors = []
    for codec in ("scalar", "trellis"):
        quantizer = TurboQuantizer(96, bits, codec=codec)
        errors.append(mx.square(quantizer.dequantize(quantizer.quantize(x)) - x).sum().item())
    scalar = side(0.1, 96)
    ratio = scalar.coded("trellis").divergences[bits] / scalar.divergences[bits]
    assert ratio == pytest.approx(errors[1] / errors[0], rel=0.06)


def test_more_than_four_bits_have_the_divergence_of_scalar_codes():
    scalar = side(0.1)
    coded = scalar.coded("trellis").divergences
    assert (coded[0], *coded[5:]) == (float("inf"), *scalar.divergences[5:])
    assert list(coded) == sorted(coded, reverse=True)
    layer = Layer(scalar, None)
    assert layer.coded("scalar") == layer
    assert layer.coded("trellis").keys.divergences == coded
