"""Code keys in a basis learned from calibration texts, with bits by variance, and compare.

    python examples/studies/learned_basis.py --model MODEL --arms 0:16 0.25:16 --kv-bits 4 3

An arm like ``0.25:16`` names the power of the metric and the coordinates of a group. For each key
head of a layer, C is the covariance of the keys of the calibration texts and M that of its queries
to the power of the metric. The axes are those of M^(1/2) C M^(1/2): an error e of a key costs
e^T M e. Groups of axes get bits by their variance, and a random rotation evens out the coordinates
of a group. Everything else is as in our codec: the mean is removed, gains are searched, and one
scale a vector makes products with M unbiased.

Words behind the numbers change an arm. ``layer``: the heads of a layer have one pattern of bits.
``few``: it is one of those that the package has. ``shared``: the heads of a layer have one basis.
``far``: the rotary embedding turns keys and queries to 64 places of a text of 32,768 tokens, and
moments are the means over them. ``mixed``: the same, with half of the places evenly spread in their
logarithms. The package's axes for keys of 64 values are those of ``0.5:16:mixed:few``.

Bits of layers and sides follow a calibration that codes keys in the arm's basis. Prints the mean KL
divergence of each arm for each seed of the rotations; its ratio to ``random``, both in the mean
over seeds; and the largest such ratio of any text. *Patterns* counts patterns of bits over groups,
like the bits of keys for the last seed.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from compare_codecs import SINKS, filled_cache, turboquant
from simulated import Rounding
from tqdm import tqdm

from mlx_turboquant.codec.basis import _METRIC_RIDGE, _RIDGE, PATTERNS, _errors, _power
from mlx_turboquant.codec.codebook import MAX_BITS, codebook
from mlx_turboquant.codec.rotation import gaussian_matrix
from mlx_turboquant.kernels.storage import removable_mean
from mlx_turboquant.lm import calibrate, texts
from mlx_turboquant.lm.axes import Moments, all_places, moments, turns, watched
from mlx_turboquant.lm.compressible import Compressible, plain_caches
from mlx_turboquant.lm.compression import compression_of, give_profile
from mlx_turboquant.lm.loading import prepare_for_device
from mlx_turboquant.measure.cache_specs import EXACT, preset
from mlx_turboquant.measure.evaluate import divergence, log_probabilities, read_prompt

_GAINS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2)
_TOKENS = 1024


class Basis(NamedTuple):
    """Axes of each key head: float32 (H, d, d), their inverse, and variances (H, d) in groups.

    ``bits`` (H, d) are those of a coordinate, by the variance of its group. The package's own basis
    has four groups, and heads that share a pattern of bits.
    """

    axes: mx.array
    inverse: mx.array
    variances: np.ndarray
    bits: np.ndarray


def moments_of(model: nn.Module, tokens: list[list[int]]) -> dict[int, Moments]:
    """The moments of each compressed layer, by the place of its cache: the means over texts."""
    found: dict[int, list[Moments]] = {}
    for text in tokens:
        caches = plain_caches(model)
        with watched(model) as watch:
            model(mx.array([text]), cache=caches)
        for place in compression_of(model).compressible:
            cache = place.of(caches)
            keys = cache.keys[:, :, SINKS : cache.offset].astype(mx.float32)
            [queries] = watch.queries[id(cache)]
            queries = queries.reshape(1, keys.shape[1], -1, keys.shape[3]).astype(mx.float32)
            found.setdefault(place.place, []).append(moments(keys, queries))
    return {
        place: Moments(*(np.mean(of_texts, axis=0) for of_texts in zip(*each)))
        for place, each in found.items()
    }


def learned(
    found: Moments, metric: float, group: int, bits: int, seed: int, words: Sequence[str] = ()
) -> Basis:
    """The basis of the keys of a layer with a mean of ``bits`` for each head.

    ``words`` are those of an arm.
    """
    dim = found.keys.shape[-1]
    if "shared" in words:
        found = Moments(*(np.broadcast_to(x.mean(axis=0), x.shape) for x in found))
    half = _power(found.queries, metric / 2, _METRIC_RIDGE)
    covariance = _power(found.keys, 1, _RIDGE)
    values, vectors = np.linalg.eigh(half @ covariance @ half)
    values, vectors = values[:, ::-1], vectors[:, :, ::-1]
    variances = np.repeat(values.reshape(len(values), -1, group).mean(axis=2), group, axis=1)
    turned = np.zeros((dim, dim))
    for start in range(0, dim, group):
        part = slice(start, start + group)
        turned[part, part] = np.linalg.qr(gaussian_matrix(group, group, seed + start))[0]
    axes = half @ vectors @ turned / np.sqrt(variances)[:, None, :]
    one = "layer" in words or "few" in words
    judged = (variances.sum(axis=0, keepdims=True) if one else variances)[:, ::group]
    if "few" in words:
        patterns = [_one_of_few(each, bits, dim) for each in judged]
    else:
        patterns = [_pattern(each, bits, dim) for each in judged]
    chosen = np.broadcast_to(patterns, (len(values), dim // group))
    inverse = np.linalg.inv(axes)
    arrays = (mx.array(x.astype(np.float32)) for x in (axes, inverse))
    return Basis(*arrays, variances, np.repeat(chosen, group, axis=1))


def _one_of_few(variances: np.ndarray, bits: int, dim: int) -> np.ndarray:
    """The pattern of least squared error of those that the package has."""
    quarters = [bits + np.array(offsets) for offsets in PATTERNS]
    possible = [q for q in quarters if q.min() >= 0 and q.max() <= MAX_BITS]
    patterns = np.repeat(possible, len(variances) // 4, axis=1)
    return patterns[np.argmin((_errors(dim)[patterns] * variances).sum(axis=1))]


def _pattern(variances: np.ndarray, bits: int, dim: int) -> np.ndarray:
    """Bits of groups: one more goes where it lowers the squared error most."""
    errors = _errors(dim)
    chosen = np.zeros(len(variances), int)
    while chosen.sum() < bits * len(variances):
        gains = [
            v * (errors[b] - errors[b + 1]) if b < MAX_BITS else -1
            for v, b in zip(variances, chosen)
        ]
        chosen[int(np.argmax(gains))] += 1
    return chosen


class LearnedRounding:
    """Rounds keys (B, H, n, d) in a basis; the mean of the first block is removed."""

    def __init__(self, basis: Basis):
        self.basis = basis
        self.mean: mx.array | None = None
        self.weights = mx.array(basis.variances.astype(np.float32))[None, :, None]
        self.masks = {
            int(b): mx.array(basis.bits == b)[None, :, None] for b in np.unique(basis.bits)
        }

    def __call__(self, x: mx.array) -> mx.array:
        if self.mean is None:
            self.mean = removable_mean(x)
        z = (x.astype(mx.float32) - self.mean) @ self.basis.axes[None]
        length = mx.sqrt(mx.square(z).mean(axis=-1, keepdims=True)) + 1e-20
        z = z / length
        best, best_cosine = mx.zeros_like(z), mx.full(length.shape, -mx.inf)
        for gain in _GAINS:
            levels = self._levels(gain * z)
            product, squared = self._sum(z * levels), self._sum(levels * levels)
            cosine = product / mx.sqrt(squared + 1e-20)
            best = mx.where(cosine > best_cosine, levels, best)
            best_cosine = mx.maximum(cosine, best_cosine)
        scale = self._sum(z * z) / mx.maximum(self._sum(z * best), 1e-9)
        return ((best * scale * length) @ self.basis.inverse[None] + self.mean).astype(x.dtype)

    def _sum(self, x: mx.array) -> mx.array:
        return (self.weights * x).sum(axis=-1, keepdims=True)

    def _levels(self, z: mx.array) -> mx.array:
        result = mx.zeros_like(z)
        for bits, mask in self.masks.items():
            if bits:
                book = codebook(z.shape[-1], bits)
                levels, thresholds = (mx.array(each.astype(np.float32)) for each in book)
                found = mx.take(levels, mx.searchsorted(thresholds, z))
                result = mx.where(mask, found, result)
        return result


@contextmanager
def _keys_rounded(rounding_of: Callable[[Compressible, int], Rounding]) -> Iterator[None]:
    """Let ``calibrate`` round the keys of a layer by ``rounding_of(place, bits)``."""
    places: list[Compressible] = []
    divergences, quantized = calibrate._Rows.divergences, calibrate._quantized

    def noted(self: Any, place: Compressible, basis: None = None) -> list[list[float]]:
        places[:] = [place]
        return divergences(self, place)

    def rounded(x: mx.array, count: int, bits: int, are_keys: bool, basis: None = None) -> mx.array:
        if not are_keys:
            return quantized(x, count, bits, are_keys)
        end = count - int(calibrate._EXACT_PART * count)
        middle = rounding_of(places[0], bits)(x[:, :, SINKS:end])
        return mx.concatenate([x[:, :, :SINKS], middle, x[:, :, end:]], axis=2)

    # The package would learn bases too, and judge bits with them.
    own = {"_quantized": rounded, "learned_bases": lambda *_: ()}
    with patch.object(calibrate._Rows, "divergences", noted), patch.multiple(calibrate, **own):
        yield


class Arm:
    """Roundings of keys: at random, or in a basis that is made once for each layer and bits."""

    def __init__(self, name: str, model: nn.Module, found: dict[int, Moments], seed: int):
        self.parts = name.split(":")
        self.model = model
        self.found = found
        self.seed = seed
        self.bases: dict[tuple[int, int], Basis] = {}
        self.turned: dict[int, Moments] = {}

    def rounding(self, place: Compressible, bits: int) -> Rounding:
        if self.parts == ["random"]:
            return turboquant(bits, place.keys.dim, True, self.seed)
        key = place.place, bits
        if key not in self.bases:
            metric, group, *words = self.parts
            if place.place not in self.turned:
                self.turned[place.place] = self._moments(place, words)
            found = self.turned[place.place]
            self.bases[key] = learned(found, float(metric), int(group), bits, self.seed, words)
        return LearnedRounding(self.bases[key])

    def _moments(self, place: Compressible, words: list[str]) -> Moments:
        found = self.found[place.place]
        if not {"far", "mixed"} & set(words):
            return found
        offsets = all_places()
        if "far" in words:
            offsets = np.linspace(0, offsets.max(), len(offsets))
        rope = self.model.layers[place.layer].self_attn.rope
        return found.turned(turns(rope, place.keys.dim, offsets))

    def patterns(self, chosen: list[tuple[Compressible, int]]) -> int:
        """How many patterns of bits these layers have, each with its bits of keys."""
        if self.parts == ["random"]:
            return len({bits for _, bits in chosen})
        bases = [self.bases[place.place, bits] for place, bits in chosen]
        return len({tuple(head) for basis in bases for head in basis.bits.tolist()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--arms", nargs="+", default=["0.25:16", "0.5:16", "0.5:16:layer", "0.5:16:shared"])
    add("--kv-bits", nargs="+", default=["4", "3", "2.5", "2"])
    add("--text", nargs="+", type=Path, help="files to measure on (default: bundled ones)")
    add("--context", type=int, default=2048, help="tokens per text")
    add("--scored", type=int, default=128, help="last tokens to compare")
    add("--samples", type=int, default=4, help="texts")
    add("--seeds", type=int, nargs="+", default=[0], help="of the rotations")
    add(
        "--leave-out",
        metavar="NAME",
        help="measure on this calibration text, learn from the others",
    )
    args = parser.parse_args()

    model, tokenizer = mlx_lm.load(args.model)
    prepare_for_device(model)
    learning = calibrate.calibration_texts()
    source = texts.read_texts(args.text) if args.text else texts.bundled_texts()
    if args.leave_out:
        source = [learning.pop(args.leave_out)]
    start = texts.start_tokens(tokenizer)
    encoded = texts.encode(tokenizer, learning.values())
    found = moments_of(model, [(start + tokens)[:_TOKENS] for tokens in encoded])
    contexts = texts.contexts(tokenizer, source, args.context, args.samples)
    read = [read_prompt(model, EXACT, mx.array(text[: -args.scored])) for text in contexts]
    scored = [mx.array(text[-args.scored :]) for text in contexts]
    exact = [
        mx.concatenate(list(log_probabilities(model, copy.deepcopy(cache), tokens)))
        for cache, tokens in zip(read, scored)
    ]
    places = compression_of(model).compressible

    def divergences(arm: Arm, bits: list[tuple[int, int]], seed: int) -> Iterator[float]:
        for cache, tokens, expected in zip(read, scored, exact):
            roundings = [
                (arm.rounding(place, own), turboquant(others, place.values.dim, False, seed))
                for place, (own, others) in zip(places, bits)
            ]
            rounded = filled_cache(model, cache, roundings)
            rows = mx.concatenate(list(log_probabilities(model, rounded, tokens)))
            yield divergence(expected, rows).mean().item()
            mx.clear_cache()

    needs_profile = not all(preset(budget).settings.is_fixed for budget in args.kv_bits)
    names = ["random", *args.arms]
    bar = tqdm(total=len(names) * len(args.seeds) * len(args.kv_bits), unit="caches")
    bar.write("| keys | bits | bits of keys | patterns | KL by seed | to random | worst text |")
    bar.write("|---|---|---|---|---|---|---|")
    baseline: dict[str, np.ndarray] = {}
    for name in names:
        own: dict[str, list[list[float]]] = {budget: [] for budget in args.kv_bits}
        notes = {}
        for seed in args.seeds:
            arm = Arm(name, model, found, seed)
            if needs_profile:
                with _keys_rounded(arm.rounding):
                    give_profile(model, calibrate.calibrate(model, tokenizer, learning))
            for budget in args.kv_bits:
                bits = compression_of(model).bits(preset(budget).settings)
                own[budget].append(list(divergences(arm, bits, seed)))
                keys = [key_bits for key_bits, _ in bits]
                notes[budget] = f"{np.mean(keys):.2f} | {arm.patterns(list(zip(places, keys)))}"
                bar.update()
        for budget, rows in own.items():
            mean = np.mean(rows, axis=0)  # of each text
            random = baseline.setdefault(budget, mean)
            seeds = " ".join(f"{np.mean(row):.5f}" for row in rows)
            ratios = f"{mean.sum() / random.sum():.2f} | {(mean / random).max():.2f}"
            bar.write(f"| {name} | {budget} | {notes[budget]} | {seeds} | {ratios} |")
    bar.close()


if __name__ == "__main__":
    main()
