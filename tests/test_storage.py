import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_turboquant.storage import (
    BLOCK,
    CAPACITY_UNIT,
    PackedTokens,
    removable_mean,
    shared_quantizer,
)

HEADS = (2, 3)
DIM = 64


def tokens(count: int, seed: int = 0, mean: float = 0.0) -> mx.array:
    return mx.random.normal((*HEADS, count, DIM), key=mx.random.key(seed)) + mean


def stored(*parts: mx.array, bits: int = 4, interleaved: bool = True) -> PackedTokens:
    store = PackedTokens(bits, 0, interleaved)
    for part in parts:
        store.append(part)
    return store


@given(st.lists(st.integers(1, 100), min_size=1, max_size=4), st.integers(1, 8), st.booleans())
def test_tokens_come_back_in_order_however_they_were_appended(sizes, bits, interleaved):
    x = tokens(sum(sizes))
    ends = [sum(sizes[:i]) for i in range(1, len(sizes))]
    store = stored(*mx.split(x, ends, axis=2), bits=bits, interleaved=interleaved)
    quantizer = shared_quantizer(DIM, bits, 0)
    expected = quantizer.dequantize(quantizer.quantize(x - store.mean))
    assert store.count == x.shape[2]
    # bfloat16 rounds the scale by at most 1 / 256.
    difference = store.dense(mx.float32) - store.mean - expected
    assert mx.abs(difference).max() <= mx.abs(expected).max() / 256


@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 100), st.booleans())
def test_tokens_that_stay_are_not_touched_by_later_ones(first, second, forgotten, interleaved):
    store = stored(tokens(first), interleaved=interleaved)
    store.count -= min(forgotten, first - 1)
    before = store.dense(mx.float32)
    store.append(tokens(second, seed=1))
    assert mx.array_equal(store.dense(mx.float32)[:, :, : before.shape[2]], before)


def test_a_block_of_keys_is_interleaved():
    """Word w of token t is at [..., t // 32, w, t % 32]; that of a value at [..., t, w]."""
    x = tokens(2 * BLOCK)
    keys = stored(x)
    values = stored(x - keys.mean, interleaved=False)
    for token in (0, 5, BLOCK - 1, BLOCK, 2 * BLOCK - 1):
        words = keys.codes[:, :, token // BLOCK, :, token % BLOCK]
        assert mx.array_equal(words, values.codes[:, :, token])


@pytest.mark.parametrize("count", [CAPACITY_UNIT, 2 * CAPACITY_UNIT, 5 * BLOCK])
@pytest.mark.parametrize("interleaved", [True, False])
def test_codes_lie_in_memory_as_kernels_read_them(count, interleaved):
    """MLX would copy others at every launch. Whole buffers, which it may replace, and parts."""
    store = stored(tokens(2 * CAPACITY_UNIT), interleaved=interleaved)
    store.count = 0
    store.append(tokens(count))
    for codes in (store.codes, stored(tokens(count), interleaved=interleaved).codes):
        assert np.array(codes, copy=False).flags.c_contiguous


@given(st.integers(1, 2000), st.booleans())
def test_free_space_is_at_most_256_tokens_or_a_32nd(count, interleaved):
    store = stored(tokens(1), tokens(count, seed=1), interleaved=interleaved)
    per_token = store.vector_nbytes(DIM) * HEADS[0] * HEADS[1]
    used, free = (count + 1) * per_token, max(256, count // 32) + CAPACITY_UNIT
    mean = store.mean.nbytes
    assert used + mean <= store.nbytes <= used + free * per_token + mean


@given(st.integers(1, 200), st.booleans())
def test_restored_tokens_are_the_same_in_buffers_of_whole_steps(count, interleaved):
    store = stored(tokens(count), interleaved=interleaved)
    restored = PackedTokens(4, 0, interleaved)
    restored.restore(count, 0, (*HEADS, DIM), *store.used())
    assert mx.array_equal(restored.dense(mx.float32), store.dense(mx.float32))
    assert restored.scales.shape[-1] % CAPACITY_UNIT == 0
    slots = restored.codes.shape[2] * (BLOCK if interleaved else 1)
    assert slots == restored.scales.shape[-1]


def test_any_mean_of_keys_is_removed_and_of_values_a_large_one():
    x = tokens(500)
    for mean, are_removed in ((3.0, (True, True)), (0.3, (True, False))):
        for interleaved, is_removed in zip((True, False), are_removed):
            store = stored(x + mean, interleaved=interleaved)
            expected = (x + mean).mean(axis=2, keepdims=True)
            assert mx.allclose(store.mean, expected if is_removed else 0 * expected, atol=1e-5)


def test_heads_decide_separately_and_a_non_finite_one_keeps_no_mean():
    x = tokens(500, mean=3)
    x[0, 1] -= 3
    x[1, 2, 17, 5] = mx.inf
    removed = (removable_mean(x, 2.0) != 0).all(axis=(2, 3))
    assert removed.tolist() == [[True, False, True], [True, True, False]]


@pytest.mark.parametrize("bits", [3, 4])
def test_a_mean_costs_no_accuracy(bits):
    """Without removing it the error would grow with the length: 3 is 9 times the variance."""
    errors = []
    for mean in (0.0, 3.0):
        x = tokens(512, mean=mean)
        difference = stored(x, bits=bits).dense(mx.float32) - x
        errors.append((difference * difference).mean().item())
    assert errors[1] < 1.05 * errors[0]  # the sampling error of the mean
