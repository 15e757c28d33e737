"""What compression does to answers: tasks that caches do on the same prompts.

The exact cache is asked first, of one passage for each length and difficulty, which is not counted.
So the task is done where it has something to say: at the greatest length at which the exact cache
solves more than half of the easy questions, and with hard ones where it solves those as well.
"""

import copy
import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..files import write_errors
from ..lm.loading import reason_of
from . import finding_tasks, writing_tasks
from .cache_specs import EXACT, CacheSpec, Progress, ignore
from .evaluate import following_tokens, read_first_chunk, read_on
from .paired import Paired, paired
from .passages import QUESTIONS, Passage, Prompts, Question, Task, prompts_of

_CODE_ENDS = r"\n\n|```"
_ALL = (
    Task("keys", finding_tasks.keys, finding_tasks.read_keys),
    Task("variables", finding_tasks.variables, finding_tasks.read_variables, "\n\n"),
    Task("counting", finding_tasks.counting, finding_tasks.read_counting),
    Task("steps", writing_tasks.steps, writing_tasks.read_steps),
    Task("sampled-steps", writing_tasks.steps, writing_tasks.read_steps, is_sampled=True),
    Task("tools", writing_tasks.tools, writing_tasks.read_tools),
    Task("copy", writing_tasks.copy, writing_tasks.read_code, _CODE_ENDS),
    Task("renaming", writing_tasks.renaming, writing_tasks.read_code, _CODE_ENDS),
)
TASKS = {task.name: task for task in _ALL}

SHORTEST = 512
_ENOUGH = 0.5


class Form(NamedTuple):
    """The length of prompts in tokens, and whether the questions are the easy ones."""

    length: int
    is_easy: bool


class Reply(NamedTuple):
    """What a cache answered, in which tokens, and whether it is right."""

    text: str
    tokens: list[int]
    is_right: bool


class TaskResult(NamedTuple):
    """A task in the form in which it was done.

    ``questions`` are about ``passages``; the ``replies`` to them are those of each cache by name.
    """

    task: Task
    form: Form
    questions: list[Question]
    passages: list[int]
    replies: dict[str, list[Reply]]


def pair(results: Iterable[TaskResult], name: str) -> Paired:
    """The cache ``name`` beside the exact one, over all the results."""
    exact, other, passages = [], [], []
    for result in results:
        exact += [reply.is_right for reply in result.replies[EXACT.name]]
        other += [reply.is_right for reply in result.replies[name]]
        passages += [(result.task.name, passage) for passage in result.passages]
    return paired(exact, other, passages)


class TaskRun:
    """Does tasks, and keeps the replies in a file, from which a second start goes on.

    ``prose`` are lines to fill prompts with, and ``about`` says what else replies depend on. The
    ``failures`` are those of caches of mlx-lm that the model does not support, by name. Progress
    counts passages that a cache has read and answered.

    Raises:
        ValueError: the file is of another run.
        OSError: the file cannot be read or written.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        specs: list[CacheSpec],
        prose: list[str],
        file: Path,
        about: dict[str, Any],
        progress: Progress = ignore,
    ):
        self.model, self.tokenizer, self.prose = model, tokenizer, prose
        self.specs = [EXACT, *specs]
        self.progress = progress
        self.failures: dict[str, str] = {}
        self._file = file
        self._kept = _kept_replies(file, about)

    def do(self, task: Task, length: int, passages: int) -> TaskResult:
        """Ask all caches the questions about so many passages of at most ``length`` tokens.

        Raises:
            ValueError: why the model cannot do the task, as half a sentence.
        """
        form = self._form(task, length)
        result = TaskResult(task, form, [], [], {spec.name: [] for spec in self.specs})
        for seed in range(1, passages + 1):
            questions, replies = self._ask(task, form, seed, self.specs)
            result.questions.extend(questions)
            result.passages.extend([seed] * len(questions))
            for name, given in replies.items():
                result.replies[name].extend(given)
        for name in self.failures:
            result.replies.pop(name, None)
        return result

    def _form(self, task: Task, length: int) -> Form:
        """The form in which the exact cache solves enough of a passage."""
        limit = getattr(self.model.args, "max_position_embeddings", None) or length
        reason = ""
        while length >= SHORTEST:
            if length <= limit:
                try:
                    share = self._share(task, Form(length, True))
                except ValueError as error:
                    reason = reason or str(error)
                    break
                if share > _ENOUGH:
                    is_hard = share == 1 and self._share(task, Form(length, False)) > _ENOUGH
                    return Form(length, not is_hard)
                reason = f"the exact cache solves {share:.0%} at {length:,} tokens"
            length //= 2
        raise ValueError(reason or f"the model has a context of {limit:,} tokens")

    def _share(self, task: Task, form: Form) -> float:
        """The share of a passage that the exact cache solves."""
        _, replies = self._ask(task, form, 0, [EXACT])
        return sum(reply.is_right for reply in replies[EXACT.name]) / QUESTIONS

    def _ask(
        self, task: Task, form: Form, seed: int, specs: list[CacheSpec]
    ) -> tuple[list[Question], dict[str, list[Reply]]]:
        """Questions, and what each cache replies; those in the file are not asked again."""
        rng = random.Random(f"{task.name} {seed}")
        start = rng.randrange(len(self.prose))
        prose = self.prose[start:] + self.prose[:start]
        passage = task.make(rng, form.length, prose, form.is_easy)
        prompts = prompts_of(self.tokenizer, passage, form.length, rng)
        keys = {spec.name: (task.name, *form, seed, spec.name) for spec in specs}
        asked = [spec for spec in specs if keys[spec.name] not in self._kept]
        asked = [spec for spec in asked if spec.name not in self.failures]
        shared = mx.array(prompts.shared)
        caches = read_first_chunk(self.model, asked, shared) if asked else []
        drafts = prompts.drafts
        for spec in specs:
            if spec in asked:
                try:
                    written = self._write(task, spec, caches.pop(0), prompts, drafts, seed)
                except Exception as error:  # whatever mlx-lm's cache raises with a model
                    if spec.mlx_lm_bits is None:
                        raise
                    self.failures[spec.name] = reason_of(error)
                    continue
                self._keep(keys[spec.name], passage, written, task)
            if spec is EXACT:  # which is the best guess of what the others will say
                drafts = [reply.tokens for reply in self._kept[keys[spec.name]]]
            self.progress(seed > 0)
        replies = {name: self._kept[key] for name, key in keys.items() if key in self._kept}
        return passage.questions, replies

    def _write(
        self,
        task: Task,
        spec: CacheSpec,
        cache: list[Any],
        prompts: Prompts,
        drafts: list[list[int]],
        seed: int,
    ) -> list[tuple[str, list[int]]]:
        """The text and tokens of each reply of a cache that has read the first chunk."""
        read_on(self.model, spec, cache, mx.array(prompts.shared))
        replies = []
        for i, (rest, draft, right) in enumerate(zip(prompts.rests, drafts, prompts.drafts)):
            own = copy.deepcopy(cache)
            if rest[:-1]:
                self.model(mx.array([rest[:-1]]), cache=own)
            noise = seed * QUESTIONS + i if task.is_sampled else None
            tokens = following_tokens(self.model, own, rest[-1], noise, draft)
            replies.append(self._until_stop(task, tokens, 2 * len(right) + 16))
        mx.clear_cache()
        return replies

    def _until_stop(self, task: Task, tokens: Iterator[int], most: int) -> tuple[str, list[int]]:
        written: list[int] = []
        text = ""
        for token in islice(tokens, most):
            written.append(token)
            if token in self.tokenizer.eos_token_ids:
                break
            text = self.tokenizer.decode(written)
            if task.ended(text) != text.lstrip("\n"):
                break
        return task.ended(text), written

    def _keep(
        self, key: tuple, passage: Passage, written: list[tuple[str, list[int]]], task: Task
    ) -> None:
        """Judge replies, and add them to the file."""
        self._kept[key] = [
            Reply(text, tokens, task.is_right(text, question.answer))
            for (text, tokens), question in zip(written, passage.questions)
        ]
        with write_errors(self._file), self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, self._kept[key]]) + "\n")


def _kept_replies(file: Path, about: dict[str, Any]) -> dict[tuple, list[Reply]]:
    """The replies of a file, which is begun where there is none; a line cut off is removed."""
    start = json.dumps(about) + "\n"
    with write_errors(file):
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if text and not text.startswith(start):
            raise ValueError(
                f"{file} has the replies of another run: use another --out or delete it."
            )
        whole = text[: text.rfind("\n") + 1] or start
        if whole != text:
            file.write_text(whole, encoding="utf-8")
    kept = map(json.loads, whole.splitlines()[1:])
    return {tuple(key): [Reply(*reply) for reply in replies] for key, replies in kept}
