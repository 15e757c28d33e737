"""What compression does to answers: tasks that caches do on the same prompts.

The exact cache is asked first, of one passage for each length and difficulty, which is not counted.
So the task is done where it has something to say: at the greatest length up to which the exact
cache solves more than half of the easy questions, and with hard ones where it solves those as well.
"""

import copy
import json
import random
import re
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..files import write_errors
from ..lm.compression import compression_of
from ..lm.loading import reason_of
from ..lm.texts import encode
from . import finding_tasks, writing_tasks
from .cache_specs import EXACT, CacheSpec, Progress, ignore
from .evaluate import following_tokens, read_first_chunk, read_on
from .paired import Paired, paired
from .passages import QUESTIONS, Question, Task, prompts_of

_CODE_ENDS = r"\n\n|```"
_renaming = partial(writing_tasks.functions, is_renamed=True)
_codes = re.compile(r"(?<!\d)\d{6}(?!\d)").findall
_first_word = re.compile(r"\A\W*(\w+)").findall
_first_number = re.compile(r"\A\D*?(-?\d+(?:\.\d+)?)").findall
_last_number = re.compile(r"-?\d+(?:\.\d+)?(?=\D*\Z)").findall
_lines = re.compile(r"^.*\S", re.MULTILINE).findall
TASKS = {
    task.name: task
    for task in (
        Task("keys", finding_tasks.keys, _codes, r"\n|\."),
        Task("variables", finding_tasks.variables, _first_number, "\n\n"),
        Task("counting", finding_tasks.counting, _first_word),
        Task("steps", writing_tasks.steps, _last_number),
        Task("sampled-steps", writing_tasks.steps, _last_number, is_sampled=True),
        Task("tools", writing_tasks.tools, writing_tasks.read_call),
        Task("copy", writing_tasks.functions, _lines, _CODE_ENDS),
        Task("renaming", _renaming, _lines, _CODE_ENDS),
    )
}
SHORTEST = 512
_ENOUGH = 0.5


class Reply(NamedTuple):
    """What a cache answered, in which tokens, and whether it is right."""

    text: str
    tokens: list[int]
    is_right: bool


class TaskResult(NamedTuple):
    """Questions of a task, for prompts of a length, and the replies of each cache by its name."""

    task: Task
    length: int
    is_easy: bool
    questions: list[Question]
    replies: dict[str, list[Reply]]


def pair(results: Iterable[TaskResult], name: str) -> Paired:
    """The cache ``name`` beside the exact one, over all the results."""
    exact, other, passages = [], [], []
    for result in results:
        exact += [reply.is_right for reply in result.replies[EXACT.name]]
        other += [reply.is_right for reply in result.replies[name]]
        passages += [f"{result.task.name} {i // QUESTIONS}" for i in range(len(result.questions))]
    return paired(exact, other, passages)


@dataclass
class TaskRun:
    """Does tasks, and keeps the replies in a file, from which a second start goes on.

    ``prose`` are lines to fill prompts with, and ``about`` says what all replies depend on; those
    of a cache are kept with the bits of its layers. The ``failures`` are those of caches of mlx-lm
    that the model does not support, by name. Progress counts passages that a cache has answered.
    ValueError if the file is of another run; OSError if it cannot be read or written.
    """

    model: nn.Module
    tokenizer: Any
    specs: list[CacheSpec]
    prose: list[str]
    file: Path
    about: InitVar[dict[str, Any]]
    progress: Progress = ignore
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self, about: dict[str, Any]):
        self.specs = [EXACT, *self.specs]
        self._kept = _kept_replies(self.file, about)

    def do(self, task: Task, length: int, passages: int) -> TaskResult:
        """Ask all caches the questions about so many passages of at most ``length`` tokens.

        Raises:
            ValueError: why the model cannot do the task, as half a sentence.
        """
        form = self._form(task, length)
        asked = [self._ask(task, *form, seed, self.specs) for seed in range(1, passages + 1)]
        names = [spec.name for spec in self.specs if spec.name not in self.failures]
        replies = {name: [reply for _, each in asked for reply in each[name]] for name in names}
        return TaskResult(task, *form, [one for each, _ in asked for one in each], replies)

    def _form(self, task: Task, length: int) -> tuple[int, bool]:
        """The length and the ease with which the exact cache solves enough of a passage."""
        limit = getattr(self.model.args, "max_position_embeddings", None) or length
        reason = f"the model has a context of {limit:,} tokens"
        solved = None
        # The shortest first, because tasks that are too hard fail there.
        for size in reversed([length >> halvings for halvings in range(length.bit_length())]):
            if SHORTEST <= size <= limit:
                try:
                    share = self._share(task, size, True)
                except ValueError as error:  # too short for the lines that matter
                    reason = str(error)
                    continue
                if share <= _ENOUGH:
                    reason = f"the exact cache solves {share:.0%} at {size:,} tokens"
                    break
                solved = size, share
        if solved is None:
            raise ValueError(reason)
        size, share = solved
        try:
            is_hard = share == 1 and self._share(task, size, False) > _ENOUGH
        except ValueError:  # hard ones may need a longer prompt
            is_hard = False
        return size, not is_hard

    def _share(self, task: Task, length: int, is_easy: bool) -> float:
        """The share of a passage that the exact cache solves."""
        [replies] = self._ask(task, length, is_easy, 0, [EXACT])[1].values()
        return sum(reply.is_right for reply in replies) / QUESTIONS

    def _ask(
        self, task: Task, length: int, is_easy: bool, seed: int, specs: list[CacheSpec]
    ) -> tuple[list[Question], dict[str, list[Reply]]]:
        """Questions, and what each cache replies; those in the file are not asked again."""
        rng = random.Random(f"{task.name} {seed}")
        start = rng.randrange(len(self.prose))
        passage = task.make(rng, length, self.prose[start:] + self.prose[:start], is_easy)
        shared, rests = prompts_of(self.tokenizer, passage, length, rng)
        every, specs = specs, [spec for spec in specs if spec.name not in self.failures]
        # The bits and bases of each layer depend on the profile.
        compression = compression_of(self.model)
        ways = (compression.bits, compression.bases)
        chosen = [spec.settings and [of(spec.settings) for of in ways] for spec in specs]
        form = (task.name, length, is_easy, seed)
        keys = {spec: (*form, spec.name, f"{each}") for spec, each in zip(specs, chosen)}
        asked = [spec for spec in specs if keys[spec] not in self._kept]
        caches = read_first_chunk(self.model, asked, mx.array(shared)) if asked else []
        replies: dict[str, list[Reply]] = {}
        for spec in specs:
            if spec in asked:
                # What the exact cache says is the best guess of what the others will say.
                guesses = [reply.tokens for reply in replies.get(EXACT.name, [])]
                given = []
                try:
                    cache = caches.pop(0)
                    read_on(self.model, spec, cache, mx.array(shared))
                    for i, question in enumerate(passage.questions):
                        [right] = encode(self.tokenizer, [question.answer])
                        noise = seed * QUESTIONS + i if task.is_sampled else None
                        own, guess = copy.deepcopy(cache), guesses[i] if guesses else right
                        if rests[i][:-1]:
                            self.model(mx.array([rests[i][:-1]]), cache=own)
                        following = following_tokens(self.model, own, rests[i][-1], noise, guess)
                        most = 2 * len(right) + 16
                        text, tokens = self._written(task, islice(following, most))
                        given.append(Reply(text, tokens, task.is_right(text, question.answer)))
                except Exception as error:  # whatever mlx-lm's cache raises with a model
                    if spec.mlx_lm_bits is None:
                        raise
                    self.failures[spec.name] = reason_of(error)
                    continue
                self._kept[keys[spec]] = given
                with write_errors(self.file), self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([keys[spec], given]) + "\n")
                mx.clear_cache()
            replies[spec.name] = self._kept[keys[spec]]
            self.progress(seed > 0)
        self.progress((len(every) - len(replies)) * (seed > 0))  # for caches that fail
        return passage.questions, replies

    def _written(self, task: Task, following: Iterable[int]) -> tuple[str, list[int]]:
        """The text of a reply, and its tokens."""
        tokens, text = [], ""
        for token in following:
            tokens.append(token)
            if token in self.tokenizer.eos_token_ids:
                break
            text = self.tokenizer.decode(tokens)
            if task.ended(text) != text.lstrip("\n"):
                break
        return task.ended(text), tokens


def _kept_replies(file: Path, about: dict[str, Any]) -> dict[tuple, list[Reply]]:
    """The replies of a file, which is begun where there is none; a line cut off is removed."""
    start = json.dumps(about) + "\n"
    with write_errors(file):
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        if text and not text.startswith(start):
            raise ValueError(
                f"{file} has the replies of another run: use another --out or delete it."
            )
        whole = text[: text.rfind("\n") + 1] or start
        if whole != text:
            file.write_text(whole, encoding="utf-8")
    try:
        kept = map(json.loads, whole.splitlines()[1:])
        return {tuple(key): [Reply(*reply) for reply in replies] for key, replies in kept}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: use another --out or delete it.") from error
