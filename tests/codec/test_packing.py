import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_turboquant.codec.packing import PLANES, pack, unpack, words_per_vector

bit_widths = st.integers(1, 8)


def random_codes(bits: int, shape: tuple[int, ...]) -> mx.array:
    return mx.random.randint(0, 2**bits, shape, key=mx.random.key(0)).astype(mx.uint32)


@given(bit_widths, st.integers(1, 300), st.lists(st.integers(1, 3), max_size=3))
def test_unpacking_returns_the_codes(bits, dim, batch):
    codes = random_codes(bits, (*batch, dim))
    packed = pack(codes, bits)
    assert packed.dtype == mx.uint32
    assert packed.shape == (*batch, words_per_vector(dim, bits))
    assert mx.array_equal(unpack(packed, bits, dim), codes)


@given(bit_widths, st.integers(1, 300))
def test_a_run_takes_a_word_a_bit_and_a_shorter_one_whole_words_a_plane(bits, dim):
    assert sum(PLANES[bits]) == bits
    rest = sum(-(-(dim % 32) * width // 32) for width in PLANES[bits])
    assert words_per_vector(dim, bits) == dim // 32 * bits + rest


@given(bit_widths, st.integers(33, 300))
def test_runs_of_32_coordinates_are_stored_one_after_the_other(bits, dim):
    codes = random_codes(bits, (2, dim))
    runs = [pack(codes[:, i : i + 32], bits) for i in range(0, dim, 32)]
    assert mx.array_equal(pack(codes, bits), mx.concatenate(runs, axis=-1))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_one_shift_and_mask_extract_two_neighbours(bits):
    codes = np.array(random_codes(bits, (32 // bits,)))
    word = int(pack(mx.array(codes), bits).item())
    mask = (2**bits - 1) * 0x00010001
    for j in range(len(codes) // 2):
        pair = (word >> (bits * j)) & mask
        assert (pair & 0xFFFF, pair >> 16) == (codes[2 * j], codes[2 * j + 1])


@pytest.mark.parametrize("bits, high, low", [(3, 2, 1), (5, 4, 1), (6, 4, 2), (8, 4, 4)])
def test_planes_hold_the_high_bits_first(bits, high, low):
    codes = random_codes(bits, (32,))
    separate = [pack(codes >> low, high), pack(codes & (2**low - 1), low)]
    assert mx.array_equal(pack(codes, bits), mx.concatenate(separate))


eights = st.tuples(*[st.integers(0, 8)] * 4).filter(lambda bits: sum(bits) % 4 == 0 and any(bits))


def codes_of(bits: tuple[int, ...], runs: int) -> mx.array:
    parts = [random_codes(each, (3, runs, 8)) for each in bits]
    return mx.concatenate(parts, axis=-1).flatten(1)


@given(eights, st.integers(1, 8))
def test_eights_of_a_run_can_have_bits_of_their_own(bits, runs):
    codes = codes_of(bits, runs)
    packed = pack(codes, bits)
    assert packed.shape == (3, words_per_vector(32 * runs, bits)) == (3, runs * sum(bits) // 4)
    assert mx.array_equal(unpack(packed, bits, 32 * runs), codes)


@given(bit_widths, st.integers(1, 8))
def test_eights_of_equal_bits_are_stored_as_a_run_of_those_bits(bits, runs):
    codes = codes_of((bits,) * 4, runs)
    assert mx.array_equal(pack(codes, (bits,) * 4), pack(codes, bits))
