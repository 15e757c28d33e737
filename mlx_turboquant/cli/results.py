"""Shared parts of the measuring commands: optional libraries, tables and files of results."""

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import __version__ as mlx_lm_version
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..files import write_errors


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


def print_rows(rows: list[dict[str, str]], width: int = 120, **options: Any) -> None:
    """Print a table with the keys of the first row as columns; rich's Table takes ``options``.

    A line separates rows of different ``context``.
    """
    table = Table(box=SIMPLE, **options)
    for column in rows[0] if rows else ():
        is_name = column == "cache"
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for row, following in zip(rows, [*rows[1:], *rows[-1:]]):
        is_last = row.get("context") != following.get("context")
        table.add_row(*row.values(), end_section=is_last)
    print_rich(table, width)


class _Console(Console):
    """A console that raises BrokenPipeError instead of ending the process."""

    def on_broken_pipe(self) -> None:
        raise  # the error that rich has caught


def print_rich(table: Table, width: int = 120) -> None:
    """Print a table, with ``width`` columns of text into a file or a pipe."""
    # Without colors rich would still write in italics and bold.
    console = _Console(color_system=None if os.environ.get("NO_COLOR") else "auto")
    if not console.is_terminal:
        console.width = width
    console.print(table)


def write_results(
    folder: Path, name: str, result: dict[str, Any], draw: Callable[[dict[str, Any], Path], None]
) -> None:
    """Write NAME.json and the pictures of ``draw(result, folder)`` atomically; print the paths."""
    with (
        write_errors(folder),
        tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as temporary,
    ):
        (Path(temporary) / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(result, Path(temporary))
        written = sorted(Path(temporary).iterdir())
        for file in written:
            os.replace(file, folder / file.name)
    for file in written:
        print(f"Wrote {folder / file.name}")
