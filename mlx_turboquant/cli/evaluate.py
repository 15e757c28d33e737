"""This command measures how a compressed cache changes the output of a model."""

import argparse
from functools import partial
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from ..files import make_folder
from ..lm import texts
from ..lm.compressible import check_compressible, compressible_caches
from ..lm.loading import check_memory, prepare_for_device
from ..measure.cache_specs import MLX_LM, preset
from ..measure.evaluate import Comparison
from ..measure.paired import ENOUGH_PROMPTS
from ..measure.tasks import SHORTEST, TASKS
from .loading import MODEL_HELP, ensure_profile, load_lazily
from .options import add_comparison_options, add_count, add_out, check_least, settings_of
from .results import drawing_tools, machine, write_results
from .tasks import run_tasks


def main(arguments: list[str]) -> None:
    """Compare caches on a model; print a table and write JSON and PNG."""
    args = _parser().parse_args(arguments)
    _check_options(args)
    settings = settings_of(args)
    specs = [preset(name, settings) for name in args.kv_bits]
    contents = texts.read_texts(args.text) if args.text else texts.bundled_texts()
    contexts, nbytes = [], 0
    if args.tasks is None:
        with drawing_tools("evaluate"):  # before a download
            from . import pictures
    model, tokenizer = load_lazily(args.model)
    if args.tasks is None:
        name = ", ".join(map(str, args.text)) if args.text else "The bundled text"
        contexts = texts.contexts(tokenizer, contents, args.context + 1, args.samples, name)
        # Log-probabilities of the exact cache and of another one, and what is computed from both.
        nbytes = 12 * args.scored * tokenizer.vocab_size
    check_memory(model, nbytes)
    check_compressible(model, compressible_caches(model))  # before weights are read
    make_folder(args.out)
    prepare_for_device(model)
    mx.eval(model.parameters())
    if any(spec.needs_profile for spec in specs):
        ensure_profile(model, tokenizer, args, settings)
    for spec in specs:
        spec.make_cache(model)  # refuses what it cannot have before anything is measured
    if args.tasks is not None:
        run_tasks(model, tokenizer, specs, settings, contents, args)
        return
    comparison = Comparison(model, [*MLX_LM, *specs])
    scores, caches = comparison.scores, len(comparison.scores)
    steps = caches * sum(len(context) + args.greedy for context in contexts)
    steps += 2 * (caches + 1) * (len(contexts[0]) + args.generate) if args.generate else 0
    with tqdm(total=steps, unit="tokens", unit_scale=True) as bar:
        comparison.progress = bar.update
        for context in contexts:
            comparison.text(context, args.scored, args.greedy)
        for seed in (None, 0) if args.generate else ():
            comparison.generation(contexts[0], args.generate, seed, tokenizer.eos_token_ids)
    result = {
        **machine(),
        "model": args.model,
        "context": args.context,
        "texts": len(contexts),
        "scored": args.scored,
        "greedy": args.greedy,
        "codecs": [{**each.summary(), "by_position": each.by_position()} for each in scores],
    }
    if args.generate:
        result["noise"] = comparison.noise.summary()
    write_results(args.out, "evaluation", result, pictures)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_turboquant evaluate", description=__doc__)
    add, count = parser.add_argument, partial(add_count, parser)
    add("--model", required=True, help=MODEL_HELP)
    add_comparison_options(parser, "4", "3.5", "3", "2.5", "2")
    add("--text", type=Path, nargs="+", help="Text files to use instead of the bundled texts")
    count("--context", 2048, "Length of a text in tokens")
    count("--samples", 4, "Number of texts")
    count("--scored", 256, "Number of last tokens of a text to decode and compare")
    count("--greedy", 64, "Number of greedy tokens after a text to compare with the exact cache's")
    count("--generate", 0, "Number of tokens to generate after a text, greedily and sampled")
    text = "Compare answers to tasks instead, all or those named: " + ", ".join(TASKS)
    add("--tasks", nargs="*", metavar="TASK", help=text)
    text = f"Number of prompts per task, in passages of 8; a verdict needs {ENOUGH_PROMPTS}"
    count("--prompts", 40, text)
    count("--length", 2048, "Maximum number of tokens per prompt, fewer where a task is too hard")
    add_out(parser, "evaluation", "evaluation.json and kl.png, or of tasks")
    return parser


def _check_options(args: argparse.Namespace) -> None:
    check_least(args, context=2, samples=1, scored=1, greedy=0, generate=0)
    check_least(args, prompts=1, length=SHORTEST)
    for name in args.tasks or ():
        if name not in TASKS:
            raise ValueError(f"{name!r} is not a task: use one of {', '.join(TASKS)}.")
    if args.scored >= args.context:
        raise ValueError(
            f"{args.scored} scored tokens are not fewer than the context of {args.context}: "
            "use a smaller --scored or a larger --context."
        )
