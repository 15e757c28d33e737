import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import variant
from tiny_families import tiny_model
from tokens import normal, random_tokens

from mlx_turboquant.codec.basis import Basis
from mlx_turboquant.codec.quantizer import TurboQuantizer
from mlx_turboquant.kernels.storage import shared_quantizer
from mlx_turboquant.lm import axes
from mlx_turboquant.lm.calibrate import calibration_texts
from mlx_turboquant.lm.compressible import compressible_caches, plain_caches
from mlx_turboquant.lm.texts import encode

DIM, HEADS = 64, 2
ROPE = nn.RoPE(DIM, base=10_000)
# Before the rotary embedding, dimensions differ by a factor of 64.
DEVIATIONS = mx.array(2 ** np.linspace(3, -3, DIM), mx.float32)


def vectors(count: int, seed: int, place: int, heads: int = HEADS) -> mx.array:
    """Keys or queries of two texts, (2, heads, count, DIM), from a place on."""
    return ROPE(normal((2, heads, count, DIM), seed) * DEVIATIONS, offset=place)


def score_error(quantizer: TurboQuantizer, keys: mx.array, queries: mx.array) -> float:
    error = quantizer.dequantize(quantizer.quantize(keys)) - keys
    return mx.square(queries @ error.swapaxes(-1, -2)).mean().item()


def bases_of(model: nn.Module, tokens: mx.array) -> tuple[Basis | None, ...]:
    caches, places = plain_caches(model), compressible_caches(model)
    with axes.watched(model) as watch:
        for part in mx.split(tokens, 2, axis=1):
            model(part, cache=caches)
    return axes.learned_bases(tokens, places, caches, watch)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("place", [0, 900, 20_000])
def test_a_basis_lowers_the_error_of_scores_at_any_place(place, bits):
    """Keys of 512 tokens at the beginning of a text; judged are others, there and far away."""
    basis = axes.suitable_basis(vectors(512, 0, 0), vectors(512, 1, 0), ROPE)
    keys, queries = vectors(256, 2, place), vectors(64, 3, place)
    own = score_error(TurboQuantizer(DIM, bits, basis=basis), keys, queries)
    assert own < 0.6 * score_error(shared_quantizer(DIM, bits, 0), keys, queries)


def test_moments_are_means_over_all_turns():
    keys, queries = vectors(64, 0, 0), vectors(32, 1, 0)
    keys = keys - keys.mean(axis=2, keepdims=True)
    turns = axes.turns(ROPE, DIM, [0, 7, 3000])
    turned = axes.moments(keys, queries).turned(turns)
    for found, x in ((turned.keys, keys), (turned.queries, queries)):
        moments = [np.array(x, np.float64) @ turn for turn in turns]
        expected = np.mean([y.swapaxes(2, 3) @ y / y.shape[2] for y in moments], axis=(0, 1))
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)  # rounding of float32


def test_a_basis_with_larger_errors_than_a_random_rotation_is_left_out(monkeypatch):
    keys, queries = vectors(512, 0, 0), vectors(512, 1, 0)
    assert axes.suitable_basis(keys, queries, ROPE) is not None

    def bad(covariances: np.ndarray, queries: np.ndarray) -> Basis:
        return axes_of(np.linalg.inv(covariances), np.linalg.inv(queries))

    axes_of = axes.learned_basis
    monkeypatch.setattr(axes, "learned_basis", bad)
    assert axes.suitable_basis(keys, queries, ROPE) is None


def test_keys_of_rank_1_have_a_basis_that_is_no_worse():
    line = normal((1, 1, 1, DIM), 9)
    keys, others = (normal((2, HEADS, 512, 1), seed) * line for seed in (0, 2))
    queries = normal((2, HEADS, 512, DIM), 1)
    basis = axes.suitable_basis(ROPE(keys), ROPE(queries), ROPE)
    own = score_error(TurboQuantizer(DIM, 3, basis=basis), ROPE(others), queries)
    assert own < score_error(shared_quantizer(DIM, 3, 0), ROPE(others), queries)


def test_infinite_keys_have_no_basis():
    assert (
        axes.suitable_basis(mx.full((2, HEADS, 512, DIM), mx.inf), vectors(9, 1, 0), ROPE) is None
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "falcon_h1"])
def test_layers_have_bases_where_a_rotary_embedding_makes_their_keys(family):
    model = tiny_model(family)
    places = compressible_caches(model)
    dims = [place.keys.dim for place in places]
    ropes = [type(module) for module in model.modules()]
    bases = bases_of(model, random_tokens(2, 512, vocabulary=512)) or (None,) * len(places)
    assert [type(module) for module in model.modules()] == ropes
    for dim, place, basis in zip(dims, places, bases):
        if dim % 32:
            assert basis is None
        elif basis is not None:
            assert basis.axes.shape == (place.keys.heads, dim, dim)


class PickyRoPE(nn.RoPE):
    """A rotary embedding for few texts at once."""

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        if x.shape[0] > 8:
            raise TypeError("many texts")
        return super().__call__(x, offset)


@pytest.mark.parametrize("embedding", ["another function", "picky"])
def test_a_layer_whose_keys_are_made_otherwise_has_no_basis(tiny_lm, embedding):
    model, tokenizer = variant(tiny_lm[0]), tiny_lm[1]
    texts = encode(tokenizer, calibration_texts().values())
    tokens = mx.array([text[:512] for text in texts])
    *others, last = bases_of(model, tokens)
    assert last is not None
    rope = model.layers[-1].self_attn.rope
    model.layers[-1].self_attn.rope = {
        "another function": lambda x, offset: rope(x, offset=offset) * 0.5,
        "picky": PickyRoPE(rope.dims, rope.traditional, rope.base, rope.scale),
    }[embedding]
    assert bases_of(model, tokens) == (*others, None)


def test_texts_with_few_different_tokens_give_no_bases(random_model, caplog):
    assert bases_of(random_model, mx.zeros((2, 512), mx.int32)) == ()
    assert "the texts begin with 1 different tokens and need 64" in caplog.text
