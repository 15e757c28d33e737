import mlx.core as mx
import pytest
from broken_models import add_key_offsets, add_outlier_channels
from conftest import variant
from mlx_lm.models import llama
from tiny_families import FAMILIES, tiny_model
from tokens import normal

from mlx_turboquant import disable, enable
from mlx_turboquant.codec.codebook import relative_error
from mlx_turboquant.codec.quantizer import TurboQuantizer
from mlx_turboquant.lm.compressible import compressible_caches
from mlx_turboquant.lm.sensitivity import key_sensitivities, key_sensitivity

DIM = 64


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_the_sensitivity_is_what_quantizing_keys_does_to_the_weights(bits):
    """Averaged over rotations, to second order in the error, which is small but not zero."""
    queries, keys = normal((1, 4, 8, DIM)), normal((1, 2, 200, DIM), 1)

    def weights(keys):
        grouped = mx.unflatten(queries, 1, (2, 2)) * DIM**-0.5
        scores = grouped @ keys[:, :, None].swapaxes(-1, -2)
        visible = mx.arange(200) <= mx.arange(192, 200)[:, None]
        return mx.softmax(mx.where(visible, scores, -1e30), axis=-1)

    exact, divergence, seeds = weights(keys), 0.0, 12
    for seed in range(seeds):
        quantizer = TurboQuantizer(DIM, bits, seed=seed, scale="none", gain_search=False)
        moved = weights(quantizer.dequantize(quantizer.quantize(keys)))
        terms = mx.where(exact > 0, exact * mx.log(exact / moved), 0)
        divergence += terms.sum(axis=-1).mean().item() / seeds
    expected = key_sensitivity(queries, keys, DIM**-0.5).item() * relative_error(DIM, bits)
    assert divergence == pytest.approx(expected, rel=0.15)


def test_a_common_offset_of_the_keys_is_nothing_and_larger_keys_are_more_sensitive():
    """The mean that is removed contains that of the random keys as well as the offset."""
    queries, keys = normal((1, 4, 8, DIM)), normal((1, 2, 200, DIM), 1)
    plain = key_sensitivity(queries, keys, 0.1).item()
    assert key_sensitivity(queries, keys + 30, 0.1).item() == pytest.approx(plain, rel=0.05)
    assert key_sensitivity(queries, 2 * keys, 0.1).item() > 2 * plain


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_a_sensitivity_and_the_attention_is_left_as_it_was(family):
    model = tiny_model(family)
    places = compressible_caches(model)
    sensitivities = key_sensitivities(model, places)
    assert len(sensitivities) == len(places) and min(sensitivities, default=0) >= 0
    # Softcapped attention is the model's own.
    seen = family not in ("gemma2", "deepseek_v32")
    assert (max(sensitivities, default=0) > 0) == seen
    logits = model(mx.ones((1, 5), mx.int32))
    assert mx.array_equal(logits, tiny_model(family)(mx.ones((1, 5), mx.int32)))


def test_sensitivities_are_the_same_for_an_enabled_model(random_model):
    places = compressible_caches(random_model)
    before = key_sensitivities(random_model, places)
    enable(random_model, 4)
    assert key_sensitivities(random_model, compressible_caches(random_model)) == before
    original = llama.scaled_dot_product_attention
    disable(random_model)
    assert llama.scaled_dot_product_attention is not original


def test_layers_with_outlier_channels_are_more_sensitive(random_model):
    model = variant(random_model)
    before = key_sensitivities(model, compressible_caches(model))
    add_outlier_channels(model, 30.0)
    after = key_sensitivities(model, compressible_caches(model))
    assert all(new > 2 * old for old, new in zip(before, after))


def test_offsets_of_the_keys_change_no_sensitivity_by_much(random_model):
    model = variant(random_model)
    before = key_sensitivities(model, compressible_caches(model))
    add_key_offsets(model, 20.0)
    after = key_sensitivities(model, compressible_caches(model))
    assert all(new < 2 * old for old, new in zip(before, after))
