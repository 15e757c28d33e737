"""Shared parts of the measuring commands: optional libraries, tables and files of results."""

import itertools
import json
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx_lm import __version__ as mlx_lm_version

from .. import __version__
from ..files import files_at_once


@contextmanager
def drawing_tools(command: str) -> Iterator[None]:
    """Raise a ValueError with a remedy if matplotlib is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{command} draws pictures, and matplotlib is not installed: "
            "pip install 'mlx-turboquant-cache[evaluate]'."
        ) from error


def machine() -> dict[str, Any]:
    """The machine and the versions of the software, for a result."""
    return {
        "device": mx.device_info().get("device_name", "CPU"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "mlx_lm": mlx_lm_version,
        "version": __version__,
    }


def print_rows(
    rows: list[dict[str, str]], width: int = 120, keys: int = 1, title: str = "", caption: str = ""
) -> None:
    """Print a table with the keys of the first row as columns, no wider than the terminal.

    A file or a pipe gets at most ``width`` columns of text. Columns for which there is no room
    follow in a table below, which repeats the first ``keys`` columns. If not even one of them fits
    beside these, each row becomes a list. A blank line separates rows of different ``context``.
    """
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    names = list(rows[0]) if rows else []
    widths = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in names}
    repeated, left = names[:keys], names[keys:]

    def fits(*more: str) -> bool:
        return sum(2 + widths[name] for name in (*repeated, *more)) - 2 <= width

    def line(row: dict[str, str], columns: list[str]) -> str:
        sides = zip(columns, "<" * keys + ">" * len(columns))
        return "  ".join(f"{row.get(x, ''):{side}{widths[x]}}" for x, side in sides).rstrip()

    print(f"\n{textwrap.fill(title, width)}".rstrip())
    if not all(map(fits, left)):
        for row in rows:
            print("\n".join(f"{name}: {text}" for name, text in row.items()), end="\n\n")
        left = []
    while left:
        count = max(n for n in range(1, 1 + len(left)) if fits(*left[:n]))
        columns, left = [*repeated, *left[:count]], left[count:]
        print(line(dict(zip(names, names)), columns))
        print(line({x: "-" * widths[x] for x in columns}, columns))
        for _, group in itertools.groupby(rows, key=lambda row: row.get("context")):
            print(*(line(row, columns) for row in group), sep="\n", end="\n\n")
    if caption:
        print(textwrap.fill(caption, width))


def write_results(folder: Path, name: str, result: dict[str, Any], pictures: ModuleType) -> None:
    """Write NAME.json and the pictures of a result atomically; print its table and the paths.

    The table is printed even if the files cannot be written, and they are written before it.
    """
    try:
        with files_at_once(folder, folder) as temporary:
            (temporary / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
            pictures.draw(result, temporary)
            written = sorted(file.name for file in temporary.iterdir())
    finally:
        pictures.print_table(result)
    for file in written:
        print(f"Wrote {folder / file}")
