"""Draw the first picture of the README and print the tables of docs/quality.md.

    python examples/studies/draw_quality.py docs/quality/*.json --out docs

Each file is an evaluation.json of ``evaluate`` under the name of its model. Each gets a table in
Markdown. The picture shows all models side by side, once for light and once for dark pages.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Prefixes of the names that `evaluate` gives to caches; "" is mlx_turboquant.
_METHODS = {
    "mlx-lm ": "mlx-lm",
    "mse ": "TurboQuant_mse (paper)",
    "trellis ": "trellis codes",
    "": "mlx_turboquant",
}


class Theme(NamedTuple):
    """Colours of a page: background, text, and one for each of ``_METHODS``."""

    background: str
    text: str
    methods: tuple[str, str, str, str]


THEMES = {
    "light": Theme("#ffffff", "#1f2328", ("#c4600a", "#6e5fb8", "#0969da", "#0a7f5a")),
    "dark": Theme("#0d1117", "#e6edf3", ("#f0a04b", "#b3a5f5", "#58a6ff", "#3fd09b")),
}


def method_of(codec: dict[str, Any]) -> tuple[str, str]:
    """The method of a cache and its bits, as strings."""
    prefix = next(prefix for prefix in _METHODS if codec["codec"].startswith(prefix))
    return _METHODS[prefix], codec["codec"].removeprefix(prefix).removesuffix(" bits")


def table(name: str, result: dict[str, Any]) -> str:
    """A Markdown table of the caches of one model."""
    exact, *others = result["codecs"]
    heads = [
        name,
        "KL",
        "99 %",
        f"perplexity (exact {exact['perplexity']:.2f})",
        "top-1",
        f"bytes a token (fp16 {exact['token_nbytes']:,.0f})",
    ]
    if exact.get("needles"):
        heads.append("codes found")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for codec in others:
        method, bits = method_of(codec)
        cells = [f"{method} {bits} bits"]
        if codec["failure"] is not None:
            cells += ["not possible", *[""] * (len(heads) - 2)]
        else:
            change = codec["perplexity"] / exact["perplexity"] - 1
            cells += [f"{codec['kl_mean']:.5f}", f"{codec['kl_p99']:.4f}"]
            cells += [f"{codec['perplexity']:.2f} ({change:+.1%})"]
            cells += [f"{codec['top1_agreement']:.1%}", f"{codec['token_nbytes']:,.0f}"]
        if codec["failure"] is None and exact.get("needles"):
            found = [needle["found"] for needle in codec["needles"]]
            cells.append(f"{sum(found)} of {len(found)}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def panels(count: int, theme: Theme, label: str) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels side by side, over bytes per token; ``label`` is of y."""
    figure = Figure(figsize=(6 * count, 5.6), layout="constrained")
    figure.set_facecolor(theme.background)
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    axes[0].set_ylabel(label, color=theme.text)
    figure.supxlabel("bytes a token, relative to a 16-bit cache", color=theme.text, fontsize=16)
    return figure, list(axes)


def draw(results: dict[str, dict[str, Any]], theme: Theme) -> Figure:
    """Plot divergence against bytes per token, with a panel for each model."""
    figure, axes = panels(len(results), theme, "divergence from the exact cache (nats)")
    for axis, (name, result) in zip(axes, results.items()):
        _panel(axis, result, theme)
        dress(axis, name, theme, "upper right")
    return figure


def _panel(axis: Axes, result: dict[str, Any], theme: Theme) -> None:
    exact, *others = result["codecs"]
    for method, colour in zip(_METHODS.values(), theme.methods):
        codecs = [c for c in others if method_of(c)[0] == method and c["failure"] is None]
        sizes = [codec["token_nbytes"] / exact["token_nbytes"] for codec in codecs]
        divergences = [codec["kl_mean"] for codec in codecs]
        ours = method == _METHODS[""]
        width, size = (3, 9) if ours else (1.8, 8)
        axis.plot(sizes, divergences, "o-", color=colour, lw=width, ms=size, label=method)
        # Trellis codes stand below scalar ones of the same bits.
        for codec, x, y in () if method == "trellis codes" else zip(codecs, sizes, divergences):
            offset, align = ((9, 4), "left") if method == "mlx-lm" else ((-9, -9), "right")
            axis.annotate(
                method_of(codec)[1],
                (x, y),
                offset,
                textcoords="offset points",
                ha=align,
                va="center",
                color=colour,
                fontsize=14,
                fontweight="bold",
            )
    axis.set_yscale("log")


def dress(axis: Axes, name: str, theme: Theme, legend_place: str) -> None:
    """Give a panel its title, colours, grid and legend, with bytes from 8% to 62%."""
    axis.set_title(name, color=theme.text, fontsize=17)
    axis.set_xlim(0.08, 0.62)
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.set_facecolor(theme.background)
    axis.tick_params(colors=theme.text, which="both", labelsize=14)
    axis.yaxis.label.set_size(16)
    axis.grid(alpha=0.25)
    for spine in axis.spines.values():
        spine.set_color(theme.text)
        spine.set_alpha(0.4)
    legend = axis.legend(
        loc=legend_place, fontsize=13, labelcolor=theme.text, facecolor=theme.background
    )
    legend.get_frame().set_alpha(0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="evaluation.json of each model")
    parser.add_argument("--out", type=Path, help="folder of quality-light.png and quality-dark.png")
    args = parser.parse_args()
    results = {file.stem: json.loads(file.read_text()) for file in args.files}
    for name, result in results.items():
        print(table(name, result), end="\n\n")
    if args.out is not None:
        matplotlib.use("agg")
        for kind, theme in THEMES.items():
            draw(results, theme).savefig(args.out / f"quality-{kind}.png", dpi=110)


if __name__ == "__main__":
    main()
