"""Trellis codes of the study: the best path of all, whose levels are nearer than scalar ones."""

import itertools
import json
from types import SimpleNamespace

import mlx.core as mx
import pytest
import trellis_tables
from tokens import basis_of
from trellis import (
    Code,
    ScalarRounding,
    TrellisRounding,
    code_of,
    roundings,
    trellis_levels,
)
from trellis_tables import BITS, _saved, best_windows, distortion, save, table, train

from mlx_turboquant.codec import trellis
from mlx_turboquant.codec.codebook import relative_error
from mlx_turboquant.codec.quantizer import TurboQuantizer

WEIGHTS = mx.array([1.0, 4.0, 2.0, 0.5])


def error(x: mx.array, bits: list[int], windows: list[mx.array]) -> mx.array:
    """The weighted error of the windows of each vector."""
    levels = mx.stack([table(8, k)[window] for k, window in zip(bits, windows)], axis=1)
    return (WEIGHTS * mx.square(levels - x)).sum(axis=1)


def windows_of(stream: tuple[int, ...], bits: list[int]) -> list[mx.array]:
    window, found = 0, []
    for new, k in zip(stream, bits):
        window = (window << k | new) % 256
        found.append(mx.array([window], mx.uint32))
    return found


@pytest.mark.parametrize("bits", [[2, 2, 2, 2], [1, 3, 1, 3]])
def test_no_stream_is_better_than_the_one_found(bits):
    x = mx.random.normal((1, 4), key=mx.random.key(0))
    found = best_windows(x, bits, WEIGHTS, 8)
    streams = itertools.product(*(range(1 << k) for k in bits))
    possible = [windows_of(stream, bits) for stream in streams]
    errors = {str(mx.stack(each)): error(x, bits, each).item() for each in possible}
    assert errors[str(mx.stack(found))] == pytest.approx(min(errors.values()), rel=1e-4)


@pytest.mark.parametrize("bits", [[2] * 16, [1, 3, 2, 2] * 4])
def test_the_last_bits_of_a_ring_stand_before_its_first(bits):
    x = mx.random.normal((8, 16), key=mx.random.key(0))
    found = best_windows(x, bits, mx.ones(16), 8, is_ring=True)
    before = found[-1]
    for k, window in zip(bits, found):
        assert (window >> k).tolist() == (before & ((256 >> k) - 1)).tolist()
        before = window


@pytest.mark.parametrize("is_ring", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_are_nearer_than_with_scalar_codes(bits, is_ring):
    assert distortion(bits, is_ring=is_ring) < 0.72 * relative_error(128, bits)


@pytest.mark.parametrize("window, bits", [*itertools.product((6, 10), BITS)])
def test_a_saved_table_has_the_error_that_stands_beside_it(window, bits):
    expected = _saved()[f"{window}, {bits}"]["squared error"]
    assert distortion(bits, window) == pytest.approx(expected, rel=1e-3)  # levels are rounded


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_table_of_the_package_has_the_error_that_stands_beside_it(bits):
    assert distortion(bits) == pytest.approx(trellis.relative_error(128, bits), rel=4e-3)


def test_a_trained_table_is_saved_with_its_checksum(monkeypatch, tmp_path):
    ours = tmp_path / "ours.json"
    ours.write_text(trellis_tables._OURS.read_text())
    monkeypatch.setattr(trellis_tables, "_OURS", ours)
    before = json.loads(ours.read_text())["2"]
    save(8, 2)
    assert json.loads(ours.read_text())["2"] == before


def test_training_lowers_the_error(monkeypatch):
    monkeypatch.setattr(trellis_tables, "_tables", {(6, 2): trellis_tables._initial(6, 2)})
    monkeypatch.setattr(trellis_tables, "_ROUNDS", 5)
    monkeypatch.setattr(trellis_tables, "_TRAINED", (64, 128))
    before = distortion(2, 6)
    train(6, 2)
    assert distortion(2, 6) < 0.95 * before


def test_a_code_is_named_by_its_window_its_wrap_its_gains_and_its_side():
    assert code_of("8") == Code()
    assert code_of("10:run:1:keys") == Code(10, "run", (1.0,), ("keys",))


@pytest.mark.parametrize(
    "name", ["", "4", "x", "\u00b2", "8:word", "8:run:2", "8:run:3:queries", "8:zero:3:keys:values"]
)
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match="is not a code: use a name like"):
        code_of(name)


def test_only_the_named_side_has_a_trellis():
    quantizers = (TurboQuantizer(64, 3), TurboQuantizer(64, 2))
    kinds = [type(each) for each in roundings(quantizers, code_of("8:zero:3:values"))]
    assert kinds == [ScalarRounding, TrellisRounding]


def test_vectors_are_restored_better_than_with_scalar_codes():
    x = mx.random.normal((1, 2, 64, 64), key=mx.random.key(0)) + 3
    quantizer = TurboQuantizer(64, 3)
    errors = []
    for rounding in (TrellisRounding(quantizer, 0.0, Code()), ScalarRounding(quantizer, 0.0)):
        errors.append(mx.square(rounding(x) - x).mean().item())
    # 0.72 in the mean over many vectors, with the search for the gain on both sides.
    assert errors[0] < 0.85 * errors[1]


def levels_of(code: Code, quantizer: TurboQuantizer) -> mx.array:
    return trellis_levels(mx.random.normal((2, 8, 64), key=mx.random.key(1)), quantizer, code)


@pytest.mark.parametrize("wraps", [("zero", "run"), ("run", "group"), ("group", "vector")])
def test_each_wrap_has_streams_of_its_own(wraps):
    one, other = (levels_of(Code(wrap=wrap), TurboQuantizer(64, 2)) for wrap in wraps)
    assert not mx.array_equal(one, other)


def test_a_ring_with_fewer_bits_than_a_window_keeps_scalar_codes():
    quantizer = TurboQuantizer(16, 1)
    y = mx.random.normal((1, 8, 16), key=mx.random.key(1))
    scalar = quantizer._levels_of(quantizer._codes_of(y))
    assert mx.array_equal(trellis_levels(y, quantizer, Code(10, "group")), scalar)  # 8 bits
    assert not mx.array_equal(trellis_levels(y, quantizer, Code(10, "vector")), scalar)  # 16


def test_errors_count_by_the_weights_of_a_basis():
    quantizer = TurboQuantizer(64, 2, basis=basis_of(64, 2, 3))
    y = mx.random.normal((2, 64, 64), key=mx.random.key(1))
    errors = mx.square(trellis_levels(y, quantizer, Code()) - y)
    unweighted = TurboQuantizer(64, 2, basis=basis_of(64, 2, 3))
    unweighted.basis = SimpleNamespace(weights=mx.ones((2, 1, 64)))
    others = mx.square(trellis_levels(y, unweighted, Code()) - y)
    assert quantizer._sum(errors).mean() < quantizer._sum(others).mean()


def test_more_gains_find_a_smaller_error():
    x = mx.random.normal((1, 2, 64, 64), key=mx.random.key(0))
    quantizer = TurboQuantizer(64, 3)
    one, three = (
        mx.square(TrellisRounding(quantizer, 0.0, code_of(name))(x) - x).mean().item()
        for name in ("8:zero:1", "8:zero:3")
    )
    assert three < 0.97 * one
