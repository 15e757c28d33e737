"""``mlx_turboquant store``: list, check, prune or clear a folder of prompts."""

import argparse
import sys
import time

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ..lm.prompt_store import PromptStore
from .options import parse_size

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (0, "s"))


def main(arguments: list[str]) -> None:
    """Do what the first argument names with the folder that the second one does."""
    args = _parser().parse_args(arguments)
    store = PromptStore(args.folder)
    if args.action == "list":
        _list(store)
    elif args.action == "check":
        _check(store)
    else:
        size = 0 if args.action == "clear" else parse_size(args.size)
        print(f"{store.prune(size)} prompts removed, {len(store.entries())} left.")


def _list(store: PromptStore) -> None:
    table = Table("tokens", "MB", "last used", "model", "begins with")
    entries = store.entries()
    for entry in entries:
        table.add_row(
            f"{len(entry.tokens):,}",
            f"{entry.nbytes / 1e6:,.1f}",
            f"{_age(time.time() - entry.used)} ago",
            entry.model,
            " ".join(entry.beginning.split()),
        )
    Console().print(table)
    print(f"{len(entries)} prompts, {sum(entry.nbytes for entry in entries) / 1e6:,.1f} MB")


def _check(store: PromptStore) -> None:
    count = len(store.files())
    wrong = sum(not is_right for is_right in tqdm(store.check(), total=count, leave=False))
    print(f"{count - wrong} of {count} prompts are as they were written.")
    sys.exit(1 if wrong else 0)


def _age(seconds: float) -> str:
    length, unit = next(each for each in _UNITS if seconds >= each[0] or each[0] == 0)
    return f"{max(0, seconds) // max(length, 1):.0f} {unit}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_turboquant store", description=__doc__)
    parser.add_argument("action", choices=("list", "check", "prune", "clear"))
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument(
        "--size", default="20GB", help="Bytes that prune leaves, as 20GB (default: %(default)s)"
    )
    return parser
