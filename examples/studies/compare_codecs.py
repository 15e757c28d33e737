"""Compare our codec with others, and with a mean for every tile of keys, at the same bits.

    python examples/studies/compare_codecs.py --model examples/tiny-lm --kv-bits K4V4 K3V3

All are simulated alike: 4 sinks and a window of 128 stay exact, and blocks of 128 tokens leave it.
With one number ``--kv-bits`` allocates bits to the layers, by the profile of the model if it has
one. Prints the mean KL divergence from the exact cache at decode.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from kvarn import KVarN
from simulated import MethodRounding, Rounding, SimulatedCache
from tqdm import tqdm

from mlx_turboquant.kernels.storage import VALUE_MEAN_ENERGY, removable_mean
from mlx_turboquant.lm import texts
from mlx_turboquant.lm.compressible import with_caches
from mlx_turboquant.lm.compression import compression_of
from mlx_turboquant.lm.loading import prepare_for_device
from mlx_turboquant.measure.cache_specs import CHUNK, EXACT, preset
from mlx_turboquant.measure.evaluate import divergence, log_probabilities, read_prompt

WINDOW, SINKS, BLOCK = 128, 4, 128


class Arm(NamedTuple):
    """A codec: a rounding of keys and one of values, made from bits and dimension.

    ``extra`` are the bits per value that it stores besides the codes, for a dimension.
    """

    name: str
    keys: Callable[[int, int], Rounding]
    values: Callable[[int, int], Rounding]
    extra: Callable[[int], float]


def turboquant(bits: int, dim: int, are_keys: bool, seed: int = 0) -> Rounding:
    """Our codec, with the mean of the first block."""
    codec = MethodRounding("turboquant", bits, dim, seed)
    means: list[mx.array] = []

    def rounding(x: mx.array) -> mx.array:
        if not means:
            means.append(removable_mean(x, 0.0 if are_keys else VALUE_MEAN_ENERGY))
        return (codec(x - means[0]) + means[0]).astype(x.dtype)

    return rounding


def turboquant_with_tile_means(bits: int, dim: int, tile: int, mean_bits: int) -> Rounding:
    """Our codec with a mean for every ``tile`` tokens, in ``mean_bits`` with one scale each."""
    codec = MethodRounding("turboquant", bits, dim)
    most = 2 ** (mean_bits - 1) - 1

    def rounding(x: mx.array) -> mx.array:
        means = mx.unflatten(x.astype(mx.float32), 2, (-1, tile)).mean(axis=3)
        scales = mx.abs(means).max(axis=-1, keepdims=True) / most
        scales = mx.maximum(scales.astype(mx.bfloat16).astype(mx.float32), 1e-9)
        means = mx.clip(mx.round(means / scales), -most, most) * scales
        means = mx.repeat(means, tile, axis=2)
        return (codec(x - means) + means).astype(x.dtype)

    return rounding


def kvarn(bits: int, dim: int, by_channel: bool) -> Rounding:
    """KVarN: ``by_channel`` for keys, by token for values."""
    method = KVarN(dim, bits, by_channel=by_channel)
    return lambda x: method.dequantize(method.quantize(x), x.dtype)


affine, turboquant_mse = (partial(MethodRounding, name) for name in ("affine", "mse"))


def _tile_means(tile: int, mean_bits: int) -> Arm:
    return Arm(
        f"mean of {tile} keys in {mean_bits} bits",
        partial(turboquant_with_tile_means, tile=tile, mean_bits=mean_bits),
        partial(turboquant, are_keys=False),
        lambda dim: 16 / dim + (mean_bits + 16 / dim) / tile / 2,
    )


ARMS = (
    Arm("affine, group 64", affine, affine, lambda dim: 0.5),
    Arm("TurboQuant_mse", turboquant_mse, turboquant_mse, lambda dim: 16 / dim),
    Arm(
        "mlx_turboquant",
        partial(turboquant, are_keys=True),
        partial(turboquant, are_keys=False),
        lambda dim: 16 / dim,
    ),
    *(_tile_means(tile, 8) for tile in (128, 64, 32)),
    _tile_means(128, 4),
    Arm(
        "KVarN, tiles of 128",
        partial(kvarn, by_channel=True),
        partial(kvarn, by_channel=False),
        lambda dim: 24 / dim + 24 / BLOCK,
    ),
)


def filled_cache(
    model: nn.Module, read: list[Any], roundings: list[tuple[Rounding, Rounding]]
) -> list[Any]:
    """A simulated copy of the exact prompt cache ``read``; roundings are of keys and values."""
    places, caches = compression_of(model).compressible, []
    for place, pair in zip(places, roundings):
        caches.append(SimulatedCache(*pair, WINDOW, SINKS, BLOCK))
        caches[-1].update_and_fetch(*place.of(read).keys_and_values())
    return with_caches(copy.deepcopy(read), places, caches)


class Candidate(NamedTuple):
    """A codec with the bits of keys and values of every compressed layer."""

    arm: Arm
    name: str
    bits: list[tuple[int, int]]

    def roundings(self, model: nn.Module) -> list[tuple[Rounding, Rounding]]:
        """New roundings of keys and values for each compressed layer."""
        return [
            (self.arm.keys(key_bits, place.keys.dim), self.arm.values(value_bits, place.values.dim))
            for place, (key_bits, value_bits) in zip(compression_of(model).compressible, self.bits)
        ]

    def bits_per_value(self, model: nn.Module) -> float:
        """The mean number of bits stored per value, with scales and means."""
        layers = compression_of(model).compressible
        dims = [side.dim for layer in layers for side in (layer.keys, layer.values)]
        bits = [b for pair in self.bits for b in pair]
        return np.average([b + self.arm.extra(dim) for b, dim in zip(bits, dims)], weights=dims)


def candidates(model: nn.Module, names: list[str]) -> list[Candidate]:
    """All codecs at each of the settings, named as in ``evaluate``."""
    chosen = {name: compression_of(model).bits(preset(name).settings) for name in names}
    return [Candidate(arm, name, bits) for name, bits in chosen.items() for arm in ARMS]


def measure(
    model: nn.Module, contexts: list[list[int]], scored: int, candidates: list[Candidate]
) -> list[float]:
    """The mean divergence of each candidate over all texts, in nats."""
    total = np.zeros(len(candidates))
    bar = tqdm(total=len(contexts) * len(candidates), unit="texts")
    for context in map(mx.array, contexts):
        start = len(context) - scored
        read = read_prompt(model, EXACT, context[:start])
        decode = partial(log_probabilities, model, tokens=context[start:])
        exact = list(decode(cache=copy.deepcopy(read)))
        for i, candidate in enumerate(candidates):
            cache = filled_cache(model, read, candidate.roundings(model))
            pairs = zip(exact, decode(cache=cache))
            divergences = mx.concatenate([divergence(a, b) for a, b in pairs])
            total[i] += divergences.mean().item() / len(contexts)
            bar.update()
    bar.close()
    return total.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--kv-bits", nargs="+", default=["K4V4", "K3V3", "K2V2"], help="as 4 or K4V4")
    add("--text", nargs="+", type=Path, help="files to measure on (default: bundled ones)")
    add("--context", type=int, default=CHUNK, help=f"tokens per text, at most {CHUNK}")
    add("--scored", type=int, default=256, help="last tokens to compare")
    add("--samples", type=int, default=4, help="texts")
    args = parser.parse_args()

    model, tokenizer = mlx_lm.load(args.model)
    prepare_for_device(model)
    source = texts.read_texts(args.text) if args.text else texts.bundled_texts()
    contexts = texts.contexts(tokenizer, source, args.context, args.samples)
    all_candidates = candidates(model, args.kv_bits)
    divergences = measure(model, contexts, args.scored, all_candidates)
    print("| codec | bits | bits a value | KL |\n|---|---|---|---|")
    for candidate, kl in zip(all_candidates, divergences):
        stored = candidate.bits_per_value(model)
        print(f"| {candidate.arm.name} | {candidate.name} | {stored:.3f} | {kl:.5f} |")


if __name__ == "__main__":
    main()
