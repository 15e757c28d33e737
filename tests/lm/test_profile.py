import json

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_turboquant.lm.allocation import Vectors
from mlx_turboquant.lm.compressible import Compressible
from mlx_turboquant.lm.profile import (
    Profile,
    find_profile,
    fingerprint,
    load_profile,
    profile_path,
    save_profile,
)

FINGERPRINT = "0123456789abcdef" * 4
NUMBERS = st.floats(1e-9, 10.0)
VECTORS = Vectors(2, 64)


def side(bits: tuple[int, int], numbers=(0.5, 0.1)) -> dict[int, tuple[float, ...]]:
    """Divergences at two numbers of bits for two texts; those of the second are doubled."""
    return {b: (number, 2 * number) for b, number in zip(bits, numbers)}


PROFILE = Profile(FINGERPRINT, ("code", "prose"), 96, (side((2, 3)),), (side((1, 2)),))


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.booleans()), min_size=1))
def test_a_profile_is_loaded_as_it_was_saved(tmp_path_factory, layers):
    keys = tuple(side((2, 3), numbers[:2]) for numbers in layers)
    values = tuple(side((1, 2), numbers[2:4]) if numbers[4] else None for numbers in layers)
    profile = Profile(FINGERPRINT, ("code", "prose"), 96, keys, values)
    file = save_profile(profile, tmp_path_factory.mktemp("profiles") / "new" / "profile.json")
    assert load_profile(file, [FINGERPRINT]) == profile


def test_a_profile_is_found_by_the_fingerprint_of_its_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_profile([FINGERPRINT]) is None
    file = save_profile(PROFILE)
    assert file == profile_path(FINGERPRINT) and tmp_path in file.parents
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    assert find_profile([FINGERPRINT]) == PROFILE
    assert find_profile(["f" * 64]) is None


def test_the_fingerprint_is_that_of_the_model_and_not_of_its_precision(random_model):
    before = fingerprint(random_model)
    random_model.set_dtype(mx.bfloat16)
    # Norms of 1 are the same in any precision; only the rounding of weights differs.
    assert fingerprint(random_model) == before
    random_model.model.norm.weight = random_model.model.norm.weight * 2
    assert fingerprint(random_model) != before


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(fingerprint="f" * 64), "is the profile of another model"),
        (lambda c: c.update(format="0"), "is a profile of version .* calibrate the model again"),
        (lambda c: c.update(codec="0"), "is a profile of version .* calibrate the model again"),
        (lambda c: c.pop("codec"), "is not a profile"),
        (lambda c: c.pop("layers"), "is damaged"),
        (lambda c: c.update(layers=[]), r"is damaged \(a layer has no keys\)"),
        (lambda c: c.update(texts=[]), "its texts have no names"),
        (lambda c: c.update(tokens=-3), "-3 tokens were scored"),
        (lambda c: c["layers"][0].pop("keys"), "a layer has no keys"),
        (lambda c: c["layers"][0]["keys"].pop("2"), "a side was measured at"),
        (lambda c: c["layers"][0]["keys"].update({"3": [0.1]}), "not have one divergence per text"),
        (lambda c: c["layers"][0]["keys"].update({"3": [0.1, "1"]}), "not have one divergence"),
        (lambda c: c["layers"][0]["keys"].update({"3": [0.1, -1.0]}), "not a positive number"),
        (lambda c: c["layers"][0]["keys"].update({"3": [0.1, float("nan")]}), "not a positive"),
    ],
)
def test_a_profile_that_is_damaged_or_foreign_is_refused(tmp_path, change, message):
    file = save_profile(PROFILE, tmp_path / "profile.json")
    contents = json.loads(file.read_text())
    change(contents)
    file.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=message):
        load_profile(file, [FINGERPRINT])


@given(st.binary(max_size=200))
def test_any_other_file_is_refused(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("profiles") / "profile.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="profile.json is not a profile: give a file"):
        load_profile(file, [FINGERPRINT])


def test_a_damaged_profile_in_the_cache_folder_is_ignored_with_a_warning(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_profile(PROFILE).write_text("{")
    assert find_profile([FINGERPRINT]) is None
    assert "A profile is not used: " in caplog.text and "is not a profile" in caplog.text


def test_bits_are_chosen_by_geometric_means_over_the_texts_and_expected_by_arithmetic_ones():
    """Texts of d and 2 d: means of 1.41 d and of 1.5 d."""
    places = [Compressible(0, 0, VECTORS, VECTORS)]
    [allocated] = PROFILE.layers(places, geometric=True)
    [expected] = PROFILE.layers(places, geometric=False)
    assert allocated.keys.divergences[2:4] == pytest.approx((2**0.5 * 0.5, 2**0.5 * 0.1))
    assert expected.keys.divergences[2:4] == pytest.approx((1.5 * 0.5, 1.5 * 0.1))
    assert expected.values.divergences[1:3] == pytest.approx((1.5 * 0.5, 1.5 * 0.1))


def test_a_profile_of_another_number_of_layers_is_refused():
    places = [Compressible(i, i, VECTORS, VECTORS) for i in range(2)]
    with pytest.raises(ValueError, match="has 1 layers and the model 2: calibrate the model again"):
        PROFILE.layers(places, geometric=True)
