"""The table and the picture of a benchmark."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import print_rows


def print_table(result: dict[str, Any]) -> None:
    """Print a line per context length and cache; ratios to the exact cache are in brackets."""
    sequences = f", {result['batch']} sequences" if result["batch"] > 1 else ""
    measured = [run for run in result["runs"] if run["repeats"]]
    exact = {run["context"]: run for run in measured if run["cache"] == "exact"}
    print_rows(
        [_row(run, exact.get(run["context"]), result["batch"]) for run in measured],
        width=150,
        keys=2,
        title=f"{result['model']} on {result['device']}{sequences}, weights "
        f"{result['weights'] / 1e6:,.0f} MB",
        caption="In brackets: ratio to the exact cache. Peaks of memory are in MB and exclude the "
        "weights. graph: the time in which Python builds one step.",
    )
    for cache, reason in result["failures"].items():
        print(f"{cache} does not support this model: {reason}")
    for run in result["too_large"]:
        print(f"{run['cache']} with {run['context']:,} tokens would not fit into memory.")


def _row(run: dict[str, Any], exact: dict[str, Any] | None, batch: int) -> dict[str, str]:
    def with_ratio(text: str, name: str, faster: bool = False) -> str:
        if exact is None or run is exact:
            return text
        ratio = exact[name] / run[name] if faster else run[name] / exact[name]
        return f"{text} ({ratio:.2f})"

    def megabytes(name: str) -> str:
        return with_ratio(f"{run[name] / 1e6:,.0f}", name)

    still_exact = f"{run['cache_nbytes'] / 1e6:,.0f} (still exact)"
    prefill, decode = (_per_second(run, name, batch) for name in ("prefill", "decode"))
    return {
        "context": f"{run['context']:7,}",
        "cache": run["cache"],
        "prefill tok/s": with_ratio(f"{prefill:,.0f}", "prefill", faster=True),
        "first token s": f"{run['first_token']:.2f}",
        "decode tok/s": with_ratio(f"{decode:,.1f}", "decode", faster=True),
        "cache MB": still_exact if run["unpacked"] else megabytes("cache_nbytes"),
        "prefill peak": megabytes("prefill_peak"),
        "decode peak": megabytes("decode_peak"),
        "graph ms": with_ratio(f"{run['graph'] * 1e3:.2f}", "graph"),
    }


def _per_second(run: dict[str, Any], name: str, batch: int) -> float:
    """Tokens per second over all sequences, in prefill or decode."""
    return batch * (run["context"] - 1 if name == "prefill" else 1) / run[name]


def draw(result: dict[str, Any], folder: Path) -> None:
    """Write benchmark.png: speed and memory against context length, a line for each cache."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    speeds, sizes = figure.subplots(2, 2)
    batch = result["batch"]
    for axis, name in zip(speeds, ("prefill", "decode")):
        _lines(axis, result, lambda run, name=name: _per_second(run, name, batch))
        axis.set(title=f"{name}, tokens per second")
    largest = max(run["prefill_peak"] for run in result["runs"] if run["repeats"])
    unit, factor = ("GB", 1e9) if largest > 1e9 else ("MB", 1e6)
    titles = {"prefill_peak": "peak memory in prefill", "cache_nbytes": "cache"}
    for axis, (name, title) in zip(sizes, titles.items()):
        _lines(axis, result, lambda run, name=name: run[name] / factor)
        axis.set(title=f"{title}, {unit}")
    figure.suptitle(f"{result['model']} on {result['device']}, batch {batch}", fontsize=11)
    figure.savefig(folder / "benchmark.png", dpi=100)


def _lines(axis: Axes, result: dict[str, Any], number) -> None:
    for cache in result["caches"]:
        runs = [run for run in result["runs"] if run["cache"] == cache and run["repeats"]]
        contexts = [run["context"] for run in runs]
        axis.plot(contexts, [number(run) for run in runs], "o-", markersize=4, label=cache)
    contexts = sorted({run["context"] for run in result["runs"]})
    axis.set(xscale="log", xlabel="context length, tokens")
    axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    labels = [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in contexts]
    axis.set_xticks(contexts, labels, minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
