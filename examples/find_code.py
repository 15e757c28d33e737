"""A trained model finds a code hidden in a long text, with a compressed cache.

    python examples/find_code.py --bits 4 --tokens 4000

The text is the source of a module of Python's standard library, with four lines like
``# The secret code for amber falcon is 402917.`` hidden in it. Runs offline.
"""

import argparse
import sys
from pathlib import Path

import mlx_lm

from mlx_turboquant import cache_size, make_prompt_cache
from mlx_turboquant.cli.loading import prepare_for_device
from mlx_turboquant.needle import answer, hide_codes

TINY_LM = Path(__file__).parent / "tiny-lm"


def standard_library_tokens(tokenizer, count: int) -> list[int]:
    """At least ``count`` tokens of Python's standard library."""
    folder = Path(argparse.__file__).parent
    tokens: list[int] = []
    for path in sorted(folder.glob("*.py"), key=lambda path: path.name == "argparse.py"):
        if len(tokens) >= count:
            break
        tokens += tokenizer.encode(path.read_text(encoding="utf-8"), verbose=False)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(TINY_LM))
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--tokens", type=int, default=4000, help="length of the prompt")
    parser.add_argument("--seed", type=int, default=0, help="which codes are hidden, and where")
    args = parser.parse_args()

    model, tokenizer = mlx_lm.load(args.model)
    prepare_for_device(model)
    text = standard_library_tokens(tokenizer, args.tokens)
    prompt, code = hide_codes(tokenizer, text, args.tokens, seed=args.seed)
    print(f"Reading {len(prompt):,} tokens with a {args.bits:g}-bit cache ...", flush=True)
    print(tokenizer.decode(prompt).splitlines()[-1], end="", flush=True)
    cache = make_prompt_cache(model, args.bits)
    reply = ""
    for response in mlx_lm.stream_generate(
        model, tokenizer, prompt, max_tokens=10, prompt_cache=cache
    ):
        reply += response.text
    reply = reply.splitlines()[0].strip()
    print(f" {reply}\nCache: {cache_size(cache)}")
    found = reply == answer(code).strip()
    print(f"The hidden code was {code}: {'found' if found else 'NOT found'}.")
    sys.exit(0 if found else 1)


if __name__ == "__main__":
    main()
