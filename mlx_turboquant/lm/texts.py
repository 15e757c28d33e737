"""Texts to evaluate a model on: files, or those that come with Python."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

from ..files import read_errors

_MODULES = ("argparse", "tarfile", "typing", "pickle")


def bundled_texts() -> list[str]:
    """The language reference of the running Python, as prose, and the source of four modules."""
    folder = Path(argparse.__file__).parent
    modules = [(folder / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES]
    return ["\n\n".join(topics[name] for name in sorted(topics)), *modules]


def read_texts(paths: Iterable[Path]) -> list[str]:
    """The contents of text files.

    Raises:
        OSError, ValueError: a file that cannot be read, or is not UTF-8 text.
    """
    texts = []
    for path in paths:
        try:
            with read_errors(path):
                texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: convert it to UTF-8.") from error
    return texts


def encode(tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """The tokens of each text, without :func:`start_tokens`.

    Texts may be longer than the model's context; the tokenizer does not warn.
    """
    return [list(tokenizer.encode(text, add_special_tokens=False, verbose=False)) for text in texts]


def start_tokens(tokenizer) -> list[int]:
    """The tokens that a model expects before every text: none for most, ``<bos>`` for Gemma."""
    [bare] = encode(tokenizer, ["a"])
    whole = list(tokenizer.encode("a"))
    return whole[: whole.index(bare[0])]


def contexts(
    tokenizer, texts: list[str], length: int, count: int, name: str = "The text"
) -> list[list[int]]:
    """Up to ``count`` contexts of ``length`` tokens: :func:`pieces` after the model's start tokens.

    Raises:
        ValueError: all texts together, which the message calls ``name``, are too short.
    """
    start = start_tokens(tokenizer)
    cut = pieces(encode(tokenizer, texts), length - len(start), count, name)
    return [start + piece for piece in cut]


def pieces(
    texts: list[list[int]], length: int, count: int, name: str = "The text"
) -> list[list[int]]:
    """Up to ``count`` pieces of ``length`` tokens: the first of every text, then the second, ...

    If no text is long enough, all texts are joined first.

    Raises:
        ValueError: all texts together, which the message calls ``name``, are too short.
    """
    total = sum(map(len, texts))
    if total < length:
        raise ValueError(
            f"{name} has {total:,} tokens and {length:,} are needed: "
            "give a longer text or ask for a shorter context."
        )
    if max(map(len, texts)) < length:
        texts = [[token for text in texts for token in text]]
    starts = range(0, max(map(len, texts)) - length + 1, length)
    cut = (text[start : start + length] for start in starts for text in texts)
    return [piece for piece in cut if len(piece) == length][:count]
