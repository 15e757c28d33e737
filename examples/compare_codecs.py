"""Our codec beside mlx's affine one and the paper's TurboQuant_mse, at the same bits.

    python examples/compare_codecs.py --model examples/tiny-lm --context 4096

All are simulated alike: 4 sinks and a window of 64 stay exact, keys and values have the same bits.
Prints the mean KL divergence to the exact cache at decode.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx_lm
from simulated_cache import (
    Rounding,
    SimulatedCache,
    affine,
    filled_caches,
    turboquant,
    turboquant_mse,
)
from sweep_presets import measure

from mlx_turboquant import texts
from mlx_turboquant.cli.loading import prepare_for_device


class Arm(NamedTuple):
    """A codec for all layers; ``bits`` are those of a value with its share of scales."""

    name: str
    bits: str
    rounding: Callable[[], Rounding]

    def filled_cache(self, prompt: list[list[mx.array]]) -> list[SimulatedCache]:
        """A cache that holds the keys and values of a prompt."""
        roundings = ((self.rounding(), self.rounding()) for _ in prompt)
        return filled_caches(prompt, roundings, window=64, sinks=4)


def arms(bits: int) -> list[Arm]:
    """The codecs at so many bits."""
    return [
        Arm("affine, group 64", f"{bits}.5", lambda: affine(bits)),
        Arm("TurboQuant_mse", f"{bits} + 16 / dim", lambda: turboquant_mse(bits)),
        Arm("mlx_turboquant", f"{bits} + 16 / dim", lambda: turboquant(bits)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--bits", type=int, nargs="+", default=[4, 3, 2])
    add("--context", type=int, default=2048, help="tokens per text")
    add("--scored", type=int, default=256, help="last tokens to compare")
    add("--samples", type=int, default=4, help="texts")
    args = parser.parse_args()

    model, tokenizer = mlx_lm.load(args.model)
    prepare_for_device(model)
    contexts = texts.contexts(tokenizer, texts.bundled_texts(), args.context, args.samples)
    candidates = [arm for bits in args.bits for arm in arms(bits)]
    print("| codec | bits a value | KL |\n|---|---|---|")
    for arm, kl in zip(candidates, measure(model, contexts, args.scored, candidates)):
        print(f"| {arm.name} | {arm.bits} | {kl:.5f} |")


if __name__ == "__main__":
    main()
