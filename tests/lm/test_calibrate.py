import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import variant
from mlx.utils import tree_flatten
from mlx_lm.models.llama import TransformerBlock
from tiny_families import FAMILIES, tiny_model
from tokens import random_tokens

from mlx_turboquant import make_prompt_cache
from mlx_turboquant.lm import calibrate as module
from mlx_turboquant.lm.calibrate import _Rows, calibrate, calibrated, calibration_texts
from mlx_turboquant.lm.compressible import compressible_caches
from mlx_turboquant.lm.loading import prepare_for_device
from mlx_turboquant.lm.profile import fingerprint, save_profile
from mlx_turboquant.measure.evaluate import divergence

TOKENS = random_tokens(256, seed=7).tolist()


class Numbers:
    """A tokenizer of characters below 128, the vocabulary of the random model."""

    def encode(self, text, add_special_tokens=True, verbose=True):
        return [ord(character) % 128 for character in text]


def log_probabilities(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def test_the_bundled_texts_are_of_four_kinds_and_long_enough(tiny_lm):
    texts = calibration_texts()
    assert list(texts) == ["code", "languages", "numbers", "prose"]
    assert all(len(tiny_lm[1].encode(text)) >= 512 for text in texts.values())


def test_a_divergence_is_that_of_the_output_with_one_side_of_one_layer_quantized(random_model):
    """Compared with the cache itself, whose other layer has 8 bits and is nearly exact."""
    [place, _] = compressible_caches(random_model)
    other = random_tokens(300, seed=8).tolist()
    rows = _Rows(random_model, [other, TOKENS], scored=64).divergences(place)
    measured = [texts[1] for texts in rows]
    exact = log_probabilities(random_model(mx.array([TOKENS]))[0, 192:])
    for (key_bits, value_bits), found in zip(((2, 8), (3, 8), (8, 1), (8, 2)), measured):
        cache = make_prompt_cache(random_model, 8, window=0)
        cache[0] = type(cache[0])(key_bits, value_bits, window=0)
        random_model(mx.array([TOKENS[:192]]), cache=cache)
        # All at once, so that they see each other exactly, and the packed tokens of the prefix.
        logits = random_model(mx.array([TOKENS[192:]]), cache=cache)[0]
        expected = divergence(exact, log_probabilities(logits)).mean().item()
        # The last 28 tokens of the prefix are not a whole block, and stay exact in the cache.
        assert 0.6 * found < expected < 1.4 * found


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_below_are_skipped_only_where_that_changes_nothing(family):
    model = tiny_model(family)
    places = compressible_caches(model)
    if not places:
        return
    text = _Rows(model, [[4 * token % 512 for token in TOKENS]] * 2, scored=24)
    # Gemma 3n and 4 hand more from layer to layer than their first argument.
    assert text.can_skip == (family not in ("gemma3n", "gemma4"))
    text.gradients = []
    skipping = [text.divergences(place) for place in places]
    text.can_skip = False
    computing = [text.divergences(place) for place in places]
    assert np.allclose(skipping, computing, rtol=1e-3, atol=1e-6)
    assert np.array(computing).shape == (len(places), 4, 2) and np.max(computing) > 1e-9


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "minicpm3", "falcon_h1"])
def test_a_divergence_is_estimated_from_gradients(family):
    """Within a factor of two: four random directions and 48 tokens are a small sample."""
    model = tiny_model(family)
    text = _Rows(model, [[4 * token % 512 for token in TOKENS]] * 2, scored=24)
    places = compressible_caches(model)
    estimated = np.array([text.divergences(place) for place in places])
    text.gradients = []
    computed = np.array([text.divergences(place) for place in places])
    assert np.allclose(np.log2(estimated / computed), 0, atol=1)
    assert np.log2(estimated / computed).mean() == pytest.approx(0, abs=0.4)


def triangle(x: mx.array) -> mx.array:
    """Of a QR decomposition, which has no gradient in MLX."""
    return mx.linalg.qr(x[0, :2, :2], stream=mx.cpu)[1].sum()


def root_of_zero(x: mx.array) -> mx.array:
    return mx.sqrt(mx.maximum(-mx.abs(x), 0)).sum()


@pytest.mark.parametrize("operation", [triangle, root_of_zero])
def test_the_layers_above_are_computed_where_a_gradient_is_missing_or_infinite(
    random_model, operation
):
    class Layer(TransformerBlock):
        def __call__(self, x: mx.array, *arguments, **keywords) -> mx.array:
            return super().__call__(x, *arguments, **keywords) + 0 * operation(x)

    model = variant(random_model)
    places = compressible_caches(model)
    plain = _Rows(model, [TOKENS], scored=24)
    plain.gradients = []
    model.layers[1].__class__ = Layer
    rows = _Rows(model, [TOKENS], scored=24)
    assert rows.can_skip and not rows.gradients
    for place in places:
        assert np.allclose(rows.divergences(place), plain.divergences(place), rtol=1e-3)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen3_next"])
def test_the_layers_above_are_computed_where_a_change_may_choose_other_experts(family):
    text = _Rows(tiny_model(family), [TOKENS], scored=24)
    assert text.can_skip and not text.gradients


def test_an_output_that_is_not_finite_is_refused(random_model):
    model = variant(random_model)
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, mx.inf)
    with pytest.raises(ValueError, match="The output of the model is not finite with layer 0"):
        calibrate(model, Numbers(), {"a": "some text " * 20})


def test_calibrating_changes_nothing_of_the_model(random_model):
    layers, before = list(random_model.layers), random_model(mx.array([TOKENS[:20]]))
    calibrate(random_model, Numbers(), {"a": "some text " * 20})
    assert list(random_model.layers) == layers and "make_cache" not in vars(random_model)
    assert mx.array_equal(random_model(mx.array([TOKENS[:20]])), before)


def test_a_profile_has_both_sides_of_all_layers_for_every_text(random_model):
    seen = []
    texts = {"one": "a text of the caller " * 20, "other": "another one " * 10}
    profile = calibrate(random_model, Numbers(), texts, lambda *progress: seen.append(progress))
    assert profile.fingerprint == fingerprint(random_model)
    assert profile.texts == ("one", "other") and profile.tokens == 48 + 48
    assert len(profile.keys) == len(profile.values) == 2
    for keys, values in zip(profile.keys, profile.values):
        # One more bit lowers the squared error, and so the divergence, by a factor of 3 to 4.
        assert all(two > 2 * three > 0 for two, three in zip(keys[2], keys[3]))
        assert all(one > 2 * two > 0 for one, two in zip(values[1], values[2]))
    # Two layers: reading counts for both, the four gradients for both, then each layer for itself.
    assert [all for _, all in seen] == [6] * len(seen)
    assert [finished for finished, _ in seen] == [0, 2, 2, 3, 3, 4, 4, 5, 6]


def test_latent_attention_has_no_values_of_its_own():
    profile = calibrate(tiny_model("deepseek_v3"), Numbers(), {"a": "some text " * 20})
    assert profile.values == (None,) * 4 and len(profile.keys) == 4 and profile.bases == ()


def test_a_layer_that_matters_more_weighs_more(random_model):
    """The second layer's output is scaled by 1/100, and so are its errors."""
    model = variant(random_model)
    projection = model.layers[1].self_attn.o_proj
    projection.weight = projection.weight / 100
    profile = calibrate(model, Numbers(), {"a": "some text " * 20})
    for side in (profile.keys, profile.values):
        assert side[0][2][0] > 1000 * side[1][2][0]


def test_bad_input_is_refused(random_model):
    with pytest.raises(ValueError, match="The text book has 63 tokens and calibration needs 64"):
        calibrate(random_model, Numbers(), {"book": "x" * 63})
    with pytest.raises(ValueError, match="No layer of this model can be compressed"):
        calibrate(tiny_model("deepseek_v32"), Numbers())


def test_texts_are_measured_as_if_each_were_alone(random_model, monkeypatch):
    """Six texts make two batches; float32 sums are in another order."""
    monkeypatch.setattr(module, "learned_bases", lambda *_: ())  # those suit all texts together
    texts = {f"text {i}": f"the text number {i}, " * 8 for i in range(6)}
    together = calibrate(random_model, Numbers(), texts)
    for i, (name, text) in enumerate(texts.items()):
        alone = calibrate(random_model, Numbers(), {name: text})
        for one, other in zip(together.keys + together.values, alone.keys + alone.values):
            assert all(np.isclose(one[bits][i], other[bits][0], rtol=1e-2) for bits in one)


def interrupted_after(steps: int):
    """A progress that raises KeyboardInterrupt at a step."""

    def progress(finished: int, all: int) -> None:
        if finished == steps:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_calibration_continues_from_where_it_was(random_model, tmp_path):
    file, seen = tmp_path / "unfinished", []
    expected = calibrate(random_model, Numbers())
    with pytest.raises(KeyboardInterrupt):
        calibrate(random_model, Numbers(), None, interrupted_after(5), file)
    assert file.exists()

    def count(finished: int, all: int) -> None:
        seen.append(finished)

    assert calibrate(random_model, Numbers(), None, count, file) == expected
    assert seen[-3:] == [4, 5, 6]
    file.write_text("{}")  # damaged, or of another version
    assert calibrate(random_model, Numbers(), None, False, file) == expected


def test_an_interruption_before_the_first_layer_leaves_nothing(random_model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        calibrate(random_model, Numbers(), None, interrupted_after(3), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("common", [0.0, 100.0, -100.0])
def test_what_all_logits_have_in_common_changes_no_divergence(random_model, common):
    """Softmax ignores it, and nothing overflows even if the output is destroyed."""
    model = variant(random_model, tie_word_embeddings=False)
    expected = calibrate(model, Numbers())
    head = model.lm_head.weight
    shift = mx.random.normal((1, head.shape[1]), key=mx.random.key(1))
    model.lm_head.weight = head + common * shift
    shifted = calibrate(model, Numbers())
    for one, other in zip(expected.keys + expected.values, shifted.keys + shifted.values):
        # Logits a hundred times as large have rounding errors a hundred times as large.
        assert all(np.allclose(one[bits], other[bits], rtol=0.1, atol=1e-4) for bits in one)


def test_a_profile_that_cannot_be_kept_is_a_warning(random_model, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    blocked = tmp_path / "file" / "profile.json"
    monkeypatch.setattr(
        module, "save_profile", lambda p, file=None: save_profile(p, file or blocked)
    )
    profile = calibrated(random_model, Numbers(), progress=False)
    assert profile == calibrate(random_model, Numbers())
    assert f"not kept for the next start: {tmp_path / 'file'} cannot be written" in caplog.text


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="A GPU multiplies any weights.")
def test_other_weights_are_measured_in_float32_on_a_cpu_and_stay_as_they_are(random_model):
    model = copy.deepcopy(random_model)
    nn.quantize(model, 64, 8)
    model.set_dtype(mx.bfloat16)
    before = dict(tree_flatten(model.parameters()))
    profile = calibrate(model, Numbers())
    after = dict(tree_flatten(model.parameters()))
    assert all(after[name] is array for name, array in before.items())
    assert profile.fingerprint == fingerprint(model)
    assert profile.keys == calibrate(prepare_for_device(model), Numbers()).keys
