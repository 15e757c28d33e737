"""Code keys and values with trellis codes, on the axes and bits of a profile, and compare.

    python examples/studies/trellis.py --model MODEL --profile FILE --kv-bits 3 2 --codes 8 8:run

The level of a coordinate is an entry of a table at a window of the code stream, of which as many
bits are new as the coordinate has. An encoder searches the best path (Viterbi). trellis_tables.py
trains the tables. Coordinates of 5 and more bits keep scalar codes. All else is as in our codec,
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
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx_lm
import numpy as np
from compare_codecs import filled_cache
from simulated import Rounding
from tqdm import tqdm
from trellis_tables import BITS, WINDOWS, best_windows, table

from mlx_turboquant.codec.quantizer import TurboQuantizer
from mlx_turboquant.kernels.arguments import eights
from mlx_turboquant.kernels.storage import VALUE_MEAN_ENERGY, removable_mean, shared_quantizer
from mlx_turboquant.lm import texts
from mlx_turboquant.lm.compression import compression_of, give_profile
from mlx_turboquant.lm.loading import prepare_for_device
from mlx_turboquant.lm.profile import load_profile
from mlx_turboquant.measure.cache_specs import EXACT, preset
from mlx_turboquant.measure.evaluate import divergence, log_probabilities, read_prompt

_GAINS = {1: (1.0,), 3: (0.9, 1.0, 1.1), 5: (0.8, 0.9, 1.0, 1.1, 1.2)}
WRAPS = ("zero", "run", "group", "vector")
# Costs that are compared at once: of all windows of several vectors.
_COSTS = 1 << 19 if mx.default_device().type == mx.DeviceType.cpu else 1 << 24


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
    fits = wrap in WRAPS and gains in map(str, _GAINS) and window in map(str, WINDOWS)
    if not (fits and len(sides) < 2 and set(sides) <= {"keys", "values"}):
        raise ValueError(f"{name!r} is not a code: use a name like 8, 8:run or 8:zero:3:keys.")
    return Code(int(window), wrap, _GAINS[int(gains)], tuple(sides) or ("keys", "values"))


def trellis_levels(y: mx.array, quantizer: TurboQuantizer, code: Code) -> mx.array:
    """The levels of coordinates y (H, n, d) of unit mean square, with the bits of a quantizer."""
    dim, basis = y.shape[-1], quantizer.basis
    bits = np.array(eights(quantizer))[np.arange(dim) // 8 % 4]
    coordinates = np.flatnonzero((bits > 0) & (bits <= max(BITS)))
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


if __name__ == "__main__":
    main()
