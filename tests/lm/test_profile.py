import json
import shutil
from hashlib import sha256
from types import SimpleNamespace

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokens import basis_of

from mlx_turboquant.codec.basis import Basis
from mlx_turboquant.files import write_whole
from mlx_turboquant.lm.allocation import Vectors
from mlx_turboquant.lm.compressible import Compressible
from mlx_turboquant.lm.profile import (
    Profile,
    find_profile,
    fingerprint,
    load_profile,
    profile_path,
    save_profile,
    unfinished_path,
)
from mlx_turboquant.stored_arrays import room_for_checksums

FINGERPRINT = "0123456789abcdef" * 4
NUMBERS = st.floats(1e-9, 10.0)
BASES = st.sampled_from([None, *(basis_of(64, 2, 2, seed) for seed in range(2))])
VECTORS = Vectors(2, 64)


def side(bits: tuple[int, int], numbers=(0.5, 0.1)) -> dict[int, tuple[float, ...]]:
    """Divergences at two numbers of bits for two texts; those of the second are doubled."""
    return {b: (number, 2 * number) for b, number in zip(bits, numbers)}


PROFILE = Profile(FINGERPRINT, ("code", "prose"), 96, (side((2, 3)),), (side((1, 2)),))
WITH_BASIS = PROFILE._replace(bases=(basis_of(64, 2, 2),))


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.booleans(), BASES), min_size=1),
    st.booleans(),
)
def test_a_profile_is_loaded_as_it_was_saved(tmp_path_factory, layers, has_bases):
    keys = tuple(side((2, 3), numbers[:2]) for numbers in layers)
    values = tuple(side((1, 2), numbers[2:4]) if numbers[4] else None for numbers in layers)
    bases = tuple(layer[5] for layer in layers) if has_bases else ()
    profile = Profile(FINGERPRINT, ("code", "prose"), 96, keys, values, bases)
    file = save_profile(profile, tmp_path_factory.mktemp("profiles") / "new" / "profile.json")
    assert load_profile(file, [FINGERPRINT]) == profile


def test_bases_are_in_a_file_beside_the_profile_and_go_with_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = save_profile(WITH_BASIS)
    beside = file.with_suffix(".safetensors")
    assert sorted(file.parent.iterdir()) == [file, beside]
    arrays, about = mx.load(str(beside), return_metadata=True)
    assert set(arrays) == {"0.axes", "0.weights"} and about["bases_of"] == FINGERPRINT
    assert json.loads(file.read_text())["bases"] == sha256(beside.read_bytes()).hexdigest()
    # An interrupted calibration has no bases, and leaves those of the profile alone.
    save_profile(PROFILE, unfinished_path(FINGERPRINT))
    assert find_profile([FINGERPRINT]) == WITH_BASIS
    save_profile(PROFILE)
    assert list(file.parent.iterdir()) == [file]
    assert find_profile([FINGERPRINT]) == PROFILE


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


def rewritten(beside, change) -> None:
    """Change the arrays of a file of bases, and write it with its checksum in the profile."""
    arrays, about = mx.load(str(beside), return_metadata=True)
    change(arrays, about)
    about["checksums"] = room_for_checksums(sum(x.nbytes for x in arrays.values()))
    write_whole(beside, lambda path: mx.save_safetensors(str(path), arrays, about))
    file = beside.with_suffix(".json")
    new = sha256(beside.read_bytes()).hexdigest()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bases": new}))


def other_shape(arrays, about):
    arrays["0.axes"] = arrays["0.axes"][:, :32, :32]


def no_inverse(arrays, about):
    arrays["0.axes"] = mx.zeros_like(arrays["0.axes"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda beside: beside.unlink(), "it is missing"),
        (lambda beside: beside.write_bytes(beside.read_bytes()[:-4]), "it has changed since"),
        (lambda beside: beside.write_bytes(b""), "it has changed since"),
        (
            lambda beside: rewritten(beside, lambda _, about: about.update(bases_of="f" * 64)),
            "it belongs to another model, with fingerprint ffff",
        ),
        (lambda beside: rewritten(beside, lambda x, _: x.pop("0.axes")), "Axes or weights of a"),
        (lambda beside: rewritten(beside, other_shape), "Arrays of shapes .* are no basis"),
        (lambda beside: rewritten(beside, no_inverse), "Axes of a basis have no inverse"),
        (
            lambda beside: rewritten(beside, lambda x, _: x.update({"1.axes": x["0.axes"]})),
            "it has 1.axes and the profile 1 layers",
        ),
    ],
)
def test_bases_that_are_missing_damaged_or_foreign_are_refused(
    tmp_path, monkeypatch, caplog, change, message
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = save_profile(WITH_BASIS)
    beside = file.with_suffix(".safetensors")
    change(beside)
    whole = rf"{beside}, the axes of {file}, cannot be used \({message}.*\): copy both files"
    with pytest.raises(ValueError, match=whole + ", or calibrate the model again") as error:
        load_profile(file, [FINGERPRINT])
    assert ".)" not in str(error.value)
    assert find_profile([FINGERPRINT]) is None
    assert "A profile is not used: " in caplog.text
    save_profile(WITH_BASIS)  # replaces a damaged file
    assert find_profile([FINGERPRINT]) == WITH_BASIS


def test_bases_of_another_calibration_are_refused(tmp_path):
    other = PROFILE._replace(bases=(basis_of(64, 2, 2, seed=1),))
    files = [
        save_profile(x, tmp_path / name) for x, name in ((WITH_BASIS, "a.json"), (other, "b.json"))
    ]
    shutil.copy(*(file.with_suffix(".safetensors") for file in files))
    with pytest.raises(ValueError, match="it has changed since, or belongs to another profile"):
        load_profile(files[1], [FINGERPRINT])


@pytest.mark.parametrize("profile", [PROFILE, WITH_BASIS])
def test_weights_with_the_name_of_bases_are_never_overwritten(tmp_path, profile):
    weights = tmp_path / "model.safetensors"
    mx.save_safetensors(str(weights), {"weight": mx.ones(3)}, {"format": "mlx"})
    before = weights.read_bytes()
    if profile.bases:
        with pytest.raises(ValueError, match="exists and is not a file of axes .*: use another"):
            save_profile(profile, tmp_path / "model.json")
        with pytest.raises(ValueError, match="is no name for a profile: use one that ends"):
            save_profile(profile, weights)
    else:
        save_profile(profile, tmp_path / "model.json")
    assert weights.read_bytes() == before


def test_a_machine_that_holds_a_part_of_the_heads_gets_their_bases():
    basis = basis_of(64, 4, 2)
    machine = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    places = [Compressible(i, i, Vectors(heads, 64), VECTORS) for i, heads in enumerate((2, 4, 3))]
    profile = PROFILE._replace(bases=(basis, basis, basis))
    part, whole, neither = profile.bases_of(places, machine)
    assert part == Basis(basis.axes[2:], basis.weights[2:])
    assert whole is basis and neither is None
    with pytest.raises(ValueError, match="4 heads of 64 values and the keys of layer 0 have 2"):
        profile.bases_of(places, None)


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
