"""Leave out values that count for nothing, and compare with attention that reads all of them.

    python examples/studies/skipped_values.py --model MODEL --context 4096 --rules nats:8 exact:0.1

Attention sinks and recent tokens are read in any case. The tokens between them lie in blocks.
A step need not read the values of a block that counts for nothing for all query heads of a key
head. A rule says when:

- ``nats:8``: all its scores are 8 nats below the largest one of sinks and recent tokens. Nothing
  bounds the sum of what is left out.
- ``exact:0.1``: its weights have a sum of at most 0.1 / n times that of sinks and recent tokens,
  where n is the number of blocks. So all that is left out has a tenth of their weight at most.
- ``sinks:0.1``: the same, with the sinks alone, which a kernel scores at no cost.

The weights keep their sum: only values are left out, less their mean. The cache is exact.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx_lm
import numpy as np
from compare_codecs import SINKS, WINDOW
from mlx_lm.models.cache import KVCache

from mlx_turboquant.lm import texts
from mlx_turboquant.lm.loading import prepare_for_device
from mlx_turboquant.measure.cache_specs import EXACT
from mlx_turboquant.measure.evaluate import divergence, log_probabilities, read_prompt

BLOCK = 32
_NAME = "scaled_dot_product_attention"


class Skipping:
    """Attention that leaves values out by a ``rule``, and counts blocks: ``read`` of ``blocks``."""

    def __init__(self, attention: Callable[..., mx.array], rule: str, block: int = BLOCK):
        self.attention = attention
        self.block = block
        self.kind, _, number = rule.partition(":")
        if self.kind not in ("nats", "exact", "sinks"):
            raise ValueError(f"{rule!r} is not a rule: use nats:8, exact:0.1 or sinks:0.1.")
        self.limit = float(number)
        self.read = self.blocks = 0

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, cache: Any, **others: Any
    ) -> mx.array:
        """Attention of queries (1, H, L, dim) over keys and values (1, heads, n, dim).

        Layers whose cache is bounded, such as sliding ones, stay exact, and so do long prompts.

        Raises:
            ValueError: a mask other than that of causal attention, sink logits, or a batch.
        """
        _, heads, rows, dim = queries.shape
        count = (keys.shape[2] - SINKS - WINDOW) // self.block
        if rows > 8 or count < 1 or type(cache) is not KVCache:
            return self.attention(queries, keys, values, cache, **others)
        is_causal = isinstance(others.get("mask"), str | None)
        if len(queries) > 1 or not is_causal or others.get("sinks") is not None:
            raise ValueError("Only causal attention of one sequence is known: use another model.")
        end = SINKS + count * self.block
        grouped = queries.reshape(keys.shape[1], -1, rows, dim) * others["scale"]
        scores = grouped @ keys[0][:, None].swapaxes(-1, -2)
        last = keys.shape[2] - rows + mx.arange(rows)[:, None]
        scores = mx.where(mx.arange(keys.shape[2]) <= last, scores, -mx.inf)
        weights = mx.softmax(scores, axis=-1)
        parts = weights[..., :SINKS], weights[..., SINKS:end], weights[..., end:]
        blocks = mx.unflatten(parts[1], -1, (count, self.block))
        skipped = self._counts_for_nothing(blocks, parts[0], parts[2]).all(axis=1, keepdims=True)
        self.read += (~skipped).sum().item()
        self.blocks += skipped.size
        kept = mx.where(skipped[..., None], 0, blocks).flatten(-2)
        mean = values[0].mean(axis=1)[:, None, None]
        output = mx.concatenate([parts[0], kept, parts[2]], axis=-1) @ (values[0][:, None] - mean)
        return (output + mean).reshape(1, heads, rows, -1).astype(queries.dtype)

    def _counts_for_nothing(self, blocks: mx.array, sinks: mx.array, recent: mx.array) -> mx.array:
        if self.kind == "nats":
            largest = mx.maximum(sinks.max(axis=-1), recent.max(axis=-1))[..., None]
            return blocks.max(axis=-1) <= largest * math.exp(-self.limit)
        known = sinks.sum(axis=-1) + (recent.sum(axis=-1) if self.kind == "exact" else 0)
        return blocks.sum(axis=-1) <= self.limit / blocks.shape[-2] * known[..., None]


@contextmanager
def skipping(rule: str, block: int = BLOCK) -> Iterator[Skipping]:
    """Replace mlx-lm's attention for a while."""
    models = [
        module
        for name, module in sys.modules.items()
        if name.startswith("mlx_lm.models.") and hasattr(module, _NAME)
    ]
    attention = Skipping(getattr(models[0], _NAME), rule, block)
    with ExitStack() as stack:
        for module in models:
            stack.enter_context(patch.object(module, _NAME, attention))
        yield attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--rules", nargs="+", default=["nats:8", "exact:0.1", "sinks:0.1"])
    add("--block", type=int, default=BLOCK, help="tokens of a block")
    add("--context", type=int, default=4096, help="tokens per text")
    add("--scored", type=int, default=64, help="last tokens to compare")
    add("--samples", type=int, default=2, help="texts")
    args = parser.parse_args()
    model, tokenizer = mlx_lm.load(args.model)
    prepare_for_device(model)
    contexts = texts.contexts(tokenizer, texts.bundled_texts(), args.context, args.samples)
    found: dict[str, list[mx.array]] = {rule: [] for rule in args.rules}
    shares: dict[str, list[float]] = {rule: [] for rule in args.rules}
    for context in contexts:
        read = read_prompt(model, EXACT, mx.array(context[: -args.scored]))
        tokens = mx.array(context[-args.scored :])
        with skipping("sinks:0", args.block):  # the same sums, in the same order
            exact = mx.concatenate([*log_probabilities(model, copy.deepcopy(read), tokens)])
        for rule in args.rules:
            with skipping(rule, args.block) as attention:
                rows = mx.concatenate([*log_probabilities(model, copy.deepcopy(read), tokens)])
            found[rule].append(divergence(exact, rows))
            shares[rule].append(attention.read / attention.blocks)
    print("| rule | values read | KL | largest |\n|---|---|---|---|")
    for rule, each in found.items():
        all_of_it = mx.concatenate(each)
        numbers = f"{all_of_it.mean().item():.6f} | {all_of_it.max().item():.5f}"
        print(f"| {rule} | {np.mean(shares[rule]):.0%} | {numbers} |")


if __name__ == "__main__":
    main()
