"""The tables and the picture of an evaluation."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .results import print_rows


def print_table(result: dict[str, Any]) -> None:
    """Print a line for each cache."""
    codecs = [codec for codec in result["codecs"] if codec["failure"] is None]
    failed = [codec for codec in result["codecs"] if codec["failure"] is not None]
    print_rows(
        [_row(codec, result["greedy"]) for codec in result["codecs"]],
        title=f"{result['texts']} {'texts' if result['texts'] > 1 else 'text'} of "
        f"{result['context']:,} tokens, the last {result['scored']} decoded; KL in nats",
        caption="bits: per value, bytes: per token, scales included. top-1: same most probable "
        "token. overlap: 1 - total variation. departs: first greedy token that differs from that "
        "of the exact cache.",
    )
    if exact := [codec["codec"] for codec in codecs if codec["unpacked"]]:
        print(f"Still exact, because texts this short are not packed: {', '.join(exact)}.")
    for codec in failed:
        print(f"{codec['codec']} does not support this model: {codec['failure']}")
    for i, exact in enumerate(codecs[0].get("generations", [])):
        kind = "Sampled" if exact["sampled"] else "Greedy"
        writers = [codecs[0], result["noise"], *codecs[1:]]
        print_rows(
            [_generation_row(codec["codec"], codec["generations"][i]) for codec in writers],
            title=f"{kind}: {exact['tokens']:,} tokens; their loss under the exact cache, in nats",
            caption="ends: first token that ends a text. repeats: share of runs of four tokens, up "
            "to the end, that were written before.",
        )


def _row(codec: dict[str, Any], greedy: int) -> dict[str, str]:
    if codec["failure"] is not None:
        return {"cache": codec["codec"], "bits": "-"}
    departures = [d for d in codec["departures"] if d is not None]
    return {
        "cache": codec["codec"],
        "bits": f"{codec['bits_per_value']:.2f}",
        "bytes": f"{codec['token_nbytes']:,.0f}",
        "KL mean": f"{codec['kl_mean']:.5f}",
        "99 %": f"{codec['kl_p99']:.4f}",
        "99.9 %": f"{codec['kl_p999']:.4f}",
        "max": f"{codec['kl_max']:.3f}",
        "ppl": f"{codec['perplexity']:.3f}",
        "top-1": f"{codec['top1_agreement']:.1%}",
        "overlap": f"{codec['overlap']:.1%}",
        "departs": f"{min(departures)}" if departures else f"> {greedy}",
    }


def _generation_row(name: str, written: dict[str, Any]) -> dict[str, str]:
    """The loss of generated tokens with the exact cache, averaged over each stretch."""
    places = {"departs": written["departure"], "ends": written["end"]}
    losses = written["losses"]
    return {
        "cache": name,
        **{key: "never" if place is None else f"{place}" for key, place in places.items()},
        "repeats": f"{written['repetition']:.0%}",
        **{f"{i}/{len(losses)}": f"{loss:.2f}" for i, loss in enumerate(losses, 1)},
    }


def draw(result: dict[str, Any], folder: Path) -> None:
    """Write kl.png: mean divergence against bits per value."""
    codecs = [codec for codec in result["codecs"][1:] if codec["failure"] is None]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for ours in (False, True):
        points = [c for c in codecs if c["codec"].startswith("mlx-lm") != ours]
        bits, kl = ([c[key] for c in points] for key in ("bits_per_value", "kl_mean"))
        axis.plot(bits, kl, "o", label="mlx_turboquant" if ours else "mlx-lm", color=f"C{1 - ours}")
        for c in points:
            place = (c["bits_per_value"], c["kl_mean"])
            above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            axis.annotate(c["codec"], place, fontsize=8, **above)
    axis.set(
        yscale="log",
        xlabel="bits per value, scales included",
        ylabel="KL divergence to the exact cache, nats",
        title=f"{result['context']:,} tokens",
    )
    axis.margins(x=0.12)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(folder / "kl.png", dpi=110)
