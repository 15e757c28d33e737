"""What ``evaluate --tasks`` runs and prints."""

import argparse
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from .. import __version__
from ..files import write_errors
from ..lm.settings import Settings
from ..measure.cache_specs import EXACT, MLX_LM, CacheSpec
from ..measure.passages import QUESTIONS, Task
from ..measure.tasks import TASKS, TaskResult, TaskRun, pair
from .results import print_rows

# Differing replies in a file, of a task and a cache.
_CASES = 5


def tasks_of(names: list[str]) -> list[Task]:
    """The tasks of these names, or all; ValueError if there is none of a name."""
    for name in names:
        if name not in TASKS:
            raise ValueError(f"{name!r} is not a task: use one of {', '.join(TASKS)}.")
    return [TASKS[name] for name in names or TASKS]


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    specs: list[CacheSpec],
    settings: Settings,
    contents: list[str],
    args: argparse.Namespace,
) -> None:
    """Let the caches do the tasks of the command line, print what they did, and write the cases."""
    specs = [MLX_LM[1], *specs]
    prose = [line for text in contents for line in text.splitlines() if line.strip()]
    about = {"model": args.model, "version": __version__, "settings": asdict(settings)}
    passages = math.ceil(args.prompts / QUESTIONS)
    results, reasons = [], []
    run = TaskRun(model, tokenizer, specs, prose, args.out / "tasks.jsonl", about)
    with tqdm(total=len(args.tasks) * passages * (1 + len(specs)), unit="passages") as bar:
        run.progress = bar.update
        for task in args.tasks:
            bar.set_description(task.name)
            try:
                results.append(run.do(task, args.length, passages))
            except ValueError as error:
                reasons.append(f"{task.name} is not reported: {error}.")
                bar.update(passages * (1 + len(specs)))
    if not tokenizer.has_chat_template:
        reasons.append("The model has no chat template: prompts are plain text.")
    reasons += [f"{name} is not possible: {why}" for name, why in run.failures.items()]
    names = [spec.name for spec in specs if spec.name not in run.failures]
    try:
        _write_cases(args.out / "cases.txt", results, names)
    finally:
        if results:
            _print_results(results, names)
        verdicts = [pair(results, name).verdict(name) for name in names if results]
        print("\n".join(reasons + verdicts))
    print(f"Wrote {args.out / 'cases.txt'}")


def _print_results(results: list[TaskResult], names: list[str]) -> None:
    print_rows(
        [_row(result, name) for result in results for name in names],
        keys=2,
        title="Questions answered rightly by the exact cache and by others",
        caption="points: right answers more than with the exact cache, of a hundred, with 95 % "
        "confidence. length: mean tokens of a reply, and of the exact cache's.",
    )


def _row(result: TaskResult, name: str) -> dict[str, str]:
    both = pair([result], name)
    lengths = [
        np.mean([len(reply.tokens) for reply in result.replies[each]])
        for each in (name, EXACT.name)
    ]
    return {
        "cache": name,
        "task": result.task.name + (", easy" if result.form.is_easy else ""),
        "context": f"{result.form.length:,}",
        "prompts": f"{len(result.questions)}",
        "both": f"{both.both}",
        "only exact": f"{both.only_exact}",
        "only this": f"{both.only_other}",
        "neither": f"{both.neither}",
        "points": f"{both.difference:+.1f} ({both.low:+.1f} to {both.high:+.1f})",
        "length": f"{lengths[0]:.1f} ({lengths[1]:.1f})",
    }


def _write_cases(file: Path, results: Iterable[TaskResult], names: list[str]) -> None:
    """Write the first cases in which only one of two caches is right."""
    lines = []
    for result in results:
        for name in names:
            cases = zip(result.questions, result.replies[EXACT.name], result.replies[name])
            differing = [case for case in cases if case[1].is_right != case[2].is_right]
            for question, exact, other in differing[:_CASES]:
                lines += [
                    f"{result.task.name}, {result.form.length:,} tokens, {name}",
                    f"  asked: {question.text!r}",
                    f"  right: {question.opening + question.answer!r}",
                    f"  exact: {question.opening + exact.text!r}",
                    f"  {name}: {question.opening + other.text!r}",
                ]
    with write_errors(file):
        file.write_text("\n".join([*lines, ""]), encoding="utf-8")
