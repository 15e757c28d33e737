import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokens import normal

from mlx_turboquant.kernels.reference import restored
from mlx_turboquant.kernels.storage import (
    PackedKV,
    layouts_of,
    removable_mean,
    shared_quantizer,
)
from mlx_turboquant.kernels.tokens import BLOCK, CAPACITY_UNIT

HEADS = (2, 3)
DIM = 64


def vectors(count: int, seed: int = 0, mean: float = 0.0) -> mx.array:
    return normal((*HEADS, count, DIM), seed) + mean


def stored(*parts: mx.array, bits: int = 4, limit: int | None = None) -> PackedKV:
    """Store each part as keys and as values."""
    store = PackedKV(layouts_of(bits, bits), 0, limit)
    for part in parts:
        store.append([part, part])
    return store


def dense(store: PackedKV) -> list[mx.array]:
    return [restored(side, store.count, mx.float32) for side in store.sides]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=4), st.integers(1, 8))
def test_tokens_come_back_in_order_however_they_were_appended(sizes, bits):
    x = vectors(sum(sizes))
    ends = [sum(sizes[:i]) for i in range(1, len(sizes))]
    store = stored(*mx.split(x, ends, axis=2), bits=bits)
    quantizer = shared_quantizer(DIM, bits, 0)
    assert store.count == x.shape[2]
    for side, kept in zip(store.sides, dense(store)):
        expected = quantizer.dequantize(quantizer.quantize(x - side.mean))
        # bfloat16 rounds the scale by at most 1 / 256.
        assert mx.abs(kept - side.mean - expected).max() <= mx.abs(expected).max() / 256


@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 100))
def test_tokens_that_stay_are_not_touched_by_later_ones(first, second, forgotten):
    store = stored(vectors(first))
    store.trim([min(forgotten, first - 1)])
    before = dense(store)
    store.append([vectors(second, seed=1)] * 2)
    for kept, expected in zip(dense(store), before):
        assert mx.array_equal(kept[:, :, : expected.shape[2]], expected)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(1, 20))
def test_a_limited_store_holds_the_newest_tokens(sizes, units):
    """In whole blocks, so that it evicts multiples of 32 tokens, and at most its limit."""
    limit = units * CAPACITY_UNIT
    sizes = [-(-size // BLOCK) * BLOCK for size in sizes]
    x, store, held, start = vectors(sum(sizes)), stored(bits=8, limit=limit), 0, 0
    for size in sizes:
        forgotten = store.append([x[:, :, start : start + size]] * 2)
        start, held = start + size, held + size - forgotten
        assert forgotten % BLOCK == 0
        assert store.count == held <= limit
        # Limits of 8 blocks and more have an eighth of free space once they are reached.
        assert held >= min(start, limit - max(limit // 8, BLOCK))
        for kept in dense(store):
            # 8 bits leave 0.6 % of the length, a bfloat16 scale up to 0.4 %.
            error = mx.linalg.norm(kept - x[:, :, start - held : start], axis=-1)
            assert error.max() < 0.015 * mx.linalg.norm(x, axis=-1).max()
    assert store.capacity <= limit


def test_attention_that_was_given_tokens_sees_them_after_they_are_forgotten():
    x = vectors(4 * BLOCK)
    store = stored(x, limit=4 * BLOCK)
    given_sides = list(store.sides)
    before = dense(store)
    for count in (BLOCK, 8 * BLOCK):
        store.append([vectors(count, seed=1)] * 2)
        for side, expected in zip(given_sides, before):
            assert mx.array_equal(restored(side, 4 * BLOCK, mx.float32), expected)


def test_a_block_of_keys_is_interleaved():
    """Word w of token t is at [..., t // 32, w, t % 32]; of a value it is at [..., t, w]."""
    x = vectors(2 * BLOCK)
    keys, _ = stored(x).sides
    _, values = stored(x - keys.mean).sides
    for token in (0, 5, BLOCK - 1, BLOCK, 2 * BLOCK - 1):
        words = keys.codes[:, :, token // BLOCK, :, token % BLOCK]
        assert mx.array_equal(words, values.codes[:, :, token])


@pytest.mark.parametrize("count", [CAPACITY_UNIT, 2 * CAPACITY_UNIT, 5 * BLOCK])
def test_codes_lie_in_memory_as_kernels_read_them(count):
    """MLX would copy another layout at every launch. Both whole buffers and parts are tested."""
    store = stored(vectors(2 * CAPACITY_UNIT))
    store.trim([2 * CAPACITY_UNIT])
    store.append([vectors(count)] * 2)
    for side in (*store.sides, *stored(vectors(count)).sides):
        assert np.array(side.codes, copy=False).flags.c_contiguous


@given(st.integers(1, 2000))
def test_free_space_is_at_most_256_tokens_or_a_32nd(count):
    store = stored(vectors(1), vectors(count, seed=1))
    per_token = 2 * store.layouts[0].vector_nbytes(DIM) * HEADS[0] * HEADS[1]
    used, free = (count + 1) * per_token, max(256, count // 32) + CAPACITY_UNIT
    means = sum(side.mean.nbytes for side in store.sides)
    assert used + means <= sum(x.nbytes for x in store.arrays) <= used + free * per_token + means


@given(st.integers(1, 200))
def test_restored_tokens_are_the_same_in_buffers_of_whole_steps(count):
    store = stored(vectors(count))
    again = PackedKV(store.layouts, 0)
    again.restore(count, [(*HEADS, DIM)] * 2, store.used())
    for mine, theirs in zip(dense(again), dense(store)):
        assert mx.array_equal(mine, theirs)
    assert again.capacity % CAPACITY_UNIT == 0
    keys, values = again.sides
    assert keys.codes.shape[2] * BLOCK == values.codes.shape[2] == again.capacity


def test_any_mean_of_keys_is_removed_and_of_values_a_large_one():
    x = vectors(500)
    for mean, are_removed in ((3.0, (True, True)), (0.3, (True, False))):
        expected = (x + mean).mean(axis=2, keepdims=True)
        for side, is_removed in zip(stored(x + mean).sides, are_removed):
            assert mx.allclose(side.mean, expected if is_removed else 0 * expected, atol=1e-5)


def test_heads_decide_separately_and_a_non_finite_one_keeps_no_mean():
    x = vectors(500, mean=3)
    x[0, 1] -= 3
    x[1, 2, 17, 5] = mx.inf
    removed = (removable_mean(x, 2.0) != 0).all(axis=(2, 3))
    assert removed.tolist() == [[True, False, True], [True, True, False]]


@pytest.mark.parametrize("bits", [3, 4])
def test_a_mean_costs_no_accuracy(bits):
    """Without its removal the error would grow with the length: 3 is 9 times the variance."""
    errors = []
    for mean in (0.0, 3.0):
        x = vectors(512, mean=mean)
        keys, _ = dense(stored(x, bits=bits))
        errors.append(((keys - x) ** 2).mean().item())
    assert errors[1] < 1.05 * errors[0]  # the sampling error of the mean
