"""Let a trained model look for a code hidden in a long text, with three caches side by side.

    python examples/find_code.py --bits 4 --tokens 4000

The text is the source of a module of Python's standard library, with four lines like
``# The secret code for amber falcon is 402917.`` hidden in it. Runs offline.
"""

import argparse
import re
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx_lm
from hidden_codes import answer, hide_codes

from mlx_turboquant.cli.results import print_rows
from mlx_turboquant.lm.loading import prepare_for_device
from mlx_turboquant.measure.cache_specs import EXACT, MLX_LM, preset, token_size
from mlx_turboquant.measure.evaluate import following_tokens, read_first_chunk, read_on

TINY_LM = Path(__file__).parent / "tiny-lm"
# Tokens that every cache generates after the question.
_REPLY_TOKENS = 96


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
    parser.add_argument("--bits", default="4", help="of our cache (default: 4)")
    parser.add_argument("--tokens", type=int, default=4000, help="length of the prompt")
    parser.add_argument("--seed", type=int, default=0, help="which codes are hidden, and where")
    args = parser.parse_args()

    ours = preset(args.bits)
    model, tokenizer = mlx_lm.load(args.model)
    prepare_for_device(model)
    text = standard_library_tokens(tokenizer, args.tokens)
    prompt, code = hide_codes(tokenizer, text, args.tokens, seed=args.seed)
    specs = [EXACT, MLX_LM[1], replace(ours, name=f"mlx_turboquant {ours.name}")]
    print(f"Reading {len(prompt):,} tokens of Python, in which four codes are hidden ...")
    print(f"The last line: {tokenizer.decode(prompt).splitlines()[-1]}", flush=True)

    tokens = mx.array(prompt[:-1])
    rows = []
    caches = read_first_chunk(model, specs, tokens)
    exact: list[int] = []
    for spec, cache in zip(specs, caches):
        read_on(model, spec, cache, tokens)
        reply = list(islice(following_tokens(model, cache, prompt[-1]), _REPLY_TOKENS))
        exact = exact or reply
        text = tokenizer.decode(reply)
        found = text.startswith(answer(code))
        differs = (one != other for one, other in zip(reply, exact))
        same = next((i for i, is_other in enumerate(differs) if is_other), len(reply))
        said = re.search(r"\d+", text.split("\n")[0])
        row = {"cache": spec.name, "bytes a token": f"{token_size(cache)[1]:,.0f}"}
        row |= {"its answer": said[0] if said else "no code", "right?": "yes" if found else "no"}
        rows.append({**row, "same as exact": f"for {same} tokens"})
    print_rows(rows)
    print(f"The hidden code was {code}.")
    sys.exit(0 if found else 1)


if __name__ == "__main__":
    main()
