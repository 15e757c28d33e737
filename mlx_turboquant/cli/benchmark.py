"""This command measures the speed and memory of a model with different caches."""

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from ..files import make_folder
from ..lm import texts
from ..lm.compressible import text_arguments
from ..lm.compression import treat_layers_alike
from ..lm.loading import check_memory, device_nbytes, memory_nbytes, prepare_for_device, reason_of
from ..measure.benchmark import LEAST_NEW_TOKENS, Measurement, measure, median
from ..measure.cache_specs import EXACT, MLX_LM, CacheSpec, Progress, ignore, preset
from ..measure.footprint import chunk_nbytes, footprint
from ..measure.shapes import SHAPES, random_model
from .loading import MODEL_HELP, ensure_profile, load_lazily
from .options import add_comparison_options, add_count, add_out, check_least, settings_of
from .results import drawing_tools, machine, write_results

_CONTEXTS = tuple(1024 * thousands for thousands in (1, 4, 16, 32, 64, 128))
# The warm-up prefills at most two chunks, and decodes past a block of packed tokens.
_WARM_UP_CONTEXT = 4096
_WARM_UP_TOKENS = 40


def main(arguments: list[str]) -> None:
    """Run every cache at every context length; print a table and write JSON and PNG."""
    args = _parser().parse_args(arguments)
    check_least(args, contexts=2, batch=1, repeats=1, new_tokens=LEAST_NEW_TOKENS)
    settings = settings_of(args)
    specs = [EXACT, *MLX_LM, *(preset(name, settings) for name in args.kv_bits)]
    with drawing_tools("benchmark"):
        from . import benchmark_pictures
    make_folder(args.out)
    model, tokenizer, tokens = _model_and_tokens(args)
    check_memory(model)
    prepare_for_device(model)
    if tokenizer is None:
        treat_layers_alike(model)
    elif any(spec.needs_profile for spec in specs):
        ensure_profile(model, tokenizer, args, settings)
    run = _Run(model, tokens, args, specs)
    shortest, longest = min(args.contexts), max(args.contexts)
    if not run.fitting[shortest]:
        raise ValueError(
            f"{shortest:,} tokens do not fit beside the model with any cache: use a smaller "
            "context, batch or model."
        )
    mx.eval(model.parameters())
    total = sum(len(fitting) * (n + args.new_tokens) for n, fitting in run.fitting.items())
    with tqdm(total=args.repeats * total, unit="tokens", unit_scale=True) as bar:
        for spec in specs:
            run.attempt(spec, min(_WARM_UP_CONTEXT, longest), _WARM_UP_TOKENS)
        run.progress = bar.update
        for context, fitting in run.fitting.items():
            for spec in args.repeats * fitting:
                run.attempt(spec, context, args.new_tokens)
    write_results(args.out, "benchmark", run.result(), benchmark_pictures)


@dataclass
class _Run:
    """The measurements of one call by cache and context length, and the failures.

    ``fitting`` has, for each context length, the caches that fit into memory by their footprint.
    """

    model: nn.Module
    tokens: list[int]
    args: argparse.Namespace
    specs: list[CacheSpec]
    measured: dict[tuple[str, int], list[Measurement]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    progress: Progress = ignore

    def __post_init__(self):
        model, args = self.model, self.args
        left = memory_nbytes() - device_nbytes(model) - args.batch * chunk_nbytes(model)
        longest = [footprint(model, c).longest(left / args.batch) for c in self.specs]
        self.fitting = {
            n: [c for c, most in zip(self.specs, longest) if n + args.new_tokens <= most]
            for n in sorted(args.contexts)
        }

    def attempt(self, spec: CacheSpec, context: int, new_tokens: int) -> None:
        if spec.name in self.failures:
            return
        repeated = self.tokens * -(-context // len(self.tokens))
        prompts = mx.array([repeated[:context]] * self.args.batch)
        try:
            measured = measure(self.model, spec, prompts, new_tokens, self.progress)
        except (RuntimeError, ValueError) as error:
            if spec.settings is not None:
                raise
            # mlx-lm's own cache does not support the model.
            self.failures[spec.name] = reason_of(error)
            return
        self.measured.setdefault((spec.name, context), []).append(measured)

    def result(self) -> dict[str, Any]:
        args = self.args
        return {
            **machine(),
            "memory": memory_nbytes(),
            "model": args.model or args.shape,
            "weights": device_nbytes(self.model),
            "batch": args.batch,
            "new_tokens": args.new_tokens,
            "repeats": args.repeats,
            "caches": [c.name for c in self.specs],
            "settings": {c.name: asdict(c.settings) for c in self.specs if c.settings},
            "failures": self.failures,
            "runs": [self._cell(c.name, n) for n, fitting in self.fitting.items() for c in fitting],
            "too_large": [
                {"cache": c.name, "context": n}
                for n, fitting in self.fitting.items()
                for c in self.specs
                if c not in fitting
            ],
        }

    def _cell(self, cache: str, context: int) -> dict[str, Any]:
        # A warm-up at the same context length comes first and does not count.
        measured = self.measured.get((cache, context), [])[-self.args.repeats :]
        numbers = median(measured)._asdict() if measured else {}
        repeats = [each._asdict() for each in measured]
        return {"cache": cache, "context": context, **numbers, "repeats": repeats}


def _model_and_tokens(args: argparse.Namespace) -> tuple[nn.Module, Any, list[int]]:
    """The model, not yet evaluated, its tokenizer, and tokens for prompts.

    A model with random weights gets random tokens and no tokenizer.
    """
    if args.shape is not None:
        model = random_model(shape_config(args.shape))
        tokens = mx.random.randint(
            0, text_arguments(model).vocab_size, (8192,), key=mx.random.key(0)
        )
        return model, None, tokens.tolist()
    model, tokenizer = load_lazily(args.model)
    encoded = texts.encode(tokenizer, texts.bundled_texts())
    return model, tokenizer, [token for text in encoded for token in text]


def shape_config(shape: str) -> dict[str, Any]:
    """The configuration of a name in ``SHAPES`` or a config.json; ValueError if it is neither."""
    if shape in SHAPES:
        return SHAPES[shape]
    try:
        config = json.loads(Path(shape).read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "model_type" not in config:
            raise ValueError("it has no model_type")
        return config
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{shape!r} is not a shape ({reason}): use the config.json of a model of mlx-lm, "
            f"or one of {', '.join(SHAPES)}."
        ) from error


def add_model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add ``--model`` and ``--shape``, which exclude each other; ``required`` demands one."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--model", help=MODEL_HELP)
    names = ", ".join(SHAPES)
    text = f"Shape of a model with random 4-bit weights: a config.json file, or one of {names}"
    group.add_argument("--shape", metavar="NAME", help=text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_turboquant benchmark", description=__doc__)
    add_model_options(parser)
    add, listed = parser.add_argument, " ".join(map(str, _CONTEXTS))
    text = f"Context lengths in tokens (default: {listed}, as far as they fit)"
    add("--contexts", type=int, nargs="+", default=_CONTEXTS, metavar="TOKENS", help=text)
    add_comparison_options(parser, "4", "3")
    add_count(parser, "--batch", 1, "Number of sequences in a batch")
    add_count(parser, "--new-tokens", 128, "Number of tokens to decode after a prompt")
    add_count(parser, "--repeats", 3, "Number of runs to take the median of")
    add_out(parser, "benchmark", "benchmark.json and benchmark.png")
    return parser
