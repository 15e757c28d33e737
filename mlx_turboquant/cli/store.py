"""This command lists, checks and prunes a folder of prompts and conversations."""

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ..lm.prompt_store import PromptStore, clear, named, version_of
from .options import parse_size

_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def main(arguments: list[str]) -> None:
    """Apply an action to the folder of a store; the first two arguments name them."""
    args = _parser().parse_args(arguments)
    folder = Path(args.folder).expanduser()
    if version_of(folder) is None:
        raise ValueError(f"{folder} is not a prompt store: give a folder that --prompt-store made.")
    if (args.action == "remove") != (args.name is not None):
        raise ValueError("remove needs a NAME that list shows, and other actions take none.")
    removed = clear(folder) if args.action == "clear" else 1
    store = PromptStore(folder)
    if args.action == "list":
        return _list(store)
    if args.action == "check":
        return _check(store)
    if args.action == "remove":
        store.delete(named([*store.sessions(), *store.entries()], args.name))
    elif args.action == "prune":
        removed = store.prune(parse_size(args.size))
    left = f"{len(store.entries())} prompts and {len(store.sessions())} conversations"
    print(f"{removed} removed, {left} left.")


def _list(store: PromptStore) -> None:
    prompts, conversations = store.entries(), store.sessions()
    for entry in prompts + conversations:
        tokens, megabytes = len(entry.tokens), entry.nbytes / 1e6
        print(f"{entry.name:17} {tokens:9,} tokens {megabytes:9,.1f} MB", end=" ")
        print(f"{age(entry.used):>14}  {entry.model}: {' '.join(entry.beginning.split())[:60]}")
    megabytes = sum(entry.nbytes for entry in prompts + conversations) / 1e6
    print(f"{len(prompts)} prompts, {len(conversations)} conversations, {megabytes:,.1f} MB")


def _check(store: PromptStore) -> None:
    count = len(store.files()) + len(store.sessions())
    wrong = sum(not is_right for is_right in tqdm(store.check(), total=count, leave=False))
    print(f"{count - wrong} of {count} prompts and conversations are intact.")
    sys.exit(1 if wrong else 0)


def age(moment: float) -> str:
    """How long ago a moment was, as "2 hours ago"."""
    seconds = max(0, time.time() - moment)
    length, unit = next(each for each in _UNITS if seconds >= each[0] or each[0] == 1)
    number = int(seconds // length)
    return f"{number} {unit}{'' if number == 1 else 's'} ago"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_turboquant store", description=__doc__)
    actions = ("list", "check", "prune", "remove", "clear")
    parser.add_argument("action", choices=actions, help="Action on the folder")
    parser.add_argument("folder", metavar="DIR", help="Folder made by --prompt-store")
    text = "Prompt or conversation to remove, by its name in list"
    parser.add_argument("name", metavar="NAME", nargs="?", help=text)
    text = "Maximum size of the store after prune, like 20GB, or 20 for short (default: 20GB)"
    parser.add_argument("--size", default="20GB", help=text)
    return parser
