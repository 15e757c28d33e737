"""``mlx_turboquant calibrate``: measures where in a model bits matter."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from rich.box import SIMPLE
from rich.table import Table
from tqdm import tqdm

from ..kernels.storage import SCALE_NBYTES
from ..lm.allocation import Layer, allocate, chosen_sides, expected_divergence
from ..lm.calibrate import calibrate
from ..lm.choice import choice_of
from ..lm.loading import check_memory, model_errors, prepare_for_device, reason_of
from ..lm.profile import Profile, find_profile, fingerprint, load_profile, save_profile
from ..lm.settings import Settings
from ..lm.texts import read_texts
from .results import print_rich

_BUDGETS = (8, 6, 5, 4, 3.5, 3, 2.5, 2)


def main(arguments: list[str]) -> None:
    """Calibrate a model, keep the profile and print what to expect of budgets."""
    args = _parser().parse_args(arguments)
    texts = None
    if args.text:
        texts = dict(zip((path.name for path in args.text), read_texts(args.text)))
    with model_errors(args.model):
        model, tokenizer = mlx_lm.load(args.model, lazy=True)
    check_memory(model)
    prepare_for_device(model)
    mx.eval(model.parameters())
    profile = _measured(model, tokenizer, texts)
    file = save_profile(profile, args.out)
    choice = choice_of(model, profile)
    print_rich(_table(choice.weighed, choice.expected))
    print(f"{profile.tokens:,} tokens scored of {', '.join(profile.texts)}. Wrote {file}")


def ensure_profile(
    model: nn.Module, tokenizer: Any, args: argparse.Namespace, settings: dict[str, Any]
) -> None:
    """Give a model the profile of ``--profile``, or calibrate it if it has none and needs one."""
    if args.profile is not None:
        choice_of(model, load_profile(args.profile, fingerprint(model)))
        return
    if Settings(**settings).is_fixed or not args.calibrate:
        return
    found = find_profile(fingerprint(model))
    if found is not None:
        choice_of(model, found)
        return
    print(
        "This model has no profile of where bits matter: it is calibrated once, which takes about "
        "as long as reading 16 000 tokens (--no-calibrate does without).",
        file=sys.stderr,
    )
    try:
        profile = _measured(model, tokenizer)
    except ValueError as error:
        print(f"Bits are chosen without a profile: {error}", file=sys.stderr)
        return
    choice_of(model, profile)
    try:
        print(f"Its profile is kept in {save_profile(profile)}.", file=sys.stderr)
    except OSError as error:
        print(f"Its profile cannot be kept: {error}", file=sys.stderr)


def _measured(model: nn.Module, tokenizer: Any, texts: dict[str, str] | None = None) -> Profile:
    """:func:`.calibrate` with a progress bar; whatever the model raises becomes a ValueError."""
    with _progress_bar() as progress:
        try:
            return calibrate(model, tokenizer, texts, progress)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"The model cannot be calibrated ({reason_of(error)}): "
                "use --no-calibrate with the other commands."
            ) from error


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """No bar is shown before the first step, so that an error before it is one line."""
    bar = None

    def progress(finished: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, unit="layers", desc="Calibrating")
        bar.update(finished - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


def _table(weighed: list[Layer], expected: list[Layer]) -> Table:
    """What a token takes and what divergence to expect with some budgets."""
    table = Table("--kv-bits", "bytes a token", "expected divergence", "bits", box=SIMPLE)
    for budget in _BUDGETS:
        bits = allocate(weighed, budget)
        nbytes = sum(
            side.vectors.nbytes(b) + SCALE_NBYTES * side.vectors.heads
            for side, b in chosen_sides(weighed, bits)
        )
        keys, values = zip(*bits)
        table.add_row(
            f"{budget:g}",
            f"{nbytes:,}",
            f"{expected_divergence(expected, bits):.2g} nats",
            f"keys {min(keys)} to {max(keys)}, values {min(values)} to {max(values)}",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_turboquant calibrate", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="Folder of a model of mlx-lm, or its name on the hub")
    add(
        "--text",
        type=Path,
        nargs="+",
        help="Files to measure on, each of them alone (default: bundled ones: prose, code, other "
        "languages, numbers)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="Where to write the profile (default: the user's cache folder, where all commands "
        "look for it)",
    )
    return parser
