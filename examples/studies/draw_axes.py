"""Draw the variances of keys along their axes, and the bits that these get: docs/axes.png.

python examples/studies/draw_axes.py --model MODEL --layer 12 --out docs/axes.png
"""

import argparse
from pathlib import Path

import matplotlib
import mlx.core as mx
import mlx_lm
import numpy as np
from matplotlib.figure import Figure

from mlx_turboquant.codec.basis import _METRIC, _METRIC_RIDGE, _power, learned_basis
from mlx_turboquant.lm import axes, texts
from mlx_turboquant.lm.calibrate import calibration_texts
from mlx_turboquant.lm.compressible import compressible_caches, plain_caches
from mlx_turboquant.lm.loading import prepare_for_device

_TOKENS = 512


def variances(model, tokenizer, layer: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Weighted variances of the keys of a layer (H, dim), descending, and the bits of quarters."""
    encoded = texts.encode(tokenizer, calibration_texts().values())
    tokens = mx.array([text[:_TOKENS] for text in encoded])
    place = next(each for each in compressible_caches(model) if each.layer == layer)
    caches = plain_caches(model)
    with axes.watched(model) as watch:
        model(tokens, cache=caches)
    keys, queries, rope = axes.of_layer(place, place.of(caches), watch)
    found = axes.moments(keys, queries).turned(axes.turns(rope, keys.shape[3], axes.all_places()))
    metric = _power(found.queries, _METRIC, _METRIC_RIDGE)
    spectrum = np.sort(np.linalg.eigvals(found.keys @ metric).real, axis=1)[:, ::-1]
    bits = learned_basis(found.keys, found.queries).pattern(3)
    return spectrum, bits if isinstance(bits, tuple) else (bits,) * 4


def figure(spectrum: np.ndarray, bits: tuple[int, ...]) -> Figure:
    """Variances of each head above, bits beneath."""
    picture = Figure(figsize=(7, 4.2), layout="constrained")
    above, beneath = picture.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    dim = spectrum.shape[1]
    for head, row in enumerate(spectrum):
        above.semilogy(np.arange(dim) + 0.5, row / spectrum.mean(), label=f"head {head}")
    above.axhline(1, color="gray", linestyle=":", label="random rotation")
    above.set_ylabel("variance that counts\n(1 is the mean)")
    above.legend(frameon=False)
    starts = np.arange(4) * dim // 4
    beneath.bar(starts, bits, width=dim // 4, align="edge", edgecolor="white", color="#0a7f5a")
    for start, own in zip(starts, bits):
        beneath.text(start + dim / 8, own + 0.15, str(own), ha="center")
    beneath.axhline(3, color="gray", linestyle=":")
    beneath.set(ylabel="bits", ylim=(0, max(bits) + 1.2), xlabel="axis", xlim=(0, dim))
    beneath.set_yticks([0, 3, 6])
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("axes.png"))
    args = parser.parse_args()
    matplotlib.use("Agg")
    model, tokenizer = mlx_lm.load(args.model)
    prepare_for_device(model)
    figure(*variances(model, tokenizer, args.layer)).savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
