"""Code keys and values with trellis codes, on the axes and bits of a profile, and compare.

    python examples/studies/trellis.py --model MODEL --profile FILE --kv-bits 3 2 --codes 8 8:run

The level of a coordinate is an entry of a table at a window of the code stream, of which as many
bits are new as the coordinate has. An encoder searches the best path (Viterbi). Tables are trained
on Gaussian values. Coordinates of 5 and more bits keep scalar codes. All else is as in our codec,
for all codes: axes of keys with bits by variance, bits allocated over layers and sides, means
removed, a search for the gain and the unbiased scale.

A code is named by the bits of its window, then where its streams wrap, and the number of gains. A
stream of ``zero`` is a vector and starts with a window of zeros. One of ``run``, ``group`` or
``vector`` is a ring: the last bits of 32 coordinates, of the coordinates of one group of axes, or
of all of them stand before its first. So ``8`` is ``8:zero:3``. ``8:zero:3:keys`` codes only keys
so, and ``values`` only values.

Prints the mean KL divergence of each code, its ratio to scalar codes, and that of each text.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx_lm
import numpy as np
from compare_codecs import filled_cache
from simulated import Rounding
from tqdm import tqdm

from mlx_turboquant.codec.quantizer import TurboQuantizer
from mlx_turboquant.kernels.arguments import _eights
from mlx_turboquant.kernels.storage import VALUE_MEAN_ENERGY, removable_mean, shared_quantizer
from mlx_turboquant.lm import texts
from mlx_turboquant.lm.compression import compression_of, give_profile
from mlx_turboquant.lm.loading import prepare_for_device
from mlx_turboquant.lm.profile import load_profile
from mlx_turboquant.measure.cache_specs import EXACT, preset
from mlx_turboquant.measure.evaluate import divergence, log_probabilities, read_prompt

_MOST_BITS = 4
_GAINS = {1: (1.0,), 3: (0.9, 1.0, 1.1), 5: (0.8, 0.9, 1.0, 1.1, 1.2)}
WRAPS = ("zero", "run", "group", "vector")
# Costs that are compared at once: of all windows of several vectors.
_COSTS = 1 << 19 if mx.default_device().type == mx.DeviceType.cpu else 1 << 24
_ROUNDS, _TRAINED = 30, (256, 128)


class Code(NamedTuple):
    """A trellis code, and the sides that have it."""

    window: int = 8
    wrap: str = "zero"
    gains: tuple[float, ...] = _GAINS[3]
    sides: tuple[str, ...] = ("keys", "values")


def code_of(name: str) -> Code:
    """The code of a name.

    Raises:
        ValueError: a name that is none.
    """
    window, wrap, gains, *sides = name.split(":") + ["zero", "3"][name.count(":") :]
    fits = wrap in WRAPS and gains in map(str, _GAINS) and window in map(str, range(5, 13))
    if not (fits and len(sides) < 2 and set(sides) <= {"keys", "values"}):
        raise ValueError(f"{name!r} is not a code: use a name like 8, 10:run or 8:zero:3:keys.")
    return Code(int(window), wrap, _GAINS[int(gains)], tuple(sides) or ("keys", "values"))


def best_windows(
    x: mx.array, bits: Sequence[int], weights: mx.array, window: int, is_ring: bool = False
) -> list[mx.array]:
    """The windows of x (n, d), one array (n,) for each coordinate, with the least squared error.

    ``bits`` are those of each coordinate, and ``weights`` (n, d) or (d,) the weights of its error.
    In a ring the last bits stand before the first ones. The stream then starts as it does in the
    best path of a doubled vector, which is nearly always the best ring.
    """
    start, weights = mx.zeros((len(x), 1), mx.uint32), mx.broadcast_to(weights, x.shape)
    if is_ring:
        twice = [mx.concatenate([each, each], axis=1) for each in (x, weights)]
        start = _path(twice[0], [*bits, *bits], twice[1], window)[len(bits) - 1][:, None]
    return _path(x, bits, weights, window, start, is_ring)


def _path(
    x: mx.array,
    bits: Sequence[int],
    weights: mx.array,
    window: int,
    start: mx.array | None = None,
    is_ring: bool = False,
) -> list[mx.array]:
    """The best windows behind a window ``start`` (n, 1), or any; those of a ring end with it."""
    states = 1 << window
    cost = mx.zeros((len(x), states))
    if start is not None:
        cost = mx.where(mx.arange(states) == start, cost, 1e9)
    choices = []
    for i, k in enumerate(bits):
        # A window's low bits are the high ones of the next.
        before = cost.reshape(len(x), 1 << k, states >> k)
        choices.append(before.argmin(axis=1).astype(mx.uint8))
        cost = _with_error(before.min(axis=1), x[:, i, None], weights[:, i, None], table(window, k))
    last = start[:, 0] if is_ring else cost.argmin(axis=1)
    found = []
    for k, choice in zip(reversed(bits), reversed(choices)):
        found.append(last)
        rest = last >> k
        high = mx.take_along_axis(choice, rest[:, None], axis=1)[:, 0].astype(mx.uint32)
        last = (high << (window - k)) | rest
    return found[::-1]


@mx.compile
def _with_error(cost: mx.array, x: mx.array, weight: mx.array, levels: mx.array) -> mx.array:
    """Costs (n, s) of windows before, repeated for those after, whose levels are given."""
    errors = mx.square(x - levels).reshape(len(x), cost.shape[1], -1)
    return (cost[..., None] + weight[..., None] * errors).reshape(len(x), -1)


_tables: dict[tuple[int, int], mx.array] = {}


def table(window: int, bits: int) -> mx.array:
    """The levels of all windows."""
    if (window, bits) not in _tables:
        _tables[window, bits] = _initial(window, bits)
        size = 1 << window
        for round in range(_ROUNDS):
            x = mx.random.normal(_TRAINED, key=mx.random.key(round))
            found = best_windows(x, [bits] * x.shape[1], mx.ones(x.shape[1]), window)
            windows, values = np.array(mx.stack(found, axis=1)), np.array(x)
            counts = np.bincount(windows.ravel(), minlength=size)
            sums = np.bincount(windows.ravel(), values.ravel(), size)
            before = np.array(_tables[window, bits])
            levels = np.where(counts > 3, sums / np.maximum(counts, 1), before)
            _tables[window, bits] = mx.array(levels.astype(np.float32))
    return _tables[window, bits]


def _initial(window: int, bits: int) -> mx.array:
    """Quantiles: the new bits choose a cell, and the others, in any order, a place within it."""
    size = 1 << window
    quantiles = np.sort(np.random.default_rng(0).standard_normal(100 * size))[50::100]
    all_windows = np.arange(size)
    fine = np.random.default_rng(1).permutation(size >> bits)[all_windows >> bits]
    return mx.array(
        quantiles[(all_windows % (1 << bits)) * (size >> bits) + fine].astype(np.float32)
    )


def distortion(bits: int, window: int = 8, is_ring: bool = False) -> float:
    """The mean squared error of unit Gaussian values that the table was not trained on."""
    x = mx.random.normal((512, 128), key=mx.random.key(10_000))
    windows = best_windows(x, [bits] * 128, mx.ones(128), window, is_ring)
    levels = mx.stack([mx.take(table(window, bits), each) for each in windows], axis=1)
    return mx.square(levels - x).mean().item()


def trellis_levels(y: mx.array, quantizer: TurboQuantizer, code: Code) -> mx.array:
    """The levels of coordinates y (H, n, d) of unit mean square, with the bits of a quantizer."""
    dim, basis = y.shape[-1], quantizer.basis
    bits = np.array(_eights(quantizer))[np.arange(dim) // 8 % 4]
    coordinates = np.flatnonzero((bits > 0) & (bits <= _MOST_BITS))
    levels = quantizer._levels_of(quantizer._codes_of(y))
    weights = mx.ones(y.shape) if basis is None else mx.broadcast_to(basis.weights, y.shape)
    columns = list(mx.unstack(levels.reshape(-1, dim), axis=1))
    step = max(1, _COSTS >> code.window)
    for ring in _rings(coordinates, code.wrap):
        own, at = bits[ring].tolist(), mx.array(ring)
        if code.wrap != "zero" and sum(own) < code.window:
            continue  # a window has bits twice: such a ring keeps scalar codes
        parts = []
        for start in range(0, y[..., 0].size, step):
            x, w = (z.reshape(-1, dim)[start : start + step][:, at] for z in (y, weights))
            found = best_windows(x, own, w, code.window, code.wrap != "zero")
            tables = [mx.take(table(code.window, k), each) for k, each in zip(own, found)]
            parts.append(mx.stack(tables, axis=1))
        for i, column in zip(ring, mx.unstack(mx.concatenate(parts), axis=1)):
            columns[i] = column
    return mx.stack(columns, axis=1).reshape(y.shape)


def _rings(coordinates: np.ndarray, wrap: str) -> list[np.ndarray]:
    """The coordinates of each stream."""
    part = {"run": coordinates // 32, "group": coordinates // 8 % 4}.get(wrap, 0 * coordinates)
    return [coordinates[part == each] for each in np.unique(part)]


class ScalarRounding:
    """Rounds vectors (1, H, n, d) as a quantizer does, after the mean of the first is removed."""

    def __init__(self, quantizer: TurboQuantizer, least_energy: float):
        self.quantizer, self.least_energy = quantizer, least_energy
        self.mean: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if self.mean is None:
            self.mean = removable_mean(x, self.least_energy)
        return (self.restored(x.astype(mx.float32) - self.mean) + self.mean).astype(x.dtype)

    def restored(self, x: mx.array) -> mx.array:
        """What codes keep of float32 vectors without their mean."""
        packed = self.quantizer.quantize(x)
        packed = packed._replace(scales=packed.scales.astype(mx.bfloat16))
        return self.quantizer.dequantize(packed)


class TrellisRounding(ScalarRounding):
    """The same with trellis codes."""

    def __init__(self, quantizer: TurboQuantizer, least_energy: float, code: Code):
        super().__init__(quantizer, least_energy)
        self.code = code

    def restored(self, x: mx.array) -> mx.array:
        total = self.quantizer._sum
        y = self.quantizer.rotation.apply(x)[0]
        length = mx.sqrt(mx.square(y).mean(axis=-1, keepdims=True)) + 1e-20
        y = y / length
        best, best_cosine = mx.zeros_like(y), mx.full(length.shape, -mx.inf)
        for gain in self.code.gains:
            levels = trellis_levels(gain * y, self.quantizer, self.code)
            cosine = total(y * levels) / mx.sqrt(total(levels * levels))
            best = mx.where(cosine > best_cosine, levels, best)
            best_cosine = mx.maximum(cosine, best_cosine)
            mx.eval(best, best_cosine)
        product = total(y * best)
        scale = mx.minimum(total(y * y) / product, 2 * product / total(best * best))
        scale = (scale * length).astype(mx.bfloat16).astype(mx.float32)
        return self.quantizer.rotation.invert((best * scale)[None])


def roundings(
    quantizers: tuple[TurboQuantizer, TurboQuantizer], code: Code | None
) -> list[Rounding]:
    """Those of keys and values of a layer; without a code both are scalar."""
    found: list[Rounding] = []
    for side, quantizer in zip(("keys", "values"), quantizers):
        energy = 0.0 if side == "keys" else VALUE_MEAN_ENERGY
        if code and side in code.sides:
            found.append(TrellisRounding(quantizer, energy, code))
        else:
            found.append(ScalarRounding(quantizer, energy))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--profile", type=Path, required=True, help="a file that calibrate wrote")
    add("--kv-bits", nargs="+", default=["3", "2"])
    add("--codes", nargs="+", default=["8"])
    add("--context", type=int, default=1280, help="tokens per text")
    add("--scored", type=int, default=128, help="last tokens to compare")
    add("--samples", type=int, default=2, help="texts")
    args = parser.parse_args()
    codes = {"scalar": None, **{name: code_of(name) for name in args.codes}}

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
    print("| bits | code | KL | to scalar | of each text |\n|---|---|---|---|---|", flush=True)
    bar = tqdm(total=len(args.kv_bits) * len(codes) * len(read), unit="texts")
    for budget in args.kv_bits:
        settings = preset(budget).settings
        sides = list(zip(compression.compressible, compression.bits(settings)))
        bases = compression.bases(settings) or [None] * len(sides)
        quantizers = [
            (
                shared_quantizer(place.keys.dim, keys, 0, basis),
                shared_quantizer(place.values.dim, values, 0),
            )
            for (place, (keys, values)), basis in zip(sides, bases)
        ]
        scalar: list[float] = []
        for name, code in codes.items():
            found = []
            for prompt, tokens, expected in zip(read, scored, exact):
                cache = filled_cache(model, prompt, [roundings(each, code) for each in quantizers])
                rows = log_probabilities(model, cache, tokens)
                each = mx.concatenate([divergence(*pair) for pair in zip(expected, rows)])
                found.append(each.mean().item())
                bar.update()
            scalar = scalar or found
            ratios = " ".join(f"{x / y:.2f}" for x, y in zip(found, scalar))
            share = np.mean(found) / np.mean(scalar)
            print(
                f"| {budget} | {name} | {np.mean(found):.5f} | {share:.2f} | {ratios} |", flush=True
            )
    print(", ".join(f"{at}: {distortion(*at[::-1]):.4f}" for at in sorted(_tables)))


if __name__ == "__main__":
    main()
