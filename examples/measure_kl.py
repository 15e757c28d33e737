"""KL divergence of a model with a compressed cache to the same model with the exact cache.

    python examples/measure_kl.py --model examples/tiny-lm --bits 4 3 2 --window 64

Each text is read up to --context tokens. The last --scored of them are decoded through the
compressed cache, eight at a time, so that queries see quantized tokens as in use; the divergence
of the next-token distributions is averaged over them. The texts are modules of Python's standard
library, or the files given with --text.
"""

import argparse
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache as make_exact_cache

from mlx_turboquant import cache_size, make_prompt_cache
from mlx_turboquant.cli.loading import prepare_for_device
from mlx_turboquant.integration import split_bits

STEP = 8
MODULES = ("argparse", "tarfile", "typing", "pickle")


def standard_library_texts() -> list[str]:
    """Sources of a few large modules of the running interpreter."""
    folder = Path(argparse.__file__).parent
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]


def log_probabilities(model: nn.Module, tokens: mx.array, scored: int, cache: list) -> mx.array:
    """Log-probabilities (scored, vocabulary) after each of the last ``scored`` tokens."""
    start = len(tokens) - scored
    mx.eval(model(tokens[None, :start], cache=cache))
    rows = []
    for i in range(start, len(tokens), STEP):
        logits = model(tokens[None, i : i + STEP], cache=cache)[0].astype(mx.float32)
        rows.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(rows[-1])
    return mx.concatenate(rows)


def divergence(exact: mx.array, other: mx.array) -> float:
    """Mean KL(exact || other) in nats over the rows of log-probabilities."""
    return (mx.exp(exact) * (exact - other)).sum(axis=-1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="examples/tiny-lm")
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3.5, 3, 2.5, 2])
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--context", type=int, default=2048, help="tokens per text")
    parser.add_argument("--scored", type=int, default=256, help="last tokens to compare")
    parser.add_argument("--text", type=Path, nargs="+", help="files to read")
    args = parser.parse_args()

    model, tokenizer = mlx_lm.load(args.model)
    prepare_for_device(model)
    texts = [path.read_text() for path in args.text] if args.text else standard_library_texts()
    contexts = [mx.array(tokenizer.encode(text, verbose=False)[: args.context]) for text in texts]
    exact = [log_probabilities(model, c, args.scored, make_exact_cache(model)) for c in contexts]
    print("bits  keys  values  KL (nats)  bytes/token")
    for bits in args.bits:
        total = 0.0
        for context, reference in zip(contexts, exact):
            cache = make_prompt_cache(model, bits, window=args.window)
            total += divergence(reference, log_probabilities(model, context, args.scored, cache))
        key_bits, value_bits = split_bits(bits)
        size = cache_size(cache)
        print(
            f"{bits:4}  {key_bits:4}  {value_bits:6}  {total / len(contexts):9.5f}  "
            f"{size.nbytes / size.tokens:11.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
