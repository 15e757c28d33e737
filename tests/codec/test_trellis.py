import json
from importlib.resources import files

import mlx.core as mx
import numpy as np
import pytest
from tokens import basis_of, unit_vectors

from mlx_turboquant.codec import trellis
from mlx_turboquant.codec.packing import words_per_vector
from mlx_turboquant.codec.quantizer import TurboQuantizer
from mlx_turboquant.codec.trellis import best_windows, coordinate_bits, pack, table, unpack

PATTERNS = [(1, 8), (2, 100), (3, 40), (4, 128), (3, 36), ((6, 3, 2, 1), 64), ((7, 4, 3, 2), 32)]


def random_windows(bits, dim, seed=0):
    """The windows of five random streams."""
    generator = np.random.default_rng(seed)
    window, found = np.zeros(5, np.uint32), []
    for own in coordinate_bits(bits, dim):
        window = (window << own | generator.integers(0, 1 << own, 5)) % 256
        found.append(window)
    return mx.array(np.stack(found, axis=1).astype(np.uint32))


@pytest.mark.parametrize("bits, dim", PATTERNS)
def test_streams_come_back_as_they_were_packed(bits, dim):
    windows = random_windows(bits, dim)
    words = pack(windows, bits)
    assert words.shape == (5, words_per_vector(dim, bits))
    assert mx.array_equal(unpack(words, bits, dim), windows)


def test_the_first_bit_of_a_stream_is_the_highest_and_zeros_stand_before_it():
    words = mx.array([[0xC0000000, 0x00000001]], mx.uint32)
    windows = unpack(words, 4, 16)[0].tolist()
    assert windows[:3] == [0x0C, 0xC0, 0x00] and windows[-2:] == [0x00, 0x01]


@pytest.mark.parametrize("bits, dim", [(3, 64), ((5, 2, 1, 0), 32)])
def test_each_window_of_a_best_stream_follows_the_one_before(bits, dim):
    own = coordinate_bits(bits, dim)
    y = mx.random.normal((7, dim), key=mx.random.key(1))
    windows = best_windows(y, own, mx.ones(y.shape))
    assert mx.array_equal(unpack(pack(windows, bits), bits, dim), windows)


def test_streams_of_many_vectors_are_those_of_each(monkeypatch):
    y, own = mx.random.normal((5, 32), key=mx.random.key(2)), coordinate_bits(2, 32)
    together = best_windows(y, own, mx.ones(y.shape))
    monkeypatch.setattr(trellis, "_AT_ONCE", 64)
    assert mx.array_equal(best_windows(y, own, mx.ones(y.shape)), together)


@pytest.mark.parametrize("bits, most", [(2, 0.083), (3, 0.0215), (4, 0.0060)])
def test_unit_vectors_have_the_error_that_the_documentation_says(bits, most):
    x = unit_vectors(512, 128)
    quantizer = TurboQuantizer(128, bits, scale="least_squares", codec="trellis")
    error = mx.square(quantizer.dequantize(quantizer.quantize(x)) - x).sum(axis=-1).mean().item()
    assert error < most
    assert error == pytest.approx(trellis.relative_error(128, bits), rel=0.1)  # one gain of three


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_table_has_less_error_than_scalar_levels(bits):
    assert trellis.relative_error(128, bits) < 0.85 * trellis.scalar_error(128, bits)
    assert table(bits).shape == (256,)
    # Levels are those of values with mean 0; they were trained on 31 million.
    assert abs(table(bits).mean().item()) < 0.02


def test_products_are_unbiased():
    """The mean over 64 rotations, each with an error of a sixth of the product of 0.5."""
    x = unit_vectors(1, 64)
    products = []
    for seed in range(64):
        quantizer = TurboQuantizer(64, 2, seed=seed, codec="trellis")
        products.append(quantizer.inner_product(x, quantizer.quantize(x)).item())
    assert np.mean(products) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dim", [8, 20, 64])
def test_zeros_large_and_small_vectors_come_back_and_others_are_nan(dim):
    quantizer = TurboQuantizer(dim, 3, codec="trellis")
    x = mx.random.normal((6, dim), key=mx.random.key(3))
    factors = mx.array([0, 1, 1e30, 1e-30, mx.inf, mx.nan])[:, None]
    restored = quantizer.dequantize(quantizer.quantize(x * factors))
    assert (restored[0] == 0).all()
    for i in (1, 2, 3):
        scaled = x[i] * factors[i]
        assert mx.linalg.norm((restored[i] - scaled) / factors[i]) < 0.4 * mx.linalg.norm(x[i])
    assert mx.isnan(restored[4:]).all()


def test_axes_with_weights_have_less_of_the_error_that_counts():
    basis = basis_of(64, 2, 3)
    keys = mx.random.normal((1, 2, 64, 64), key=mx.random.key(4)) * mx.sqrt(basis.weights)
    keys = keys @ basis.inverse
    errors = []
    for codec in ("scalar", "trellis"):
        quantizer = TurboQuantizer(64, 3, basis=basis, codec=codec)
        error = basis.apply(quantizer.dequantize(quantizer.quantize(keys)) - keys)
        errors.append((basis.weights * mx.square(error)).mean().item())
    assert errors[1] < 0.8 * errors[0]


def test_no_error_on_axes_is_larger_than_the_vector():
    """Levels of a stream are forced where a vector has no bits, and may point away from it."""
    basis = basis_of(64, 1, 6)
    quantizer = TurboQuantizer(64, 2, basis=basis, codec="trellis")
    assert quantizer.pattern == (5, 2, 1, 0)
    x = mx.random.normal((1, 1, 200, 64), key=mx.random.key(5))  # unlike those of the basis
    packed = quantizer.quantize(x)
    errors, lengths = (
        (basis.weights * mx.square(basis.apply(each))).sum(axis=-1)
        for each in (quantizer.dequantize(packed) - x, x)
    )
    assert packed.scales.min() == 0
    assert (errors <= 1.001 * lengths).all()  # but for rounding


def test_more_than_four_bits_are_scalar():
    one, other = (TurboQuantizer(64, 5, codec=codec) for codec in ("scalar", "trellis"))
    x = unit_vectors(4, 64)
    assert mx.array_equal(one.quantize(x).codes, other.quantize(x).codes)


def test_a_codec_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="Codec 'huffman' is not known: use one of scalar, trell"):
        TurboQuantizer(64, 4, codec="huffman")


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved["3"].update(levels=saved["3"]["levels"].replace("1", "2", 1)),
        lambda saved: saved["3"].update(squared_error=0.5),
        lambda saved: saved.pop("3"),
        lambda saved: saved.update({"3": 7}),
    ],
)
def test_a_damaged_table_is_refused(damage, monkeypatch, tmp_path):
    saved = json.loads((files("mlx_turboquant.codec") / "trellis_tables.json").read_text())
    damage(saved)
    (tmp_path / "trellis_tables.json").write_text(json.dumps(saved))
    monkeypatch.setattr(trellis, "files", lambda package: tmp_path)
    trellis._tables.cache_clear()
    try:
        with pytest.raises(ValueError, match="trellis_tables.json are damaged .*: install mlx_tur"):
            TurboQuantizer(64, 3, codec="trellis").quantize(unit_vectors(1, 64))
    finally:
        trellis._tables.cache_clear()
