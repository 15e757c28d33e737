"""The identity of a model's weights: every bit counts, and nothing but the weights."""

import copy
import gc
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from adapters import adapter_folder
from conftest import REPOSITORY, variant
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tuner.utils import load_adapters, remove_lora_layers
from tiny_families import FAMILIES, tiny_model

from mlx_turboquant.lm import identity
from mlx_turboquant.lm.identity import Weights, description

TINY_LM = str(REPOSITORY / "examples" / "tiny-lm")


class OneArray(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = x


def identity_of(model) -> str:
    return Weights(model).identity()


def identity_of_bytes(content: bytes, count: int) -> str:
    """The identity of one array whose sums have ``count`` words each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "_WORDS", count)
        patch.setattr(identity, "_SUMS", 2)
        return identity_of(OneArray(mx.array(np.frombuffer(content, np.uint8))))


CONTENTS = st.binary(min_size=1, max_size=60)
PLACES = st.integers(0, 10**6)


COUNTS = st.sampled_from([4, 64])  # many sums, and one


@given(CONTENTS, COUNTS, PLACES, st.integers(0, 7))
def test_every_bit_counts(content, count, place, bit):
    changed = bytearray(content)
    changed[place % len(content)] ^= 1 << bit
    assert identity_of_bytes(bytes(changed), count) != identity_of_bytes(content, count)


@given(CONTENTS, COUNTS, PLACES, PLACES, st.sampled_from([1, 2, 4]))
def test_the_place_of_every_word_counts(content, count, first, second, width):
    words = [content[i : i + width] for i in range(0, len(content) - width + 1, width)]
    if words:
        a, b = first % len(words), second % len(words)
        words[a], words[b] = words[b], words[a]
    swapped = b"".join(words) + content[width * len(words) :]
    identities = {identity_of_bytes(each, count) for each in (swapped, content)}
    assert len(identities) == (1 if swapped == content else 2)


def test_words_that_differ_in_the_highest_bit_alone_cannot_be_swapped():
    """Two numbers of opposite sign: odd multiples of 2^31 are equal modulo 2^32."""
    identities = {identity_of(OneArray(mx.array(x))) for x in ([1.0, -1.0], [-1.0, 1.0])}
    assert len(identities) == 2


@pytest.mark.parametrize(
    "x",
    [
        mx.zeros((4,), mx.float16),
        mx.zeros((4,), mx.bfloat16),
        mx.zeros((2, 2), mx.float16),
        mx.zeros((5,), mx.float16),
        mx.zeros((0,), mx.float16),
        mx.zeros((), mx.float16),
        mx.zeros((4,), mx.bool_),
        mx.zeros((4,), mx.complex64),
    ],
)
def test_shape_and_dtype_count(x):
    others = [mx.zeros((4,), mx.uint16), mx.zeros((4, 1), mx.float16), mx.zeros((6,), mx.float16)]
    assert identity_of(OneArray(x)) not in {identity_of(OneArray(other)) for other in others}
    assert identity_of(OneArray(x)) == identity_of(OneArray(mx.array(x)))


def test_a_view_that_is_not_contiguous_has_the_identity_of_its_values():
    x = mx.arange(35, dtype=mx.uint8).reshape(5, 7)
    assert identity_of(OneArray(x.T)) == identity_of(OneArray(mx.contiguous(x.T)))
    assert identity_of(OneArray(x.T)) != identity_of(OneArray(x.reshape(7, 5)))


def test_the_weights_are_the_same_in_another_process_and_loaded_lazily():
    code = (
        "import mlx_lm; from mlx_turboquant.lm.identity import Weights; "
        f"model, _ = mlx_lm.load({TINY_LM!r}); print(Weights(model).identity())"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    model, _ = mlx_lm.load(TINY_LM, lazy=True)
    assert printed.split() == [identity_of(model)]


def test_a_copy_has_the_same_identity_and_large_arrays_of_its_own():
    model = OneArray(mx.zeros((1 << 16,)))
    weights, copied = Weights(model), copy.deepcopy(model)
    assert Weights(copied).identity() == weights.identity()
    assert weights.are_of(model) and not weights.are_of(copied)


@pytest.mark.parametrize("family", FAMILIES)
def test_running_a_model_of_any_family_leaves_its_weights_what_they_are(family):
    """Gemma 3n clips some of its weights at every call."""
    model = tiny_model(family)
    mx.eval(model(mx.ones((1, 5), mx.int32)))
    weights, before = Weights(model), identity_of(model)
    mx.eval(model(mx.ones((1, 5), mx.int32)))
    gc.collect()
    assert weights.are_of(model) and weights.identity() == before == identity_of(model)


def test_adapters_another_precision_a_fine_tune_and_the_configuration_are_told_apart(
    random_model, tmp_path
):
    def changed(change):
        model = copy.deepcopy(random_model)
        change(model)
        return identity_of(model)

    def fine_tune(model):
        weight = model.layers[1].mlp.up_proj.weight
        model.layers[1].mlp.up_proj.weight = weight.at[3, 5].add(1e-6)

    adapters = [adapter_folder(tmp_path / str(seed), random_model, seed) for seed in (1, 2)]

    def scale(model):
        load_adapters(model, adapters[0])
        model.layers[0].self_attn.q_proj.scale *= 2

    identities = [
        identity_of(random_model),
        changed(fine_tune),
        changed(lambda model: nn.quantize(model, bits=4)),
        changed(lambda model: nn.quantize(model, bits=8)),
        changed(lambda model: model.set_dtype(mx.bfloat16)),
        changed(lambda model: load_adapters(model, adapters[0])),
        changed(lambda model: load_adapters(model, adapters[1])),
        changed(scale),
    ]
    other = variant(random_model, rope_theta=5.0)
    other.update(random_model.parameters())
    assert len({*identities, identity_of(other)}) == len(identities) + 1


def test_weights_are_others_with_adapters_and_the_same_again_without(random_model, tmp_path):
    folder = adapter_folder(tmp_path / "adapter", random_model)
    weights = Weights(random_model)
    load_adapters(random_model, folder)
    assert not weights.are_of(random_model)
    assert weights.identity() != identity_of(random_model)  # of the arrays that it was made for
    assert description(random_model) == "llama with 2 layers and adapters"
    remove_lora_layers(random_model)
    assert weights.are_of(random_model)
    assert description(random_model) == "llama with 2 layers"


def test_an_adapter_that_changes_nothing_has_an_identity(random_model, tmp_path):
    load_adapters(random_model, adapter_folder(tmp_path / "empty", random_model, None))
    assert identity_of(random_model) == identity_of(copy.deepcopy(random_model))


def test_weights_that_are_gone_without_having_been_read_are_refused():
    model = OneArray(mx.zeros((1 << 16,)))
    weights = Weights(model)
    model.x = model.x + 1
    gc.collect()
    with pytest.raises(ValueError, match="have changed since this cache was made"):
        weights.identity()


def test_what_is_no_array_or_has_no_values_is_no_obstacle():
    class Odd(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.mixed = [mx.zeros((0, 3)), number, None, mx.array(True)]
            self.x = mx.ones((3,))

    assert identity_of(Odd(1)) == identity_of(Odd(1)) != identity_of(Odd(2))
    assert Weights(model := Odd(1)).are_of(model)
