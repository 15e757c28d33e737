"""Attention of the study that leaves values out: within its bound, and exact without skipping."""

import mlx.core as mx
import mlx_lm.models.llama
import pytest
from mlx_lm.models.base import scaled_dot_product_attention
from skipped_values import BLOCK, SINKS, Skipping, skipping
from tokens import normal


def attention(rule, spread=1.0):
    """Outputs with a rule and without one, and what was counted."""
    looked_at, keys = normal((1, 2, 1, 64), 0) * spread, normal((1, 2, 1000, 64), 1)
    queries = mx.repeat(looked_at, 2, axis=1) + normal((1, 4, 2, 64), 3)
    keys[:, :, :SINKS] = looked_at / 9
    arguments = (queries, keys, normal((1, 2, 1000, 64), 2), None)
    ours = Skipping(scaled_dot_product_attention, rule)
    output = ours(*arguments, scale=0.125, mask="causal")
    return output, scaled_dot_product_attention(*arguments, scale=0.125, mask="causal"), ours


@pytest.mark.parametrize("rule", ["nats:100", "exact:0", "sinks:0"])
def test_attention_is_exact_where_nothing_is_left_out(rule):
    output, expected, ours = attention(rule)
    assert ours.read == ours.blocks == 2 * 2 * ((1000 - SINKS - 128) // BLOCK)
    assert mx.allclose(output, expected, atol=1e-5)  # rounding of float32 sums


@pytest.mark.parametrize("rule", ["exact:0.2", "sinks:0.2"])
def test_what_is_left_out_is_within_the_bound(rule):
    output, expected, ours = attention(rule, spread=4.0)
    assert 0 < ours.read < ours.blocks
    # At most 0.2 of the weights, each with a value less the mean.
    largest = mx.abs(normal((1, 2, 1000, 64), 2)).max().item()
    assert 0 < mx.abs(output - expected).max().item() < 0.2 * largest


def test_attention_of_the_models_is_replaced_and_put_back():
    before = mlx_lm.models.llama.scaled_dot_product_attention
    with skipping("nats:8") as replaced:
        assert mlx_lm.models.llama.scaled_dot_product_attention is replaced
    assert mlx_lm.models.llama.scaled_dot_product_attention is before
