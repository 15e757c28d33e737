"""Bytes of a cache, and what the process really holds and needs while it works.

    python examples/measure_memory.py --model examples/tiny-lm --tokens 4000 --bits 4

Active memory is what MLX holds between steps, without the weights: it would show a hidden copy of
the cache. Peak memory is the most within a step.
"""

import argparse

import mlx.core as mx
import mlx_lm
from find_code import TINY_LM, standard_library_tokens

from mlx_turboquant.benchmark import measure
from mlx_turboquant.cli.loading import prepare_for_device
from mlx_turboquant.evaluate import EXACT, preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(TINY_LM))
    parser.add_argument("--tokens", type=int, default=4000, help="length of the prompt")
    parser.add_argument("--bits", default="4", help="a preset as 4, 3.5 or K5V3")
    args = parser.parse_args()

    model, tokenizer = mlx_lm.load(args.model)
    mx.eval(prepare_for_device(model).parameters())
    tokens = standard_library_tokens(tokenizer, args.tokens)[: args.tokens]
    print("MB       cache  active, decode  peak, prefill  peak, decode")
    for codec in (EXACT, preset(args.bits)):
        measured = measure(model, codec, mx.array([tokens]), 40)
        numbers = (
            *(measured.cache_nbytes, measured.decode_active),
            *(measured.prefill_peak, measured.decode_peak),
        )
        cache, active, prefill, decode = (nbytes / 1e6 for nbytes in numbers)
        print(f"{codec.name:8} {cache:5.1f} {active:15.1f} {prefill:14.1f} {decode:13.1f}")


if __name__ == "__main__":
    main()
