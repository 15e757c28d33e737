import mlx.core as mx
import pytest
from tokens import normal, visible_tokens

from mlx_turboquant.kernels.attention import decode_attention
from mlx_turboquant.kernels.quantize import dense
from mlx_turboquant.kernels.runtime import force_backend


@pytest.fixture(autouse=True)
def plain_mlx():
    """Test the definition of the kernels; their half precision would need more tolerance."""
    force_backend("reference")
    yield
    force_backend(None)


BATCH, COUNT = 2, 4 + 70 + 11  # sinks, packed and recent tokens of visible_tokens
# float32 sums in another order, through a rotation; half types round the output.
TOLERANCE = {mx.float32: 2e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}


def dense_attention(queries, tokens, scale, mask=None, sinks=None) -> mx.array:
    keys, values = (x.astype(mx.float32) for x in dense(tokens))
    return mx.fast.scaled_dot_product_attention(
        queries.astype(mx.float32), keys, values, scale=scale, mask=mask, sinks=sinks
    )


def assert_same_as_dense(queries, tokens, mask=None, sinks=None):
    output = decode_attention(queries, tokens, 0.3, mask, sinks)
    assert output.dtype == queries.dtype
    difference = output.astype(mx.float32) - dense_attention(queries, tokens, 0.3, mask, sinks)
    assert mx.abs(difference).max() < TOLERANCE[queries.dtype]


@pytest.mark.parametrize("query_heads", [2, 4, 14])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_any_group_of_query_heads_attends_like_dense_attention(query_heads, rows):
    assert_same_as_dense(normal((BATCH, query_heads, rows, 64), 3), visible_tokens())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_output_has_the_dtype_of_the_queries(dtype):
    queries = normal((BATCH, 4, 2, 64), 3, dtype)
    assert_same_as_dense(queries, visible_tokens(dtype=dtype))


@pytest.mark.parametrize("dim, value_dim", [(80, 80), (96, 64), (192, 128), (72, 72)])
def test_keys_and_values_may_differ_in_width(dim, value_dim):
    queries = normal((BATCH, 4, 1, dim), 3)
    assert_same_as_dense(queries, visible_tokens(dim=dim, value_dim=value_dim))


def test_removed_means_are_part_of_the_result():
    assert_same_as_dense(normal((BATCH, 4, 2, 64), 3), visible_tokens(mean=5.0))


visible = normal((BATCH, 1, 3, COUNT), 4) > -1
MASKS = {
    "causal": "causal",
    "boolean": visible[0, 0],
    "boolean per row": visible,
    "boolean per head": mx.broadcast_to(visible, (BATCH, 4, 3, COUNT)),
    "additive": normal((BATCH, 4, 3, COUNT), 5),
    "additive with minus infinity": mx.where(visible, 0.0, -mx.inf),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_kind_of_mask_is_applied_in_token_order(mask):
    assert_same_as_dense(normal((BATCH, 4, 3, 64), 3), visible_tokens(), mask)


def test_attention_sinks_take_weight_without_a_value():
    queries, sinks = normal((BATCH, 4, 2, 64), 3), normal((4,), 6)
    assert_same_as_dense(queries, visible_tokens(), sinks=sinks)
    assert_same_as_dense(queries, visible_tokens(), "causal", sinks)


def test_large_scores_do_not_overflow():
    """Keys of some models reach 400, which gives scores of 1e4 and more."""
    output = decode_attention(normal((BATCH, 4, 1, 64), 3) * 400, visible_tokens(), 1.0)
    assert mx.isfinite(output).all()
