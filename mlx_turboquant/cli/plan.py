"""This command shows which context length fits into memory, before weights are downloaded."""

import argparse
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import _download, load_config

from ..lm.compression import treat_layers_alike
from ..lm.loading import device_nbytes, memory_nbytes, model_errors, weight_nbytes
from ..measure.cache_specs import EXACT, MLX_LM, preset
from ..measure.footprint import chunk_nbytes, footprint
from ..measure.shapes import random_model, unloaded_model
from .benchmark import add_model_options, shape_config
from .options import (
    add_count,
    add_exact_token_options,
    add_presets_option,
    check_least,
    parse_size,
    settings_of,
)

# macOS lets the GPU use two thirds of a memory smaller than this, otherwise three quarters.
_SMALL_MAC = 36 * 2**30


def main(arguments: list[str]) -> None:
    """Print the longest context and the bytes per token for every cache."""
    args = _parser().parse_args(arguments)
    check_least(args, batch=1)
    settings = settings_of(args)
    specs = [EXACT, *MLX_LM, *(preset(name, settings) for name in args.kv_bits)]
    available, explanation = _available(args.memory)
    model, config = model_without_weights(args)
    treat_layers_alike(model)
    four = preset("4", settings)
    footprints = {spec: footprint(model, spec, available) for spec in {*specs, four}}
    # A Mac keeps the weights as they are; a CPU turns them into float32.
    weights = weight_nbytes(model) if args.memory else device_nbytes(model)
    left = available - weights - args.batch * chunk_nbytes(model)
    print(f"{explanation}; weights {_size(weights)}.")
    if left <= 0:
        raise ValueError(
            f"The weights of {_size(weights)} do not fit into {_size(available)} with room for a "
            "prompt: use a smaller model or one with fewer bits."
        )
    trained = (config.get("text_config") or config).get("max_position_embeddings")
    counts = {spec: each.longest(left / args.batch) for spec, each in footprints.items()}
    sequences = f", each of {args.batch} sequences" if args.batch > 1 else ""
    print(f"{'cache':15} {'bytes a token':>14} {'longest context':>16}{sequences}")
    for spec in specs:
        longest = f"{counts[spec]:,}" if counts[spec] < 10**7 else "any"
        beyond = "  more than it was trained for" if trained and counts[spec] > trained else ""
        print(f"{spec.name:15} {footprints[spec].per_token:14,.0f} {longest:>16}{beyond}")
    print(
        "Included: weights, the cache with its free space, one layer of dense tokens, and the "
        "activations of a chunk of 2,048 tokens."
    )
    if footprints[MLX_LM[0]].workspace_per_token > footprints[EXACT].workspace_per_token:
        print(
            "mlx-lm's quantized caches fit fewer tokens than their bytes suggest: their attention "
            "holds all scores of a chunk in memory."
        )
    enough = [spec for spec in specs if spec not in MLX_LM and trained and counts[spec] >= trained]
    best = max(enough, key=lambda spec: footprints[spec].per_token, default=four)
    name = "the exact cache" if best is EXACT else best.name
    goal = f"the {trained or 0:,} tokens that the model was trained for"
    if enough:
        print(f"Use {name}, the largest cache that holds {goal}.")
    else:
        part = f"{counts[four]:,} " + (f"of {goal}" if trained else "tokens")
        print(f"Use {name}, which holds {part}.")


def model_without_weights(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model of ``--model`` or ``--shape`` without its weights, and its configuration."""
    if args.shape is not None:
        config = shape_config(args.shape)
        return random_model(config), config
    with model_errors(args.model):
        config = load_config(_download(args.model, allow_patterns=["*.json"]))
        return unloaded_model(config), config


def _available(memory: str | None) -> tuple[float, str]:
    """The bytes that MLX may use, and a text that explains the number."""
    if memory is None:
        return memory_nbytes(), f"This machine lets MLX use {_size(memory_nbytes())}"
    total = parse_size(memory)
    part = 2 / 3 if total < _SMALL_MAC else 3 / 4
    return part * total, f"Of {_size(total)} macOS lets the GPU use {_size(part * total)}"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.1f} GB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_turboquant plan", description=__doc__)
    add_model_options(parser)
    text = "Memory of a Mac, like 16GB, or 16 for short (default: what MLX may use here)"
    parser.add_argument("--memory", metavar="SIZE", help=text)
    add_presets_option(parser, "8", "6", "5", "4.5", "4", "3.5", "3", "2.5", "2")
    add_count(parser, "--batch", 1, "Number of sequences in a batch")
    add_exact_token_options(parser)
    return parser
