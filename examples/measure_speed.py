"""Tokens per second with the exact and with a compressed cache, in thirty lines.

    python examples/measure_speed.py --model examples/tiny-lm --tokens 4000 --bits 4

``mlx_turboquant benchmark`` does the same for many lengths, with repeats and pictures.
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
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to decode")
    parser.add_argument("--bits", default="4", help="a preset as 4, 3.5 or K5V3")
    args = parser.parse_args()

    model, tokenizer = mlx_lm.load(args.model)
    mx.eval(prepare_for_device(model).parameters())
    tokens = standard_library_tokens(tokenizer, args.tokens)[: args.tokens]
    prompt = mx.array([tokens])
    codecs = (EXACT, preset(args.bits))
    for codec in codecs:  # compiles, and fills MLX's store of buffers
        measure(model, codec, prompt[:, :512], 40)
    for codec in codecs:
        measured = measure(model, codec, prompt, args.new_tokens)
        print(
            f"{codec.name:8} prefill {len(tokens) / measured.prefill:8,.0f} tokens/s, "
            f"decode {1 / measured.decode:7,.1f} tokens/s"
        )


if __name__ == "__main__":
    main()
