"""The passkey task: codes hidden in a long text, and one question about them.

A few lines ``# The secret code for amber falcon is 402917.`` are inserted where lines of the text
begin. The prompt ends with a question about one of them, and the right continuation is
``" 402917."``. A cache that lost the hidden line cannot answer.
"""

import random
from collections.abc import Sequence
from typing import Any

from mlx_turboquant.measure.passages import random_names


def random_code(rng: random.Random) -> str:
    """Six digits."""
    return f"{rng.randrange(10**6):06d}"


def code_line(name: str, code: str) -> str:
    """The line that is hidden in the text."""
    return f"# The secret code for {name} is {code}."


def question(name: str) -> str:
    """The end of the prompt; the model continues with the answer."""
    return f"# What is the secret code for {name}? The secret code for {name} is"


def answer(code: str) -> str:
    """The right continuation of the question."""
    return f" {code}."


def hide_lines(
    tokenizer: Any,
    text_tokens: Sequence[int],
    length: int,
    lines: Sequence[str],
    rng: random.Random,
    depth: float | None = None,
) -> list[int]:
    """Exactly ``length`` tokens of the text with ``lines`` inserted where its lines begin.

    The places are random; ``depth`` in [0, 1] fixes that of the first of ``lines``.

    Raises:
        ValueError: a length without room for the lines, or a text with too few tokens or lines.
    """
    before = [_encode(tokenizer, "\n" + line) for line in lines]
    after = [_encode(tokenizer, line + "\n") for line in lines]
    room = length - sum(max(map(len, pair)) for pair in zip(before, after, strict=True))
    if room < 1:
        raise ValueError(
            f"the {len(lines)} hidden lines take {length - room} tokens and only {length} are left "
            "for them and the text: ask for a longer prompt."
        )
    if len(text_tokens) < length:
        raise ValueError(
            f"the text has {len(text_tokens)} tokens and {length} are needed: give a longer text."
        )
    # A token may end a line (".\n"), begin one ("\n    ") or both, depending on the tokenizer.
    pieces = {token: tokenizer.decode([token]) for token in set(text_tokens[:room])}
    opens = {token for token, piece in pieces.items() if piece.startswith("\n")}
    closes = {token for token, piece in pieces.items() if piece.endswith("\n")}
    starts = [i for i in range(1, room) if text_tokens[i] in opens or text_tokens[i - 1] in closes]
    if len(starts) < len(lines):
        raise ValueError(
            f"the text has {len(starts)} line ends in its first {room} tokens and {len(lines)} are "
            "needed: give a text with shorter lines or hide fewer codes."
        )
    places = rng.sample(starts, len(lines))
    if depth is not None:
        places[0] = min(starts, key=lambda place: abs(place - depth * room))
    tokens, last = [], 0
    for place, i in sorted(zip(places, range(len(lines)))):
        tokens += text_tokens[last:place]
        tokens += before[i] if text_tokens[place] in opens else after[i]
        last = place
    return (tokens + list(text_tokens[last:length]))[:length]


def hide_codes(
    tokenizer: Any,
    text_tokens: Sequence[int],
    length: int,
    *,
    needles: int = 4,
    depth: float | None = None,
    seed: int = 0,
) -> tuple[list[int], str]:
    """A passkey prompt of exactly ``length`` tokens, and the code that answers it.

    ``text_tokens`` are ``length`` or more tokens of a text. The question is about one of the
    ``needles`` hidden lines; ``depth`` puts this line at that fraction of the prompt. The model is
    right if it continues with ``answer(code)``.

    Raises:
        ValueError: an invalid argument, or a text that :func:`hide_lines` refuses.
    """
    if not 1 <= needles <= 64:
        raise ValueError(f"needles is {needles} and must be 1 to 64: hide at least one code.")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth} and must be 0 to 1: use 0.5 for the middle.")
    rng = random.Random(seed)
    names = random_names(needles, rng)
    codes = [random_code(rng) for _ in names]
    asked = _encode(tokenizer, "\n" + question(names[0]))
    lines = [code_line(name, code) for name, code in zip(names, codes, strict=True)]
    body = hide_lines(tokenizer, text_tokens, length - len(asked), lines, rng, depth)
    return body + asked, codes[0]


def _encode(tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
