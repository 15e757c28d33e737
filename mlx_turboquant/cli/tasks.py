"""What ``evaluate --tasks`` runs and prints."""

import argparse
import math
import zlib
from dataclasses import asdict
from typing import Any

import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ..files import write_json
from ..lm.compression import compression_of
from ..lm.settings import Settings
from ..measure.cache_specs import EXACT, MLX_LM, CacheSpec
from ..measure.passages import QUESTIONS
from ..measure.tasks import TASKS, TaskResult, TaskRun, pair
from .results import machine, print_rows


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    specs: list[CacheSpec],
    settings: Settings,
    contents: list[str],
    args: argparse.Namespace,
) -> None:
    """Let the caches do the tasks of the command line; print a table and write it with cases."""
    specs = [MLX_LM[1], *specs]
    prose = [line for text in contents for line in text.splitlines() if line.strip()]
    if not prose:
        raise ValueError("The text is empty: give files with lines to fill prompts with.")
    about = {
        "model": args.model,
        "weights": compression_of(model).weights().identity(),
        "machine": machine(),
        "text": zlib.crc32("\n".join(prose).encode()),
        "settings": asdict(settings),
    }
    passages = math.ceil(args.prompts / QUESTIONS)
    tasks = list(dict.fromkeys(args.tasks or TASKS))
    results, remarks = [], []
    run = TaskRun(model, tokenizer, specs, prose, args.out / "tasks.jsonl", about)
    with tqdm(total=len(tasks) * passages * (1 + len(specs)), unit="passages") as bar:
        run.progress = bar.update
        for name in tasks:
            bar.set_description(name)
            try:
                results.append(run.do(TASKS[name], args.length, passages))
            except ValueError as error:
                remarks.append(f"{name} is not reported: {error}.")
                bar.update(passages * (1 + len(specs)))
    if not tokenizer.has_chat_template:
        remarks.append("The model has no chat template: prompts are plain text.")
    remarks += [f"{name} is not possible: {why}" for name, why in run.failures.items()]
    if results:
        names = [spec.name for spec in specs if spec.name not in run.failures]
        rows = [_row(result, name) for result in results for name in names]
        remarks += [pair(results, name).verdict(name) for name in names]
        cases = [case for result in results for name in names for case in _cases(result, name)]
        result = {**about, "table": rows, "remarks": remarks, "cases": cases}
        write_json(args.out / "tasks.json", result)
        print_rows(
            rows,
            keys=2,
            title="Questions answered rightly by the exact cache and by others",
            caption="points: right answers more than with the exact cache, of a hundred, with 95 % "
            "confidence. length: mean tokens of a reply, and of the exact cache's.",
        )
        remarks.append(f"Wrote {args.out / 'tasks.json'}")
    print("\n".join(remarks))


def _row(result: TaskResult, name: str) -> dict[str, str]:
    both = pair([result], name)
    own, exact = (
        np.mean([len(reply.tokens) for reply in result.replies[each]])
        for each in (name, EXACT.name)
    )
    return {
        "cache": name,
        "task": result.task.name + (", easy" if result.is_easy else ""),
        "context": f"{result.length:,}",
        "both": f"{both.both}",
        "only exact": f"{both.only_exact}",
        "only this": f"{both.only_other}",
        "neither": f"{both.neither}",
        "points": f"{both.difference:+.1f} ({both.low:+.1f} to {both.high:+.1f})",
        "length": f"{own:.1f} ({exact:.1f})",
    }


def _cases(result: TaskResult, name: str) -> list[dict[str, str]]:
    """The first five cases in which only one of two caches is right."""
    answers = zip(result.questions, result.replies[EXACT.name], result.replies[name])
    return [
        {"task": result.task.name, "asked": question.text, "opening": question.opening}
        | {"right": question.answer, "exact": exact.text, name: other.text}
        for question, exact, other in answers
        if exact.is_right != other.is_right
    ][:5]
