"""Draw the points that caches lose in tasks, and print the tables of docs/quality.md.

    python examples/studies/draw_answers.py docs/answers/*.json --quality docs/quality --out docs

Each file is a tasks.json of ``evaluate --tasks`` under the name of its model. The bytes of a token
are those of the evaluation.json of the same name in the folder of ``--quality``.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
from draw_quality import THEMES, Theme, dress, panels
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_MARKERS = {"keys": "o", "steps": "s", "tools": "D", "copy": "^"}
_OTHER_MARKER = "v"
# Of the width of a panel, between the marks of two tasks for the same cache.
_STEP = 0.011


def rows_by_task(result: dict[str, Any]) -> dict[str, dict[str, dict[str, str]]]:
    """The rows of a table by task and by cache."""
    tasks: dict[str, dict[str, dict[str, str]]] = {}
    for row in result["table"]:
        tasks.setdefault(row["task"], {})[row["cache"]] = row
    return tasks


def numbers(row: dict[str, str]) -> list[float]:
    """Points of a row, and the ends of their interval."""
    return [float(number) for number in re.findall(r"[+-]?\d+\.\d", row["points"])]


def table(name: str, result: dict[str, Any]) -> str:
    """A Markdown table of the tasks of one model; significant losses are bold."""
    tasks = rows_by_task(result)
    caches = list(dict.fromkeys(row["cache"] for row in result["table"]))
    lines = [f"| {name} | context | questions | solved | {' | '.join(caches)} |"]
    lines.append("|---" * (4 + len(caches)) + "|")
    for task, rows in tasks.items():
        first = rows[caches[0]]
        solved = int(first["both"]) + int(first["only exact"])
        asked = solved + int(first["only this"]) + int(first["neither"])
        cells = [task, first["context"], f"{asked}", f"{solved}"]
        for cache in caches:
            points = rows[cache]["points"]
            cells.append(f"**{points}**" if numbers(rows[cache])[2] < 0 else points)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], sizes: dict[str, dict], theme: Theme) -> Figure:
    """Plot points against bytes per token, with a panel for each model."""
    figure, axes = panels(len(results), theme, "points more than the exact cache")
    for axis, (name, result) in zip(axes, results.items()):
        _panel(axis, rows_by_task(result), sizes[name], theme)
        dress(axis, name, theme, "lower right")
    return figure


def _panel(
    axis: Axes,
    tasks: dict[str, dict[str, dict[str, str]]],
    sizes: dict[str, float],
    theme: Theme,
) -> None:
    """A mark for each task and cache with its 95 % interval, ours joined by lines."""
    axis.axhline(0, color=theme.text, alpha=0.6)
    for is_ours, colour in ((True, theme.methods[-1]), (False, theme.methods[0])):
        for i, (task, rows) in enumerate(tasks.items()):
            own = {c: numbers(row) for c, row in rows.items() if is_ours != c.startswith("mlx-lm")}
            x = [sizes[cache] + _STEP * (i - (len(tasks) - 1) / 2) for cache in own]
            y = [points for points, _, _ in own.values()]
            below = [points - low for points, low, _ in own.values()]
            above = [high - points for points, _, high in own.values()]
            marker = _MARKERS.get(task.partition(",")[0], _OTHER_MARKER)
            style = marker + ("-" if is_ours else "")
            label = task if is_ours else "mlx-lm 4 bits" if own and i == 0 else None
            axis.errorbar(x, y, (below, above), fmt=style, color=colour, ms=8, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="tasks.json of each model")
    parser.add_argument(
        "--quality", type=Path, required=True, help="folder of evaluation.json files"
    )
    parser.add_argument("--out", type=Path, help="folder of answers-light.png and answers-dark.png")
    args = parser.parse_args()
    results = {file.stem: json.loads(file.read_text()) for file in args.files}
    sizes = {}
    for name, result in results.items():
        print(table(name, result), end="\n\n")
        codecs = json.loads((args.quality / f"{name}.json").read_text())["codecs"]
        exact = codecs[0]["token_nbytes"]
        sizes[name] = {c["codec"]: (c["token_nbytes"] or 0) / exact for c in codecs}
    if args.out is not None:
        matplotlib.use("agg")
        for kind, theme in THEMES.items():
            draw(results, sizes, theme).savefig(args.out / f"answers-{kind}.png", dpi=110)


if __name__ == "__main__":
    main()
