"""``mlx_turboquant benchmark``: speed and memory of a model with different caches."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm

from .. import texts
from ..benchmark import LEAST_NEW_TOKENS, Measurement, measure, median
from ..choice import treat_layers_alike
from ..evaluate import EXACT, MLX_LM, Codec, preset
from ..footprint import chunk_nbytes, footprint
from ..shapes import SHAPES, random_model
from .calibrate import ensure_profile
from .loading import check_memory, device_nbytes, memory_nbytes, model_errors, prepare_for_device
from .options import add_allocation_options, add_exact_token_options, given_settings
from .results import drawing_tools, machine, write_results

_PRESETS = ("4", "3")
_CONTEXTS = tuple(1024 * thousands for thousands in (1, 4, 16, 32, 64, 128))
# The warm-up reads two chunks of a prompt at most, and decodes past a block of packed tokens.
_WARM_UP_CONTEXT = 4096
_WARM_UP_TOKENS = 40


def main(arguments: list[str]) -> None:
    """Run every cache at every context; prints a table and writes JSON and PNG."""
    args = _parser().parse_args(arguments)
    _check_numbers(args)
    settings = given_settings(args, ("kv_window", "kv_sinks", "uniform"))
    codecs = [EXACT, *MLX_LM, *(preset(name, **settings) for name in args.kv_bits)]
    with drawing_tools("benchmark"):
        from tqdm import tqdm

        from . import benchmark_pictures
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer, tokens = _model_and_tokens(args)
    check_memory(model)
    prepare_for_device(model)
    if tokenizer is None:
        treat_layers_alike(model)
    elif any(codec.needs_profile for codec in codecs):
        ensure_profile(model, tokenizer, args, settings)
    runs = [(n, [c for c in codecs if _fits(model, c, n, args)]) for n in sorted(args.contexts)]
    if not runs[0][1]:
        raise ValueError(
            f"{runs[0][0]:,} tokens do not fit beside the model with any cache: use a smaller "
            "context, batch or model."
        )
    mx.eval(model.parameters())
    run = _Run(model, tokens, args)
    total = args.repeats * sum(len(fitting) * (n + args.new_tokens) for n, fitting in runs)
    with tqdm(total=total, unit="tokens", unit_scale=True) as bar:
        for codec in codecs:
            run.attempt(codec, min(_WARM_UP_CONTEXT, runs[-1][0]), _WARM_UP_TOKENS)
        run.progress = bar.update
        for context, fitting in runs:
            for codec in args.repeats * fitting:
                run.attempt(codec, context, args.new_tokens)
    result = run.result(runs, codecs)
    benchmark_pictures.print_table(result)
    write_results(args.out, "benchmark", result, benchmark_pictures.draw)


class _Run:
    """The measurements of one call by cache and context, and what was not possible."""

    def __init__(self, model: nn.Module, tokens: list[int], args: argparse.Namespace):
        self.model = model
        self.tokens = tokens
        self.args = args
        self.measured: dict[tuple[str, int], list[Measurement]] = {}
        self.failures: dict[str, str] = {}
        self.progress = lambda tokens: None

    def attempt(self, codec: Codec, context: int, new_tokens: int) -> None:
        """Measure, unless the cache has failed before."""
        if codec.name in self.failures:
            return
        repeated = self.tokens * -(-context // len(self.tokens))
        prompts = mx.array([repeated[:context]] * self.args.batch)
        try:
            measured = measure(self.model, codec, prompts, new_tokens, self.progress)
        except (RuntimeError, ValueError) as error:
            if codec.settings is not None:
                raise
            # What mlx-lm's own caches say of a model that they do not support.
            self.failures[codec.name] = (str(error) or type(error).__name__).splitlines()[0]
            return
        self.measured.setdefault((codec.name, context), []).append(measured)

    def result(self, runs: list[tuple[int, list[Codec]]], codecs: list[Codec]) -> dict[str, Any]:
        """Everything, as it is written."""
        args = self.args
        return {
            **machine(),
            "memory": memory_nbytes(),
            "model": args.model or args.shape,
            "weights": device_nbytes(self.model),
            "batch": args.batch,
            "new_tokens": args.new_tokens,
            "repeats": args.repeats,
            "caches": [codec.name for codec in codecs],
            "settings": {codec.name: asdict(codec.settings) for codec in codecs if codec.settings},
            "failures": self.failures,
            "runs": [self._cell(codec, n) for n, fitting in runs for codec in fitting],
            "too_large": [
                {"cache": codec.name, "context": n}
                for n, fitting in runs
                for codec in codecs
                if codec not in fitting
            ],
        }

    def _cell(self, codec: Codec, context: int) -> dict[str, Any]:
        # The warm-up may have had the same context: the last ones count.
        measured = self.measured.get((codec.name, context), [])[-self.args.repeats :]
        numbers = median(measured)._asdict() if measured else {}
        repeats = [each._asdict() for each in measured]
        return {"cache": codec.name, "context": context, **numbers, "repeats": repeats}


def _model_and_tokens(args: argparse.Namespace) -> tuple[nn.Module, Any, list[int]]:
    """The model, not yet evaluated, its tokenizer, and tokens of a text.

    Random weights have random tokens and no tokenizer.
    """
    if args.shape is not None:
        model = random_model(shape_config(args.shape))
        tokens = mx.random.randint(0, model.args.vocab_size, (8192,), key=mx.random.key(0))
        return model, None, tokens.tolist()
    with model_errors(args.model):
        model, tokenizer = mlx_lm.load(args.model, lazy=True)
    encoded = texts.encode(tokenizer, texts.bundled_texts())
    return model, tokenizer, [token for text in encoded for token in text]


def shape_config(shape: str) -> dict[str, Any]:
    """The configuration of a shape: one of ``SHAPES``, or that of a config.json.

    Raises:
        ValueError: neither of them.
    """
    if shape in SHAPES:
        return SHAPES[shape]
    try:
        config = json.loads(Path(shape).read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "model_type" not in config:
            raise ValueError("it has no model_type")
        return config
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{shape!r} is not a shape ({error}): use the config.json of a model of mlx-lm, "
            f"or one of {', '.join(SHAPES)}."
        ) from error


def _fits(model: nn.Module, codec: Codec, context: int, args: argparse.Namespace) -> bool:
    """Whether the cache of a context fits into memory, by :func:`.footprint.footprint`."""
    cache = args.batch * footprint(model, codec).prompt_nbytes(context + args.new_tokens)
    chunk = args.batch * chunk_nbytes(model)
    return device_nbytes(model) + chunk + cache <= memory_nbytes()


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """``--model`` or ``--shape``, one of which is needed."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--model", help="Folder of a model of mlx-lm, or its name on the hub")
    group.add_argument(
        "--shape",
        metavar="NAME",
        help="Random weights of 4 bits in place of a model, in the shape of a config.json or of "
        + ", ".join(SHAPES),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_turboquant benchmark", description=__doc__)
    add = parser.add_argument
    add_model_options(parser)
    add(
        "--contexts",
        type=int,
        nargs="+",
        default=_CONTEXTS,
        metavar="TOKENS",
        help="Tokens of the prompt (default: " + " ".join(map(str, _CONTEXTS)) + ", as far as "
        "they fit)",
    )
    add(
        "--kv-bits",
        nargs="+",
        default=_PRESETS,
        metavar="BITS",
        help=f"Bits to measure, as 4, 3.5 or K5V3 (default: {' '.join(_PRESETS)})",
    )
    add_allocation_options(parser)
    add_exact_token_options(parser)
    add("--batch", type=int, default=1, help="Sequences at once (default: %(default)s)")
    add(
        "--new-tokens",
        type=int,
        default=128,
        help="Tokens to decode after a prompt (default: %(default)s)",
    )
    add("--repeats", type=int, default=3, help="Runs to take the median of (default: 3)")
    add(
        "--out",
        type=Path,
        default=Path("benchmark"),
        help="Folder of benchmark.json and benchmark.png (default: %(default)s)",
    )
    return parser


def _check_numbers(args: argparse.Namespace) -> None:
    numbers = [("--contexts", context, 2) for context in args.contexts]
    numbers += [("--batch", args.batch, 1), ("--repeats", args.repeats, 1)]
    numbers += [("--new-tokens", args.new_tokens, LEAST_NEW_TOKENS)]
    for option, number, least in numbers:
        if number < least:
            raise ValueError(f"{option} is {number}: use {least} or more.")
