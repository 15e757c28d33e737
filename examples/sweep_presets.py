"""Which split of the bits is best: KL divergence of many settings on several models.

    python examples/sweep_presets.py --models examples/tiny-lm OTHER ... --out sweep.json

A setting is the bits of keys and values of most layers, what the last eighth of the layers has in
addition, the window and the sinks. Each text is read once with the exact cache; its keys and
values then fill a simulated cache of every setting, and the last tokens are decoded. Prints for
every budget the best settings, by the geometric mean of the divergences of the models.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx_lm
import numpy as np
from simulated_cache import SimulatedCache, filled_caches, turboquant
from tqdm import tqdm

from mlx_turboquant import texts
from mlx_turboquant.cli.loading import prepare_for_device
from mlx_turboquant.evaluate import CHUNK, EXACT, divergence, log_probabilities, read_prompt
from mlx_turboquant.integration import is_last

BUDGETS = (2, 2.5, 3, 3.5, 4, 4.5, 5, 6)
SPLITS = tuple((k, v) for k in range(2, 8) for v in range(1, 7) if -1 <= k - v <= 3)
LAST = ((0, 0), (1, 1), (2, 1), (2, 2), (3, 3))
# Of the exact tokens, at one split.
WINDOWS = (0, 32, 64, 128, 256)
SINKS = (0, 4, 16, 64)


class Setting(NamedTuple):
    """Bits of keys and values, more of them in the last layers, and what stays exact."""

    key_bits: int
    value_bits: int
    last_key_bits: int = 0
    last_value_bits: int = 0
    window: int = 64
    sinks: int = 4

    def bits(self, last: bool) -> tuple[int, int]:
        """Bits of keys and values of a layer."""
        more = (self.last_key_bits, self.last_value_bits) if last else (0, 0)
        return min(8, self.key_bits + more[0]), min(8, self.value_bits + more[1])

    @property
    def average(self) -> float:
        """Bits per value without scales, of a model whose number of layers is a multiple of 8."""
        return sum(map(sum, (self.bits(i == 7) for i in range(8)))) / 16

    def filled_cache(self, prompt: list[list[mx.array]]) -> list[SimulatedCache]:
        """A cache that holds the keys and values of a prompt."""
        bits = (self.bits(is_last(i, len(prompt))) for i in range(len(prompt)))
        roundings = (map(turboquant, pair) for pair in bits)
        return filled_caches(prompt, roundings, self.window, self.sinks)


def settings(most: float, reach: float) -> Iterator[Setting]:
    """Splits whose average is at most ``reach`` below some budget, then windows and sinks."""
    for split, last in itertools.product(SPLITS, LAST):
        setting = Setting(*split, *last)
        if any(0 <= budget + most - setting.average <= reach for budget in BUDGETS):
            yield setting
    yield from (Setting(3, 2, 1, 1, window, 4) for window in WINDOWS)
    yield from (Setting(3, 2, 1, 1, 64, sinks) for sinks in SINKS)


def measure(
    model, contexts: list[list[int]], scored: int, candidates: list[Setting]
) -> list[float]:
    """The mean divergence over all texts of each candidate, which has a ``filled_cache``."""
    total = np.zeros(len(candidates))
    bar = tqdm(total=len(contexts) * len(candidates), unit="texts")
    for context in map(mx.array, contexts):
        start = len(context) - scored
        exact_cache = read_prompt(model, EXACT, context[:start], lambda tokens: None)
        prompt = [[x[:, :, :start] for x in (layer.keys, layer.values)] for layer in exact_cache]
        mx.eval(prompt)
        decode = partial(log_probabilities, model, tokens=context[start:], progress=lambda n: None)
        exact = list(decode(cache=exact_cache))
        for i, setting in enumerate(candidates):
            pairs = zip(exact, decode(cache=setting.filled_cache(prompt)))
            divergences = mx.concatenate([divergence(a, b) for a, b in pairs])
            total[i] += divergences.mean().item() / len(contexts)
            bar.update()
    bar.close()
    return total.tolist()


def print_best(candidates: list[Setting], results: dict[str, list[float]], more: float) -> None:
    """For every budget the three best settings, then windows and sinks."""
    means = np.exp(np.mean(np.log([*results.values()]), axis=0))
    print("| budget | keys, values | last layers | average | " + " | ".join(results) + " |")
    print("|---|---|---|---|" + "---|" * len(results))

    def row(label, i):
        s = candidates[i]
        last = "K{} V{}".format(*s.bits(True))
        cells = " | ".join(f"{kl[i]:.5f}" for kl in results.values())
        print(f"| {label} | K{s.key_bits} V{s.value_bits} | {last} | {s.average:.3f} | {cells} |")

    plain = {s: i for i, s in enumerate(candidates) if (s.window, s.sinks) == (64, 4)}.values()
    for budget in BUDGETS:
        within = [i for i in plain if candidates[i].average <= budget + more]
        for i in sorted(within, key=means.__getitem__)[:3]:
            row(budget, i)
    for i, setting in enumerate(candidates):
        if i >= len(candidates) - len(WINDOWS) - len(SINKS):
            row(f"window {setting.window}, {setting.sinks} sinks", i)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", required=True)
    add("--context", type=int, default=CHUNK, help=f"tokens per text, at most {CHUNK}")
    add("--scored", type=int, default=256, help="last tokens to compare")
    add("--samples", type=int, default=4, help="texts")
    add("--more", type=float, default=0.125, help="bits that the average may be above a budget")
    add("--reach", type=float, default=0.375, help="bits below that which are tried as well")
    add("--out", type=Path, help="JSON file of all results")
    args = parser.parse_args()

    candidates = list(settings(args.more, args.reach))
    print(f"{len(candidates)} settings", flush=True)
    results = {}
    for name in args.models:
        model, tokenizer = mlx_lm.load(name)
        prepare_for_device(model)
        contexts = texts.contexts(tokenizer, texts.bundled_texts(), args.context, args.samples)
        results[Path(name).name] = measure(model, contexts, args.scored, candidates)
    print_best(candidates, results, args.more)
    if args.out:
        args.out.write_text(json.dumps({"settings": candidates, "kl": results}))


if __name__ == "__main__":
    main()
