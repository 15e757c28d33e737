import logging

import mlx.core as mx
import pytest
from conftest import mean_bits, profile_of, variant
from tokens import basis_of

from mlx_turboquant import enable, make_prompt_cache
from mlx_turboquant.lm.allocation import allocate
from mlx_turboquant.lm.compression import compression_of, treat_layers_alike
from mlx_turboquant.lm.profile import save_profile
from mlx_turboquant.lm.settings import Settings


def bits(cache) -> list[tuple[int, int]]:
    return [(layer.key_bits, layer.value_bits) for layer in cache]


def test_the_layers_of_a_profile_get_bits_by_their_weight(random_model):
    cache = make_prompt_cache(random_model, 4, profile=profile_of(random_model, 0.1, 0.0001))
    (first_key, first_value), (second_key, second_value) = bits(cache)
    assert first_key > second_key and first_value > second_value
    assert first_key + first_value + second_key + second_value == 16


def test_a_profile_that_was_given_once_is_kept(random_model):
    profile = profile_of(random_model, 0.1, 0.0001)
    first = bits(make_prompt_cache(random_model, 4, profile=profile))
    assert bits(make_prompt_cache(random_model, 4)) == first
    enable(random_model, 4)
    assert bits(random_model.make_cache()) == first
    opposite = profile_of(random_model, 0.0001, 0.1)
    assert bits(make_prompt_cache(random_model, 4, profile=opposite)) == first[::-1]


def test_a_profile_in_the_cache_folder_or_in_a_file_is_used(random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    profile = profile_of(random_model, 0.1, 0.0001)
    expected = bits(make_prompt_cache(variant(random_model), 4, profile=profile))
    save_profile(profile)
    assert bits(make_prompt_cache(random_model, 4)) == expected
    file = save_profile(profile_of(random_model, 0.0001, 0.1), tmp_path / "other.json")
    assert bits(make_prompt_cache(random_model, 4, profile=file)) == expected[::-1]


def test_a_profile_of_another_model_is_refused(random_model, tmp_path):
    profile = profile_of(random_model, 0.1, 0.1)
    file = save_profile(profile._replace(fingerprint="f" * 64), tmp_path / "profile.json")
    with pytest.raises(ValueError, match="is the profile of another model"):
        make_prompt_cache(random_model, 4, profile=file)


def test_the_keys_of_a_layer_are_coded_in_the_basis_of_the_profile(random_model):
    profile = profile_of(random_model, 0.1, 0.1, seed=0)
    cache = make_prompt_cache(random_model, 4, profile=profile)
    assert [layer.settings.basis for layer in cache] == list(profile.bases)
    assert make_prompt_cache(random_model, 4, uniform=True)[0].settings.basis is None


def test_a_basis_of_other_keys_is_refused(random_model):
    first, second = profile_of(random_model, 0.1, 0.1, seed=0).bases
    for heads, dim, bases in (
        (1, 64, (first, basis_of(64, 1, 2))),
        (2, 32, (basis_of(32, 2, 2), second)),
    ):
        profile = profile_of(random_model, 0.1, 0.1)._replace(bases=bases)
        expected = (
            rf"a basis for {heads} heads of {dim} values and the keys of layer . have 2 heads"
        )
        with pytest.raises(ValueError, match=expected + " of 64: calibrate the model again"):
            enable(random_model, 4, profile=profile)


@pytest.mark.parametrize("budget", [2, 2.25, 3, 3.75, 4.5, 8])
def test_without_a_profile_the_budget_is_kept_as_well_and_keys_have_more(random_model, budget):
    pairs = bits(make_prompt_cache(random_model, budget))
    assert mean_bits(compression_of(random_model).plan().layers, pairs) <= budget
    assert all(key >= value for key, value in pairs)


def test_without_a_profile_a_layer_with_more_sensitive_keys_gets_more(random_model):
    model = variant(random_model)
    projection = model.layers[0].self_attn.k_proj
    projection.weight = 30 * projection.weight
    (first, _), (second, _) = bits(make_prompt_cache(model, 4))
    assert first > second


def test_one_line_says_what_a_profile_would_bring(random_model, caplog):
    with caplog.at_level(logging.INFO, "mlx_turboquant"):
        make_prompt_cache(random_model, 4)
        make_prompt_cache(random_model, 4)
    [line] = [record.message for record in caplog.records if "profile" in record.message]
    assert "`mlx_turboquant calibrate` measures where bits matter" in line


def test_a_budget_that_is_expected_to_harm_is_warned_of_with_one_that_would_do(
    random_model, caplog
):
    model_profile = profile_of(random_model, 0.2, 0.2)
    make_prompt_cache(random_model, 8, profile=model_profile)
    assert not caplog.text
    make_prompt_cache(random_model, 2)
    [line] = [record.message for record in caplog.records]
    assert line.startswith("With 2 bits the expected divergence is 0.")
    assert line.endswith("nats: use 3 bits to stay below 0.05.")


def test_a_budget_of_trellis_codes_is_chosen_and_warned_of_by_their_error(random_model, caplog):
    profile = profile_of(random_model, 0.3, 0.2)
    cache = make_prompt_cache(random_model, 2.5, profile=profile, codec="trellis")
    assert [layer.codec for layer in cache] == ["trellis"] * 2
    layers = [layer.coded("trellis") for layer in compression_of(random_model).plan().layers]
    assert bits(cache) == allocate(layers, 2.5)
    make_prompt_cache(random_model, 2.5)
    trellis, scalar = (float(each.message.split()[7]) for each in caplog.records)
    assert 0.6 < trellis / scalar < 0.8


def test_the_same_bits_in_all_layers_need_nothing_of_the_model(random_model):
    assert bits(make_prompt_cache(random_model, 4, uniform=True)) == [(5, 3)] * 2
    assert bits(make_prompt_cache(random_model, key_bits=6, value_bits=2)) == [(6, 2)] * 2
    assert bits(make_prompt_cache(random_model, 3, uniform=True, value_bits=4)) == [(4, 4)] * 2


def test_a_side_that_is_fixed_is_the_same_in_all_layers(random_model):
    cache = make_prompt_cache(random_model, 4, key_bits=5)
    assert bits(cache) == [(5, 3)] * 2


def test_layers_that_are_treated_alike_are_not_computed(random_model):
    """The weights of this model would take terabytes."""
    model = variant(random_model, vocab_size=2**31 - 1)
    mx.reset_peak_memory()
    treat_layers_alike(model)
    pairs = bits(make_prompt_cache(model, 4))
    assert mean_bits(compression_of(model).plan().layers, pairs) == 4
    assert mx.get_peak_memory() < 2**30


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bits": 3.1}, "3.1 bits are not supported: use 2 to 8 in quarters"),
        ({"bits": "four"}, "'four' bits are not supported"),
        ({"value_bits": 9}, "9 bits per value are not supported"),
        ({"window": -1}, "A window of -1 is not possible"),
        ({"codec": "huffman"}, "Codec 'huffman' is not known: use one of scalar, trellis."),
    ],
)
def test_settings_that_are_not_possible_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)
