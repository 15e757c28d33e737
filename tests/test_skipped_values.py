"""Attention of the study that leaves values out: within its bound, and exact without skipping."""

import mlx.core as mx
import mlx_lm.models.llama
import pytest
from compare_codecs import SINKS
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache
from skipped_values import BLOCK, Skipping, skipping
from tokens import normal


def arrays(spread):
    """Queries, keys and values; all queries of a key head look at the sinks."""
    looked_at, keys = normal((1, 2, 1, 64), 0) * spread, normal((1, 2, 1000, 64), 1)
    queries = mx.repeat(looked_at, 2, axis=1) + normal((1, 4, 2, 64), 3)
    keys[:, :, :SINKS] = looked_at / 9
    return queries, keys, normal((1, 2, 1000, 64), 2)


def attention(rule, queries, keys, values, cache=None, **others):
    """Outputs with a rule and without one, and what was counted."""
    arguments, others = (queries, keys, values, cache or KVCache()), {"mask": "causal", **others}
    ours = Skipping(scaled_dot_product_attention, rule)
    output = ours(*arguments, scale=0.125, **others)
    return output, scaled_dot_product_attention(*arguments, scale=0.125, **others), ours


@pytest.mark.parametrize("rule", ["nats:100", "exact:0", "sinks:0"])
def test_attention_is_exact_where_nothing_is_left_out(rule):
    output, expected, ours = attention(rule, *arrays(1.0))
    assert ours.read == ours.blocks == 2 * 2 * ((1000 - SINKS - 128) // BLOCK)
    assert mx.allclose(output, expected, atol=1e-5)  # rounding of float32 sums


@pytest.mark.parametrize("rule", ["exact:0.2", "sinks:0.2", "nats:8"])
def test_what_is_left_out_is_within_the_bound(rule):
    queries, keys, values = arrays(4.0)
    output, expected, ours = attention(rule, queries, keys, values)
    assert 0 < ours.read < ours.blocks
    # At most 0.2 of the weights, each with a value less the mean.
    assert 0 < mx.abs(output - expected).max().item() < 0.2 * mx.abs(values).max().item()


def test_many_blocks_leave_out_no_more_together_than_few():
    """The bound of a block falls with their number."""
    weights = mx.ones((1, 1, 1, 10, BLOCK)) * 0.01
    ours = Skipping(scaled_dot_product_attention, "sinks:0.1")
    known = mx.full((1, 1, 1, SINKS), 8.0)  # 32 in all: a block of 0.32 is a tenth of a tenth
    assert ours._counts_for_nothing(weights, known, mx.zeros((1, 1, 1, 128))).all()
    assert not ours._counts_for_nothing(1.01 * weights, known, mx.zeros((1, 1, 1, 128))).any()


def test_recent_tokens_count_for_exact_and_not_for_sinks():
    weights, sinks = mx.full((1, 1, 1, 1, BLOCK), 0.01), mx.zeros((1, 1, 1, SINKS))
    found = [
        Skipping(scaled_dot_product_attention, rule)
        ._counts_for_nothing(weights, sinks, mx.ones((1, 1, 1, 128)))
        .item()
        for rule in ("exact:0.1", "sinks:0.1", "nats:4", "nats:5")
    ]
    assert found == [True, False, True, False]


def test_a_block_that_one_query_head_looks_at_is_read():
    queries, keys, values = arrays(4.0)
    keys[:, :, 500] = queries[:, 1:2, 0] / 9  # of both key heads, as the first one sees it
    few = attention("exact:0.2", queries, keys, values)[2].read
    keys[:, :, 500] = 0
    assert few > attention("exact:0.2", queries, keys, values)[2].read


def test_bounded_caches_stay_exact_and_other_attention_is_refused():
    queries, keys, values = arrays(4.0)
    output, expected, ours = attention("exact:9", queries, keys, values, RotatingKVCache(1000))
    assert ours.blocks == 0 and mx.array_equal(output, expected)
    for others in ({"mask": mx.ones((2, 1000), mx.bool_)}, {"sinks": mx.zeros(4)}):
        with pytest.raises(ValueError, match="Only causal attention of one sequence is known"):
            attention("exact:0.1", queries, keys, values, **others)
    with pytest.raises(ValueError, match="'foo:3' is not a rule: use nats:8"):
        attention("foo:3", queries, keys, values)


def test_attention_of_the_models_is_replaced_and_put_back():
    before = mlx_lm.models.llama.scaled_dot_product_attention
    with skipping("nats:8") as replaced:
        assert mlx_lm.models.llama.scaled_dot_product_attention is replaced
    assert mlx_lm.models.llama.scaled_dot_product_attention is before
