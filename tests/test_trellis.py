"""Trellis codes of the study: the best path of all, whose levels are nearer than scalar ones."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from trellis import ScalarRounding, TrellisRounding, best_windows, distortion, table

from mlx_turboquant.codec.codebook import relative_error
from mlx_turboquant.codec.quantizer import TurboQuantizer


def windows_of(stream: tuple[int, ...], bits: list[int]) -> list[int]:
    window, found = 0, []
    for new, k in zip(stream, bits):
        window = (window << k | new) % 256
        found.append(window)
    return found


@pytest.mark.parametrize("bits", [[2, 2, 2, 2], [1, 3, 1, 3]])
def test_no_stream_is_better_than_the_one_found(bits):
    x = np.random.default_rng(0).standard_normal(4).astype(np.float32)
    weights = [1.0, 4.0, 2.0, 0.5]

    def error(windows: list[int]) -> float:
        levels = [table(k)[window].item() for k, window in zip(bits, windows)]
        return sum(w * (a - b) ** 2 for w, a, b in zip(weights, levels, x))

    [*found] = (window.item() for window in best_windows(mx.array(x[None]), bits, weights))
    streams = list(itertools.product(*(range(1 << k) for k in bits)))
    assert found in [windows_of(stream, bits) for stream in streams]
    least = min(error(windows_of(stream, bits)) for stream in streams)
    assert error(found) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3])
def test_values_are_nearer_than_with_scalar_codes(bits):
    assert distortion(bits) < 0.75 * relative_error(128, bits)


def test_vectors_are_restored_better_than_with_scalar_codes():
    x = mx.random.normal((1, 2, 64, 64), key=mx.random.key(0)) + 3
    quantizer = TurboQuantizer(64, 3)
    errors = []
    for rounding in (TrellisRounding, ScalarRounding):
        errors.append(mx.square(rounding(quantizer, 0.0)(x) - x).mean().item())
    # 0.72 in the mean over many vectors, with the search for the gain on both sides.
    assert errors[0] < 0.85 * errors[1]
