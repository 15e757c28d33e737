"""Code keys and values with trellis codes, on the axes and bits of a profile, and compare.

    python examples/studies/trellis.py --model MODEL --profile FILE --kv-bits 3 2

The level of a coordinate is an entry of a table at a window of 8 bits of the code stream, of which
as many are new as the coordinate has bits. The stream starts at zero, and an encoder searches the
best path (Viterbi). Tables are trained on Gaussian values. Coordinates of 5 and more bits keep
scalar codes. All else is as in our codec, for both codes: axes of keys with bits by variance, bits
allocated over layers and sides, means removed, a search for the gain and the unbiased scale.

Prints the mean KL divergence of both codes, and the ratio for each text.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
from compare_codecs import filled_cache

from mlx_turboquant.codec.quantizer import TurboQuantizer
from mlx_turboquant.kernels.storage import VALUE_MEAN_ENERGY, removable_mean, shared_quantizer
from mlx_turboquant.lm import texts
from mlx_turboquant.lm.compression import compression_of, give_profile
from mlx_turboquant.lm.loading import prepare_for_device
from mlx_turboquant.lm.profile import load_profile
from mlx_turboquant.measure.cache_specs import EXACT, preset
from mlx_turboquant.measure.evaluate import divergence, log_probabilities, read_prompt

_WINDOW = 8
_STATES = 1 << _WINDOW
_MOST_BITS = 4
_GAINS = (0.9, 1.0, 1.1)
# Vectors that are coded at once.
_BATCH = 2048
_ROUNDS, _TRAINED = 30, (256, 128)


def best_windows(x: mx.array, bits: list[int], weights: list[float]) -> list[mx.array]:
    """The windows of x (n, d), one array (n,) for each coordinate, with the least squared error.

    ``bits`` and ``weights`` are those of each coordinate.
    """
    cost = mx.broadcast_to(mx.where(mx.arange(_STATES) == 0, 0.0, 1e9), (len(x), _STATES))
    choices = []
    for i, (k, weight) in enumerate(zip(bits, weights)):
        # A window's low bits are the high ones of the next.
        before = cost.reshape(len(x), 1 << k, _STATES >> k)
        choices.append(before.argmin(axis=1).astype(mx.uint8))
        cost = mx.repeat(before.min(axis=1), 1 << k, axis=1)
        cost = cost + weight * mx.square(x[:, i, None] - table(k))
        mx.eval(cost, choices[-1])
    window = cost.argmin(axis=1)
    found = []
    for k, choice in zip(reversed(bits), reversed(choices)):
        found.append(window)
        rest = window >> k
        high = mx.take_along_axis(choice, rest[:, None], axis=1)[:, 0].astype(mx.uint32)
        window = (high << (_WINDOW - k)) | rest
    return found[::-1]


_tables: dict[int, mx.array] = {}


def table(bits: int) -> mx.array:
    """The levels of all windows."""
    if bits not in _tables:
        _tables[bits] = _initial(bits)
        for round in range(_ROUNDS):
            x = mx.random.normal(_TRAINED, key=mx.random.key(round))
            windows = np.array(best_windows(x, [bits] * x.shape[1], [1.0] * x.shape[1])).T
            values = np.array(x)
            counts = np.bincount(windows.ravel(), minlength=_STATES)
            sums = np.bincount(windows.ravel(), values.ravel(), _STATES)
            levels = np.where(counts > 3, sums / np.maximum(counts, 1), np.array(_tables[bits]))
            _tables[bits] = mx.array(levels.astype(np.float32))
    return _tables[bits]


def _initial(bits: int) -> mx.array:
    """Quantiles: the new bits choose a cell, and the others, in any order, a place within it."""
    quantiles = np.sort(np.random.default_rng(0).standard_normal(100 * _STATES))[50::100]
    window = np.arange(_STATES)
    fine = np.random.default_rng(1).permutation(_STATES >> bits)[window >> bits]
    return mx.array(quantiles[(window % (1 << bits)) * (_STATES >> bits) + fine].astype(np.float32))


def distortion(bits: int) -> float:
    """The mean squared error of unit Gaussian values that the table was not trained on."""
    x = mx.random.normal((512, 128), key=mx.random.key(10_000))
    windows = best_windows(x, [bits] * 128, [1.0] * 128)
    levels = mx.stack([mx.take(table(bits), window) for window in windows], axis=1)
    return mx.square(levels - x).mean().item()


def trellis_levels(y: mx.array, quantizer: TurboQuantizer) -> mx.array:
    """The levels of coordinates y (H, n, d) of unit mean square, with the bits of a quantizer."""
    heads, _, dim = y.shape
    pattern = quantizer.pattern
    eights = [pattern] * 4 if isinstance(pattern, int) else list(pattern)
    bits = np.array([eights[i // 8 % 4] for i in range(dim)])
    coded = np.flatnonzero((bits > 0) & (bits <= _MOST_BITS))
    levels = quantizer._levels_of(quantizer._codes_of(y))
    if not coded.size:
        return levels
    basis = quantizer.basis
    found = []
    for head in range(heads):
        weights = np.ones(dim) if basis is None else np.array(basis.weights[head, 0])
        parts = []
        for start in range(0, y.shape[1], _BATCH):
            x = y[head, start : start + _BATCH][:, mx.array(coded)]
            own = [int(k) for k in bits[coded]]
            windows = best_windows(x, own, weights[coded].tolist())
            parts.append(mx.stack([mx.take(table(k), w) for k, w in zip(own, windows)], axis=1))
        columns = mx.array(levels[head])
        columns[:, mx.array(coded)] = mx.concatenate(parts)
        found.append(columns)
    return mx.stack(found)


class TrellisRounding:
    """Rounds vectors (1, H, n, d) as a quantizer does, with trellis codes."""

    def __init__(self, quantizer: TurboQuantizer, least_energy: float):
        self.quantizer = quantizer
        self.least_energy = least_energy
        self.mean: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if self.mean is None:
            self.mean = removable_mean(x, self.least_energy)
        total = self.quantizer._sum
        y = self.quantizer.rotation.apply(x.astype(mx.float32) - self.mean)[0]
        length = mx.sqrt(mx.square(y).mean(axis=-1, keepdims=True)) + 1e-20
        y = y / length
        best, best_cosine = mx.zeros_like(y), mx.full(length.shape, -mx.inf)
        for gain in _GAINS:
            levels = trellis_levels(gain * y, self.quantizer)
            cosine = total(y * levels) / mx.sqrt(total(levels * levels))
            best = mx.where(cosine > best_cosine, levels, best)
            best_cosine = mx.maximum(cosine, best_cosine)
            mx.eval(best, best_cosine)
        product = total(y * best)
        scale = mx.minimum(total(y * y) / product, 2 * product / total(best * best))
        scale = (scale * length).astype(mx.bfloat16).astype(mx.float32)
        restored = self.quantizer.rotation.invert((best * scale)[None])
        return (restored + self.mean).astype(x.dtype)


class ScalarRounding(TrellisRounding):
    """Rounds vectors (1, H, n, d) as a quantizer does."""

    def __call__(self, x: mx.array) -> mx.array:
        if self.mean is None:
            self.mean = removable_mean(x, self.least_energy)
        packed = self.quantizer.quantize(x.astype(mx.float32) - self.mean)
        packed = packed._replace(scales=packed.scales.astype(mx.bfloat16))
        return (self.quantizer.dequantize(packed) + self.mean).astype(x.dtype)


ROUNDINGS: dict[str, Callable[..., TrellisRounding]] = {
    "scalar": ScalarRounding,
    "trellis": TrellisRounding,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--profile", type=Path, required=True, help="a file that calibrate wrote")
    add("--kv-bits", nargs="+", default=["3", "2"])
    add("--context", type=int, default=1280, help="tokens per text")
    add("--scored", type=int, default=128, help="last tokens to compare")
    add("--samples", type=int, default=2, help="texts")
    args = parser.parse_args()

    model, tokenizer = mlx_lm.load(args.model)
    prepare_for_device(model)
    own = json.loads(args.profile.read_text())["fingerprint"]
    give_profile(model, load_profile(args.profile, [own]))
    compression = compression_of(model)
    contexts = texts.contexts(tokenizer, texts.bundled_texts(), args.context, args.samples)
    read = [read_prompt(model, EXACT, mx.array(text[: -args.scored])) for text in contexts]
    scored = [mx.array(text[-args.scored :]) for text in contexts]
    exact = [
        list(log_probabilities(model, copy.deepcopy(cache), tokens))
        for cache, tokens in zip(read, scored)
    ]
    print("| bits | code | KL | of each text, to scalar |\n|---|---|---|---|", flush=True)
    for budget in args.kv_bits:
        settings = preset(budget).settings
        sides = list(zip(compression.compressible, compression.bits(settings)))
        bases = compression.bases(settings) or [None] * len(sides)
        baseline = None
        for name, rounding in ROUNDINGS.items():
            found = []
            for prompt, tokens, expected in zip(read, scored, exact):
                roundings = [
                    (
                        rounding(shared_quantizer(place.keys.dim, keys, 0, basis), 0.0),
                        rounding(shared_quantizer(place.values.dim, values, 0), VALUE_MEAN_ENERGY),
                    )
                    for (place, (keys, values)), basis in zip(sides, bases)
                ]
                rows = log_probabilities(model, filled_cache(model, prompt, roundings), tokens)
                each = mx.concatenate([divergence(*pair) for pair in zip(expected, rows)])
                found.append(each.mean().item())
            baseline = baseline or found
            ratios = " ".join(f"{x / y:.2f}" for x, y in zip(found, baseline))
            print(f"| {budget} | {name} | {np.mean(found):.5f} | {ratios} |", flush=True)
    print(", ".join(f"{k} bits: {distortion(k):.4f}" for k in sorted(_tables)))


if __name__ == "__main__":
    main()
