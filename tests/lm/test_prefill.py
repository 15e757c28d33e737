"""Attention of a chunk in parts is attention of the chunk, with fewer scores at once."""

from collections.abc import Callable

import mlx.core as mx
import pytest
from conftest import logits, variant
from mlx_lm.models.base import scaled_dot_product_attention
from tiny_families import tiny_model

from mlx_turboquant import make_prompt_cache
from mlx_turboquant.cache.fetched import KVArray, submit_attention
from mlx_turboquant.kernels.tokens import VisibleTokens
from mlx_turboquant.lm import hook, prefill
from mlx_turboquant.lm.prefill import attend_in_parts
from mlx_turboquant.measure.cache_specs import preset
from mlx_turboquant.measure.footprint import footprint

ROWS, COUNT = 100, 300
MASKS = {
    "none": None,
    "causal": "causal",
    "one row": mx.random.normal((2, 1, 1, COUNT), key=mx.random.key(0)) > -1,
    "boolean": mx.random.normal((ROWS, COUNT), key=mx.random.key(1)) > -1,
    "additive": mx.random.normal((2, 4, ROWS, COUNT), key=mx.random.key(2)),
    "a vector": mx.random.normal((COUNT,), key=mx.random.key(3)),
}


# Attention of a chunk looks at the arrays, and only asks whether there are tokens.
EMPTY = VisibleTokens(None, None, 0, mx.zeros((1, 1, 0, 64)), mx.zeros((1, 1, 0, 64)), 0, 0, 0)


class Counted:
    """An attention function that keeps the bytes of the scores of its calls."""

    def __init__(self, attention: Callable[..., mx.array]):
        self.attention = attention
        self.scores: list[int] = []

    def __call__(self, queries, keys, values, **keywords):
        batch, heads, rows, _ = queries.shape
        self.scores.append(batch * heads * rows * keys.shape[2] * queries.itemsize)
        return self.attention(queries, keys, values, **keywords)


@pytest.fixture
def few_scores(monkeypatch):
    """Room for the scores of 33 of the ``ROWS`` queries."""
    room = 2 * 4 * 33 * COUNT * 4
    monkeypatch.setattr(prefill, "scores_nbytes", lambda: room)
    return room


@pytest.fixture
def chunk() -> list[mx.array]:
    shapes = (2, 4, ROWS, 64), (2, 2, COUNT, 64), (2, 2, COUNT, 64)
    return [mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("sinks", [None, mx.array([0.0, 1.0, -1.0, 5.0])], ids=["", "sinks"])
def test_parts_are_the_whole_and_their_scores_fit(few_scores, chunk, mask, sinks):
    attention = Counted(scaled_dot_product_attention)
    settings = {"cache": None, "scale": 0.125, "mask": mask, "sinks": sinks}
    output = attend_in_parts(attention, *chunk, **settings)
    copies, parts = (1, 4) if sinks is None else (2, 7)
    assert len(attention.scores) == parts and max(attention.scores) * copies <= few_scores
    expected = scaled_dot_product_attention(*chunk, **settings)
    # float32 sums over fewer keys, whose weights are zero otherwise.
    assert mx.allclose(output, expected, atol=1e-5)


def test_parts_with_a_causal_mask_read_no_keys_behind_their_queries(few_scores, chunk):
    attention = Counted(scaled_dot_product_attention)
    attend_in_parts(attention, *chunk, mask="causal", cache=None, scale=0.125)
    keys = [nbytes // (2 * 4 * 4 * rows) for nbytes, rows in zip(attention.scores, (32, 32, 32, 4))]
    assert keys == [232, 264, 296, 300]


def test_fused_attention_is_not_divided(few_scores, chunk, monkeypatch):
    monkeypatch.setattr(prefill, "_is_fused", lambda *arguments: True)
    attention = Counted(scaled_dot_product_attention)
    attend_in_parts(attention, *chunk, mask="causal", cache=None, scale=0.125)
    assert len(attention.scores) == 1


def test_a_prompt_that_is_read_in_parts_gives_the_same_logits(random_model, monkeypatch):
    whole = logits(random_model, make_prompt_cache(random_model, key_bits=4, value_bits=4))
    submitted = []

    def submit(output: mx.array) -> None:
        submitted.append(output.shape)
        submit_attention(output)

    monkeypatch.setattr(prefill, "submit_attention", submit)
    # 4 heads, 190 keys of the second chunk, 16 queries at once.
    monkeypatch.setattr(prefill, "scores_nbytes", lambda: 4 * 190 * 4 * 16)
    parts = logits(random_model, make_prompt_cache(random_model, key_bits=4, value_bits=4))
    assert len(submitted) == 2 * (10 + 3) and {rows for _, _, rows, _ in submitted} == {16, 6, 8}
    # float32 sums in another order, and levels on which they decide.
    assert mx.allclose(parts, whole, atol=1e-3)


def test_attention_with_an_unknown_argument_is_not_divided(few_scores, chunk):
    calls = []

    def attention(queries, keys, values, cache, scale, mask, sinks=None, window_size=None):
        calls.append(window_size)
        return scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)

    queries, keys, values = chunk[0], *map(KVArray, chunk[1:])
    keys.tokens = values.tokens = EMPTY
    hook._AttentionHook(attention)(queries, keys, values, None, 0.125, "causal", window_size=20)
    assert calls == [20]


def test_the_workspace_of_a_prompt_has_a_part_of_its_scores(random_model):
    foreseen = footprint(variant(random_model, head_dim=192), preset("4"), memory=16 * 10_000_000)
    short, long = 100, 1_000_000
    assert foreseen.scores_per_token * short < 2 * 10_000_000 < foreseen.scores_per_token * long
    expected = foreseen.nbytes(long) + foreseen.workspace_per_token * long + 2 * 10_000_000
    assert foreseen.prompt_nbytes(long) == expected


@pytest.mark.parametrize("family", ["gemma2", "deepseek_v3"])
def test_scores_that_the_hook_does_not_divide_are_counted_whole(family):
    model = tiny_model(family, head_dim=192)
    foreseen = footprint(model, preset("4"), memory=16)
    assert foreseen.scores_per_token == 0
    heads = model.args.num_attention_heads
    assert foreseen.workspace_per_token >= 2 * 2 * heads * 2048
