import copy
import random
import weakref

import mlx.core as mx
import pytest
from conftest import peak_of_growth
from hypothesis import example, given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache
from tokens import append_in_chunks, basis_of
from tokens import keys_and_values as tokens

from mlx_turboquant import TurboQuantKVCache
from mlx_turboquant.cache.fetched import Link
from mlx_turboquant.cache.latent import TurboQuantLatentCache
from mlx_turboquant.kernels.attention import decode_attention
from mlx_turboquant.kernels.tokens import BLOCK, CAPACITY_UNIT

HEADS, DIM = 2, 64
MEGABYTE = 1 << 20
chunk_sizes = st.lists(st.integers(1, 90), min_size=1, max_size=6)


def filled(sizes, **settings) -> tuple[TurboQuantKVCache, tuple[mx.array, mx.array]]:
    """A cache after chunks of these sizes, and the result of its last update."""
    cache = TurboQuantKVCache(**settings)
    return cache, append_in_chunks(cache, tokens(sum(sizes)), sizes)


@given(chunk_sizes, st.integers(0, 40), st.integers(0, 5))
def test_all_tokens_are_there_in_order_after_any_chunks(sizes, window, sinks):
    cache, fetched = filled(sizes, key_bits=8, value_bits=8, window=window, sink_tokens=sinks)
    assert cache.offset == cache.size() == sum(sizes)
    for restored, original in zip(fetched, tokens(sum(sizes))):
        # 8 bits leave 0.6 % of the length on average, a bfloat16 scale up to 0.4 %.
        error = mx.linalg.norm(restored - original, axis=-1)
        assert (error < 0.015 * mx.linalg.norm(original, axis=-1)).all()


@given(chunk_sizes, st.integers(0, 40), st.integers(0, 5))
def test_sinks_and_window_are_exact_and_the_rest_is_packed_in_blocks(sizes, window, sinks):
    cache, _ = filled([*sizes, 1], key_bits=1, value_bits=1, window=window, sink_tokens=sinks)
    assert cache.packed_tokens % BLOCK == 0
    assert cache.exact_tokens == cache.offset - cache.packed_tokens
    outside = cache.exact_tokens - sinks - window
    assert outside <= BLOCK
    fetched = cache.update_and_fetch(*tokens(1, seed=1))
    for restored, original in zip(fetched, tokens(cache.offset - 1)):
        restored = restored[:, :, :-1]
        assert mx.array_equal(restored[:, :, :sinks], original[:, :, :sinks])
        if window:
            assert mx.array_equal(restored[:, :, -window:], original[:, :, -window:])


def test_a_chunk_sees_itself_and_the_window_before_it_exactly():
    sizes = [50, 200]
    _, fetched = filled(sizes, key_bits=1, value_bits=1, window=64, sink_tokens=0)
    for restored, original in zip(fetched, tokens(sum(sizes))):
        assert mx.array_equal(restored, original)


def test_nothing_is_held_but_what_nbytes_counts():
    cache, _ = filled([3000, 1, 1], window=64)
    held = list(cache._exact)
    held += [part for side in cache._packed.sides for part in side if isinstance(part, mx.array)]
    assert cache.nbytes == sum(part.nbytes for part in held)
    # 4 bits and a 2-byte scale in place of 2 bytes a value, sinks and window in float32.
    assert cache.nbytes < 0.36 * cache.fp16_nbytes


@pytest.mark.parametrize(
    "derived",
    [
        lambda cache: cache,
        copy.deepcopy,
        lambda cache: cache.from_state(cache.state),
        lambda cache: cache.merge([cache]),
        lambda cache: cache.merge([cache]).extract(0),
    ],
    ids=["itself", "a copy", "its state", "a batch", "a sequence of a batch"],
)
def test_what_layers_share_is_held_until_the_last_of_them_has_it(derived):
    cache, _ = filled([100], window=16)
    cache.shared_reads = 2
    cache = derived(cache)
    fetched = cache.update_and_fetch(*tokens(40))
    assert cache.keys_and_values() is fetched and cache.keys_and_values() is fetched
    keys = weakref.ref(fetched[0])
    del fetched
    assert keys() is None
    assert cache.keys_and_values()[0].shape[2] == 140


def test_fp16_bytes_are_those_of_a_dense_cache():
    cache, _ = filled([100])
    dense = KVCache()
    dense.update_and_fetch(*(x.astype(mx.float16) for x in tokens(256)))
    assert cache.fp16_nbytes * 256 == dense.nbytes * 100


@given(chunk_sizes, st.integers(0, 400), st.integers(1, 90))
def test_trimming_forgets_the_last_tokens_and_quantizes_none_again(sizes, surplus, more):
    cache, _ = filled(sizes, window=20)
    seen_packed = cache.packed_tokens
    before = [x[:, :, :] for x in cache.update_and_fetch(*tokens(1, seed=1))]
    mx.eval(before)
    packed = cache.packed_tokens
    count = cache.offset
    trimmed = cache.trim(surplus)
    assert trimmed == min(surplus, count)
    assert cache.offset == count - trimmed
    assert cache.packed_tokens <= packed
    after = cache.update_and_fetch(*tokens(more, seed=2))
    assert cache.offset == count - trimmed + more
    for restored, original in zip(after, before):
        left = count - trimmed
        # Packed tokens stay the same; exact tokens may have been packed in between.
        kept = min(seen_packed + cache.sink_tokens, left) if seen_packed else 0
        assert mx.array_equal(restored[:, :, :kept], original[:, :, :kept])
        assert restored.shape[2] == cache.offset


@given(chunk_sizes, st.sampled_from([None, basis_of(DIM, HEADS, 2)]))
def test_a_cache_restored_from_its_state_is_the_same(sizes, basis):
    cache, _ = filled(sizes, key_bits=3, value_bits=2, window=20, seed=5, basis=basis)
    restored = TurboQuantKVCache.from_state(cache.state)
    assert restored.state[:11] == cache.state[:11] and restored.settings == cache.settings
    for new in (tokens(1, seed=3), tokens(40, seed=4)):
        for a, b in zip(cache.update_and_fetch(*new), restored.update_and_fetch(*new)):
            assert mx.array_equal(a, b)


def test_codes_of_a_trellis_are_nearer_and_come_back_with_the_state():
    """The keys of 40 tokens, of which 36 are packed."""
    keys, values = (x[..., :32] for x in tokens(40))
    errors = []
    for codec in ("scalar", "trellis"):
        cache = TurboQuantKVCache(3, 1, window=0, sink_tokens=4, codec=codec)
        cache.update_and_fetch(keys, values)
        fetched = cache.from_state(cache.state).keys_and_values()
        for mine, theirs in zip(fetched, cache.keys_and_values()):
            assert mx.array_equal(mine, theirs)
        errors.append(mx.square(fetched[0] - keys).mean().item())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("codec", ["huffman", None, 1, mx.zeros((2, 2))])
def test_a_state_of_an_unknown_codec_is_refused(codec):
    state = list(TurboQuantKVCache().state)
    state[6] = codec
    with pytest.raises(ValueError, match=r"is damaged \(codes of the kind "):
        TurboQuantKVCache.from_state(tuple(state))


def changed(state: list, choose: random.Random) -> list:
    """A state with one part replaced, repeated or removed, which may be valid or not."""
    place = choose.randrange(len(state))
    part, other = state[place], choose.choice(state)
    numbers = [None, -1, 0, 1, 2, 8, 31, 32, 33, 96, 2**31, 2**62, True, 1.5, "4", [], mx.array(1)]
    replacements = [*numbers, other]
    if isinstance(part, mx.array) and part.ndim:
        shorter = [part[(slice(None),) * axis + (slice(1),)] for axis in range(part.ndim)]
        dtypes = [part.astype(dtype) for dtype in (mx.float16, mx.int32, mx.uint32)]
        replacements += [*shorter, *dtypes, part[None], part.T, part[..., :0]]
    elif type(part) is int:
        replacements += [part + 1, part - 1, part + 32, part - 32]
    choice = choose.randrange(len(replacements) + 2)
    if choice < len(replacements):
        return [*state[:place], replacements[choice], *state[place + 1 :]]
    return [
        *state[:place],
        *([part, part] if choice == len(replacements) else []),
        *state[place + 1 :],
    ]


@pytest.mark.parametrize("kind", ["packed", "exact", "limited", "empty", "latent", "basis"])
def test_random_states_are_refused_or_usable(kind):
    """2,500 states of each kind."""
    settings = {"window": 64 if kind == "exact" else 0, "sink_tokens": 1}
    settings |= {"max_size": 107} if kind == "limited" else {}
    settings |= {"basis": basis_of(32, HEADS, 2)} if kind == "basis" else {}
    cache = (TurboQuantLatentCache if kind == "latent" else TurboQuantKVCache)(4, 4, **settings)
    dim = 32 if kind == "basis" else 16
    keys, values = (x[..., :dim] for x in tokens(0 if kind == "empty" else 50))
    for _ in range(0 if kind == "empty" else 3):
        cache.update_and_fetch(keys, values)
    mx.eval(cache.state)
    choose, outcomes = random.Random(0), {"refused": 0, "usable": 0}
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(2500):
        state = list(cache.state)
        for _ in range(choose.randint(1, 2)):
            state = changed(state, choose)
        try:
            restored = type(cache).from_state(tuple(state))
        except ValueError:
            outcomes["refused"] += 1
            continue
        outcomes["usable"] += 1
        size, count = restored.size(), choose.choice([1, 8, 40])
        like = [x for x in restored.state if isinstance(x, mx.array) and x.ndim == 4]
        sides = (like[0], like[-1 if kind == "latent" else 1]) if like else (keys, values)
        new = [mx.ones((*x.shape[:2], count, x.shape[3]), x.dtype) for x in sides]
        fetched = restored.update_and_fetch(*new)
        mx.eval(fetched, restored.state)
        assert fetched[0].shape[2] == size + count
        assert restored.trim(count) in (0, count)
    assert min(outcomes.values()) > 100
    assert mx.get_peak_memory() - before < 32 * MEGABYTE


@pytest.mark.parametrize(
    "axes, weights",
    [
        (None, mx.ones((HEADS, 1, DIM))),
        ("axes", mx.ones((HEADS, 1, DIM))),
        (mx.zeros((HEADS, DIM, DIM)), mx.ones((HEADS, 1, DIM))),  # no inverse
        (mx.eye(DIM)[None], mx.ones((1, 1, DIM))),  # one head
        (mx.stack([mx.eye(32)] * HEADS), mx.ones((HEADS, 1, 32))),
        (mx.stack([mx.eye(DIM)] * HEADS), mx.zeros((HEADS, 1, DIM))),
        (mx.zeros((0, DIM, DIM)), mx.zeros((0, 1, DIM))),
    ],
)
def test_a_state_with_a_basis_that_is_none_or_of_other_keys_is_refused(axes, weights):
    cache, _ = filled([100], window=16)
    with pytest.raises(
        ValueError, match=r"The state of a cache is damaged \(.*[^.]\): use another"
    ):
        TurboQuantKVCache.from_state((*cache.state[:-2], axes, weights))


def test_latent_vectors_have_no_basis():
    basis, like = basis_of(DIM, 1, 2), TurboQuantLatentCache()
    with pytest.raises(ValueError, match="Latent vectors have no basis"):
        TurboQuantLatentCache(basis=basis)
    with pytest.raises(ValueError, match="Latent vectors have no basis"):
        TurboQuantLatentCache.from_state((*like.state[:-3], basis.axes, basis.weights, None))


@pytest.mark.parametrize("derived", [copy.deepcopy, lambda x: x.merge([x]).extract(0)])
def test_a_copy_has_the_same_basis_and_not_another_one_like_it(derived):
    cache, _ = filled([100], window=16, basis=basis_of(DIM, HEADS, 2))
    copied = derived(cache)
    assert copied.settings.basis is cache.settings.basis
    for a, b in zip(cache.update_and_fetch(*tokens(1)), copied.update_and_fetch(*tokens(1))):
        assert mx.array_equal(a, b)


def test_a_copy_lives_its_own_life():
    cache, _ = filled([100])
    twin = copy.deepcopy(cache)
    before = twin.update_and_fetch(*tokens(1, seed=1))
    cache.trim(60)
    cache.update_and_fetch(*tokens(200, seed=2))
    twin.trim(1)
    for a, b in zip(before, twin.update_and_fetch(*tokens(1, seed=1))):
        assert mx.array_equal(a, b)


@pytest.mark.parametrize("trimmed", [0, 3, 40])
def test_attention_that_reads_tokens_sees_what_arrays_say(trimmed):
    """At every decode step, while blocks leave the window, and after a trim."""
    of_tokens, of_arrays = (filled([200], window=16)[0] for _ in range(2))
    of_tokens.link = Link(is_hooked=True, needs_arrays=False)
    for step in range(100):
        new, queries = tokens(1, step), tokens(1, 1000 + step)[0]
        keys, _ = of_tokens.update_and_fetch(*new)
        with pytest.raises(TypeError):
            keys * 2
        output = decode_attention(queries, keys.tokens, 0.1)
        dense_keys, values = of_arrays.update_and_fetch(*new)
        assert keys.shape == dense_keys.shape and keys.dtype == dense_keys.dtype
        expected = mx.fast.scaled_dot_product_attention(queries, dense_keys, values, scale=0.1)
        assert mx.allclose(output, expected, atol=1e-4)  # float32 sums in another order
        if step == 50:
            assert of_tokens.trim(trimmed) == of_arrays.trim(trimmed)
    assert of_tokens.packed_tokens == of_arrays.packed_tokens > 200
    for a, b in zip(of_tokens.state, of_arrays.state):
        assert mx.array_equal(a, b) if isinstance(a, mx.array) else a == b


@pytest.mark.parametrize("chunks", [(64,), (1,) * 33])
def test_growing_buffers_of_all_layers_are_not_twice_in_memory(chunks):
    # A quarter and more if they were; those of few layers are an eighth.
    assert peak_of_growth([TurboQuantKVCache() for _ in range(16)], 1, chunks) < 0.2


@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize("return_array", [False, True])
@pytest.mark.parametrize("window_size", [None, 5])
def test_masks_are_those_of_the_plain_cache(n, return_array, window_size):
    cache, _ = filled([13])
    plain = KVCache()
    plain.update_and_fetch(*tokens(13))
    mask, expected = (
        c.make_mask(n, return_array=return_array, window_size=window_size) for c in (cache, plain)
    )
    if isinstance(expected, mx.array):
        assert mx.array_equal(mx.broadcast_to(mask, expected.shape), expected)
    else:
        assert mask == expected or (n == 1 and mask is None)


def test_an_empty_cache_says_so():
    cache = TurboQuantKVCache()
    assert cache.empty() and cache.size() == cache.nbytes == cache.fp16_nbytes == 0
    assert cache.trim(5) == 0
    assert TurboQuantKVCache.from_state(cache.state).empty()


def test_the_stock_quantization_of_mlx_lm_leaves_it_alone():
    """It reroutes attention for caches with ``bits`` and replaces ones with ``to_quantized``."""
    cache = TurboQuantKVCache()
    assert not hasattr(cache, "bits") and not hasattr(cache, "to_quantized")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"key_bits": 9}, "9 bits"),
        ({"value_bits": 0}, "0 bits"),
        ({"window": -1}, "window of -1"),
        ({"sink_tokens": -2}, "sink tokens of -2"),
        ({"window": 1.5}, "window of 1.5"),
        ({"codec": "huffman"}, "'huffman' is not known: use one of scalar, trellis."),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TurboQuantKVCache(**settings)


def test_a_head_that_cannot_be_quantized_is_named():
    cache = TurboQuantKVCache(window=0, sink_tokens=0)
    with pytest.raises(ValueError, match="4 values"):
        cache.update_and_fetch(mx.zeros((1, 1, 64, 4)), mx.zeros((1, 1, 64, 4)))


@given(chunk_sizes, st.integers(0, 20), st.integers(0, 5))
@example([1, 61, 90, 8, 1], 0, 0)  # the last token makes the cache evict
def test_a_limited_cache_forgets_the_oldest_blocks_and_keeps_the_sinks(sizes, window, sinks):
    max_size = window + sinks + 40 + 2 * CAPACITY_UNIT
    cache = TurboQuantKVCache(8, 8, window=window, sink_tokens=sinks, max_size=max_size)
    keys, values = tokens(sum(sizes))
    start = 0
    for size in sizes:
        chunk = slice(start, start + size)
        causal = cache.make_mask(size, return_array=True)
        sliding = cache.make_mask(size, window_size=30)
        fetched = cache.update_and_fetch(keys[:, :, chunk], values[:, :, chunk])
        start += size
        positions = positions_of(fetched[0], keys)
        recent = range(start - (len(positions) - sinks), start)
        assert sorted(positions) == sorted({*range(min(sinks, start)), *recent})
        for restored, original in zip(fetched, (keys, values)):
            error = mx.linalg.norm(restored - original[:, :, mx.array(positions)], axis=-1)
            assert (error < 0.015 * mx.linalg.norm(original, axis=-1).max()).all()
        distance = mx.arange(start - size, start)[:, None] - mx.array(positions)
        assert causal is None or mx.array_equal(causal, distance >= 0)
        assert mx.array_equal(sliding, (distance >= 0) & (distance < 30))
        assert cache.size() <= max_size and cache.offset == start
    forgotten = cache.offset - cache.size()
    assert forgotten % BLOCK == 0
    assert cache.is_trimmable() == (forgotten == 0)
    if forgotten:
        assert cache.trim(1) == 0
        assert cache.packed_tokens == 2 * CAPACITY_UNIT


def positions_of(held: mx.array, keys: mx.array) -> list[int]:
    """The position in ``keys`` (1, H, n, DIM) of each held key, by the nearest key."""
    distances = mx.linalg.norm(held[0, 0, :, None] - keys[0, 0, None], axis=-1)
    return distances.argmin(axis=-1).tolist()


@pytest.mark.parametrize("max_size", [0, 171])
def test_a_limit_without_room_for_a_block_is_refused(max_size):
    with pytest.raises(ValueError, match=f"of {max_size} tokens is too small .* at least 236"):
        TurboQuantKVCache(max_size=max_size)
