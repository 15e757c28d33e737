"""Long prompts with several questions each, for tasks that a machine makes and checks.

A passage is an introduction and the lines that matter, scattered in their order among lines that do
not. The answer to a question begins with an opening, as the model would begin it, and the model
goes on from there.
"""

import os
import random
import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

from ..lm.loading import reason_of
from ..lm.texts import encode, start_tokens

# Questions about one passage, which every cache reads once.
QUESTIONS = 8
FIRST_WORDS = (
    "amber ancient bitter blue bold brave bright broken bronze calm careful clever cold copper "
    "coral crimson curious dark deep distant dusty eager early empty fierce final frozen gentle "
    "golden green happy heavy hidden hollow humble ivory jolly kind late light lonely lucky "
    "marble misty narrow noble orange patient plain proud purple quiet rapid rough royal rusty "
    "scarlet secret silent silver small steady sunny velvet"
).split()
SECOND_WORDS = (
    "anchor apple arrow badger basket beacon bridge button candle canyon castle cherry cloud "
    "compass crown desert dragon eagle engine falcon feather forest fountain garden glacier hammer "
    "harbor island jacket kettle ladder lantern lemon lion meadow mirror mountain needle ocean "
    "orchard otter panther pepper pillow planet pocket rabbit ribbon river rocket saddle salmon "
    "shadow spider statue temple thunder tiger tower tunnel turtle violin walnut window"
).split()


def random_names(count: int, rng: random.Random, words: int = 64) -> list[str]:
    """``count`` different pairs of words; the fewer ``words``, the more alike they are."""
    first, second = rng.sample(FIRST_WORDS, words), rng.sample(SECOND_WORDS, words)
    return [f"{first[i // words]} {second[i % words]}" for i in rng.sample(range(words**2), count)]


class Question(NamedTuple):
    """What is asked after a passage, how the answer begins, and how it rightly goes on."""

    text: str
    opening: str
    answer: str


class Passage(NamedTuple):
    """The lines that matter, in order, and enough others to fill a prompt with."""

    introduction: str
    lines: list[str]
    others: list[str]
    questions: list[Question]


class Task(NamedTuple):
    """A kind of passage: ``make(rng, length, prose, is_easy)`` is one for ``length`` tokens.

    ``prose`` are lines of text. A reply ends where the pattern ``stop`` is; it is right where
    ``read`` finds in it what it finds in the answer. With ``is_sampled`` tokens are random.
    """

    name: str
    make: Callable[[random.Random, int, list[str], bool], Passage]
    read: Callable[[str], Any]
    stop: str = "\n"
    is_sampled: bool = False

    def ended(self, reply: str) -> str:
        """A reply up to its stop."""
        return re.split(self.stop, reply.lstrip("\n"))[0]

    def is_right(self, reply: str, answer: str) -> bool:
        """Whether a reply says what the answer says."""
        return self.read(self.ended(reply)) == self.read(self.ended(answer))


def prompts_of(
    tokenizer: Any, passage: Passage, length: int, rng: random.Random
) -> tuple[list[int], list[list[int]]]:
    """What all prompts of at most ``length`` tokens begin with, and what each goes on with.

    Raises:
        ValueError: the lines that matter take more tokens.
    """
    room = length - max(map(len, _prompts(tokenizer, passage, passage.lines)))
    if room < 0:
        raise ValueError(f"its prompts need {length - room} tokens")
    sizes = list(map(len, encode(tokenizer, [line + "\n" for line in passage.others])))
    repeats = 1 + room // max(sum(sizes), 1)
    most = sum(size <= room for size in accumulate(sizes * repeats))
    for count in range(most, -1, -1):  # lines may have more tokens together than alone
        lines = (passage.others * repeats)[:count]
        places = rng.sample(range(count + len(passage.lines)), len(passage.lines))
        for place, line in zip(sorted(places), passage.lines):
            lines.insert(place, line)
        prompts = _prompts(tokenizer, passage, lines)
        if max(map(len, prompts)) <= length:
            break
    shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    return prompts[0][:shared], [tokens[shared:] for tokens in prompts]


def _prompts(tokenizer: Any, passage: Passage, lines: list[str]) -> list[list[int]]:
    """The tokens of each prompt: the message of a user where there is a chat template."""
    texts = []
    for question in passage.questions:
        text = "\n".join([passage.introduction, "", *lines, "", question.text])
        if tokenizer.has_chat_template:
            message = [{"role": "user", "content": text}]
            options = {"add_generation_prompt": True, "enable_thinking": False}
            try:
                text = tokenizer.apply_chat_template(message, tokenize=False, **options)
            except Exception as error:  # a template may raise anything
                raise ValueError(f"the chat template fails ({reason_of(error)})") from error
        else:
            text += "\n"
        texts.append(text + question.opening)
    start = [] if tokenizer.has_chat_template else start_tokens(tokenizer)
    return [start + tokens for tokens in encode(tokenizer, texts)]
