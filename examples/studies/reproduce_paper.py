"""Reproduce tables and figures of the TurboQuant paper (arXiv 2504.19874), and of its relatives.

    pip install ".[embeddings,evaluate]"
    python examples/studies/reproduce_paper.py --out docs

Random vectors on the sphere in 128 dimensions come first, each number beside its reference and the
deviation from it. References are exact where there is a closed form. The others come from 100,000
vectors in float64, computed without this package and good to about half a percent. Sentence
embeddings of 384 dimensions follow (--sentences 0 leaves them out). Writes three pictures, one of
them of keys of the bundled model.
"""

import argparse
import itertools
from math import pi, prod, sqrt
from pathlib import Path
from typing import NamedTuple

import embeddings
import matplotlib
import mlx.core as mx
import mlx_lm
import numpy as np
from matplotlib.figure import Figure
from mlx_lm.models.cache import make_prompt_cache
from other_methods import ALL_METHODS
from polar_quant import LEVELS, angle_levels

from mlx_turboquant.codec.codebook import codebook, distortion, lloyd_max_levels
from mlx_turboquant.codec.rotation import Rotation
from mlx_turboquant.lm import texts
from mlx_turboquant.lm.loading import prepare_for_device

DIM = 128
BITS = (1, 2, 3, 4, 5)
# Data and rotations have different seeds, which keeps them independent of each other.
DATA_SEED, ROTATION_SEED = 1234, 7
ROTATIONS = 10
QUERIES = 500
# The paper's numbers for 1 to 4 bits: squared error (Theorem 1), variance times dim (2).
PAPER_ERRORS = (0.36, 0.117, 0.03, 0.009)
PAPER_VARIANCES = (1.57, 0.56, 0.18, 0.047)

# Relative squared errors at DIM dimensions and 1 to 5 bits.
ERRORS = {
    "mse": (0.3608886, 0.1160001, 0.0339659, 0.0093148, 0.0024515),
    "norm": (0.401122, 0.118881, 0.0338299, 0.00918237, 0.00240798),
    "eden-biased": (0.360547, 0.115281, 0.0335336, 0.00916001, 0.00240639),
    "eden": (0.567286, 0.130646, 0.0347408, 0.00924994, 0.00241277),
    "prod": (None, 0.565284, 0.181806, 0.053267, 0.0146001),
    "prod-orthogonal": (None, 0.204504, 0.0657984, 0.0192678, 0.0052838),
    # The least-squares errors of a search over 13 gains, converted to the unbiased scale.
    "turboquant": (None, *(x / (1 - x) for x in (0.11431, 0.03167, 0.00782)), None),
    "qjl": tuple((pi / 2 - 1 / DIM) / bits for bits in BITS),
    "qjl-orthogonal": (0.56689, None, None, None, None),
}
# Variances of the product with a unit vector orthogonal to the quantized one, times DIM.
VARIANCES = {
    "mse": (0.23353, 0.102297, 0.0322536, 0.00911404, 0.00241067),
    "norm": (0.365398, 0.116263, 0.0335419, 0.00923179, 0.00242164),
    "eden": (0.574929, 0.131756, 0.0347488, 0.00932254, 0.00242807),
    "prod": (None, 0.569502, 0.18103, 0.0532545, 0.0145645),
    "prod-orthogonal": (None, 0.204146, 0.0656107, 0.0193467, 0.00530647),
    "qjl": tuple(pi / 2 / bits for bits in BITS),
    "qjl-orthogonal": (0.573787, None, None, None, None),
}
STYLES = {
    "turboquant": ("C0", "o-"),
    "eden": ("C0", "s:"),
    "mse": ("C2", "o-"),
    "prod": ("C3", "o-"),
    "prod-orthogonal": ("C3", "s:"),
    "qjl": ("C1", "o-"),
    "qjl-orthogonal": ("C1", "s:"),
    "polar": ("C4", "*"),
    "split": ("C5", "^-"),
    "affine": ("0.4", "v-"),
}


class Measured(NamedTuple):
    """The errors of a method on some vectors, relative to their squared length.

    ``bits`` is the setting and ``stored`` the bits per value with everything counted. ``error`` is
    the squared error. ``bias`` belongs to the product with the vector itself, ``variance`` to the
    product with an orthogonal vector, times the dimension.
    """

    name: str
    bits: int
    stored: float
    error: float
    bias: float
    variance: float


def measure_all(x: mx.array) -> dict[tuple[str, int], Measured]:
    """Measure all methods on unit vectors x (n, dim): results by name and bits."""
    measured = {}
    for name, bits in itertools.product(ALL_METHODS, BITS):
        try:
            ALL_METHODS[name](x[:1], bits, 0)
        except ValueError:
            continue  # the method does not have these bits
        measured[name, bits] = measure(name, bits, x)
    return measured


def measure(name: str, bits: int, x: mx.array) -> Measured:
    """Measure a method on unit vectors x (n, dim), with another rotation for every tenth of them.

    The variance is the exact mean over all orthogonal directions; none are sampled.
    """
    sums, dim = np.zeros(3), x.shape[1]
    cuts = [i * len(x) // ROTATIONS for i in range(1, ROTATIONS)]
    for seed, part in enumerate(mx.split(x, cuts), ROTATION_SEED):
        method = ALL_METHODS[name](part, bits, seed)
        restored = method.dequantize(method.quantize(part))
        along = (restored * part).sum(axis=-1, keepdims=True)
        across = mx.square(restored - along * part).sum(axis=-1)
        squared = mx.square(restored - part).sum(axis=-1)
        sums += [y.sum().item() for y in (squared, along - 1, across)]
    error, bias, across = sums / len(x)
    return Measured(name, bits, method.bits_per_value, error, bias, across * dim / (dim - 1))


def sphere(count: int, dim: int) -> mx.array:
    """Unit vectors of uniform direction: float32 (count, dim)."""
    x = mx.random.normal((count, dim), key=mx.random.key(DATA_SEED))
    return x / mx.linalg.norm(x, axis=-1, keepdims=True)


def print_table(title: str, header: str, rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| {header} |\n|{'---|' * (header.count('|') + 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def compared(value: float, reference: float | None) -> list[str]:
    """Table cells for a number, its reference and the deviation from it."""
    if reference is None:
        return [f"{value:.5f}", "", ""]
    return [f"{value:.5f}", f"{reference:.5f}", f"{value / reference - 1:+.2%}"]


def print_theorem_1(results: dict[tuple[str, int], Measured]) -> None:
    rows = []
    for bits, paper in zip(BITS, (*PAPER_ERRORS, None)):
        exact = distortion(DIM, lloyd_max_levels(DIM, bits))
        bounds = (f"{x * 4**-bits:.5f}" for x in (sqrt(3) * pi / 2, 1))
        cells = compared(results["mse", bits].error, ERRORS["mse"][bits - 1])
        rows.append([str(bits), *cells, f"{exact:.5f}", f"{paper or ''}", *bounds])
    print_table(
        f"Theorem 1: squared error of TurboQuant_mse, {DIM} dimensions",
        "bits | measured | reference | deviation | quadrature | paper | upper bound | lower bound",
        rows,
    )


def print_theorem_2(results: dict[tuple[str, int], Measured]) -> None:
    rows = []
    for bits, paper in zip(BITS, (*PAPER_VARIANCES, None)):
        name = "prod" if bits > 1 else "qjl"  # one bit leaves nothing for a first stage
        bounds = (f"{x * 4**-bits:.5f}" for x in (sqrt(3) * pi**2, 1))
        cells = compared(results[name, bits].variance, VARIANCES[name][bits - 1])
        eden = compared(results["eden", bits].variance, VARIANCES["eden"][bits - 1])
        ratio = results[name, bits].variance / results["eden", bits].variance
        rows.append([str(bits), *cells, f"{paper or ''}", *bounds, *eden, f"{ratio:.1f}"])
    print_table(
        f"Theorem 2: variance times dim, TurboQuant_prod and unbiased EDEN, {DIM} dimensions",
        "bits | prod | reference | deviation | paper | upper bound | lower bound "
        "| EDEN | reference | deviation | prod / EDEN",
        rows,
    )


def polar_error() -> float:
    """The relative squared error of PolarQuant in closed form, without rounding of radii.

    It is 2 - 2 c, with c the product over all levels of the mean cosine of the error.
    """
    angles = np.linspace(0, pi / 2, 200_001)
    cosines = [16 / pi * np.sin(pi / 16)]
    for level in range(2, LEVELS + 1):
        errors = np.abs(angles[:, None] - angle_levels(level)).min(axis=1)
        density = np.sin(2 * angles) ** (2 ** (level - 1) - 1)
        cosines.append((density * np.cos(errors)).sum() / density.sum())
    return 2 - 2 * prod(cosines)


def print_all(results: dict[tuple[str, int], Measured]) -> None:
    rows = []
    for (name, bits), measured in results.items():
        references = [table.get(name, (None,) * 5)[bits - 1] for table in (ERRORS, VARIANCES)]
        if name == "polar":
            references = [polar_error(), None]
        cells = [compared(x, y) for x, y in zip((measured.error, measured.variance), references)]
        bias = f"{measured.bias:+.4f}"
        rows.append([name, str(bits), f"{measured.stored:.3f}", *cells[0], bias, *cells[1]])
    print_table(
        f"All methods on the sphere, {DIM} dimensions",
        "method | bits | stored | error | reference | deviation | bias | variance | reference "
        "| deviation",
        rows,
    )


def print_embeddings(
    results: dict[tuple[str, int], Measured], others: dict[tuple[str, int], Measured]
) -> None:
    rows = []
    for key, measured in results.items():
        cells = [*compared(measured.error, others[key].error), f"{measured.bias:+.4f}"]
        cells += compared(measured.variance, others[key].variance)
        rows.append([measured.name, str(measured.bits), f"{measured.stored:.3f}", *cells])
    print_table(
        f"Sentence embeddings, {embeddings.DIM} dimensions, beside as many vectors on the sphere",
        "method | bits | stored | error | on the sphere | deviation | bias | variance "
        "| on the sphere | deviation",
        rows,
    )


def inner_products(x: mx.array, bits: int, names: list[str]) -> dict[str, list[tuple]]:
    """Errors of the products of the first vectors with all others, in bins of the true product.

    A bin has its middle, and the mean and standard deviation of the errors over 8 rotations.
    """
    queries, vectors = x[:QUERIES], x[QUERIES:]
    true = np.array(queries @ vectors.T).ravel()
    edges = np.linspace(-0.05, 0.65, 15)
    bins = np.digitize(true, edges)
    curves = {}
    for name in names:
        made = [ALL_METHODS[name](vectors, bits, ROTATION_SEED + i) for i in range(8)]
        estimates = (method.inner_product(queries, method.quantize(vectors)) for method in made)
        errors = np.stack([np.array(estimate).ravel() - true for estimate in estimates])
        curves[name] = [
            ((low + high) / 2, errors[:, bins == i].mean(), errors[:, bins == i].std())
            for i, (low, high) in enumerate(zip(edges, edges[1:]), 1)
            if (bins == i).sum() > 50
        ]
    return curves


def print_inner_products(curves: dict[str, list[tuple]], bits: int) -> None:
    rows = []
    for middle, *_ in curves["mse"][::3]:
        rows.append([f"{middle:.2f}"])
        for points in curves.values():
            rows[-1] += [f"{x:+.4f}" for at, *numbers in points if at == middle for x in numbers]
    print_table(
        f"Errors of inner products of sentences at {bits} bits: mean and standard deviation",
        "product | " + " | ".join(f"{name}: mean | sd" for name in curves),
        rows,
    )


def keys_of_tiny_lm() -> mx.array:
    """Keys of a layer of the bundled model while it reads a text: unit vectors (n, 128)."""
    model, tokenizer = mlx_lm.load(str(Path(__file__).parents[1] / "tiny-lm"))
    prepare_for_device(model)
    text = texts.encode(tokenizer, texts.bundled_texts()[:1])[0][:2048]
    cache = make_prompt_cache(model)
    model(mx.array([text]), cache=cache)
    keys = cache[2].keys[0, 0, :2048].astype(mx.float32)
    return keys / mx.linalg.norm(keys, axis=-1, keepdims=True)


def rotations(x: mx.array) -> dict[str, tuple[mx.array, float]]:
    """Unit vectors that a codec can round in place of x (n, dim), and their energy.

    Removing the mean leaves less energy, and so a smaller error.
    """
    rotation = Rotation(x.shape[1], seed=ROTATION_SEED)
    rest = x - x.mean(axis=0)
    energy = mx.square(rest).sum(axis=-1, keepdims=True)
    return {
        "keys as they are": (x, 1.0),
        "rotated": (rotation.apply(x), 1.0),
        "their mean removed, rotated": (rotation.apply(rest / mx.sqrt(energy)), energy),
    }


def print_rotations(x: mx.array) -> None:
    rows = []
    for title, (y, energy) in rotations(x).items():
        values = y * sqrt(x.shape[1])
        rms = mx.sqrt(mx.square(values).mean(axis=0))
        cells = [f"{rms.max().item():.2f}", f"{rms.min().item():.2f}"]
        for bits in (2, 3, 4):
            levels, thresholds = map(mx.array, codebook(x.shape[1], bits))
            rounded = levels.astype(mx.float32)[mx.searchsorted(thresholds, values)]
            error = (mx.square(rounded - values).mean(axis=-1, keepdims=True) * energy).mean()
            cells.append(f"{error.item():.4f}")
        rows.append([title, *cells])
    print_table(
        "Keys of a layer of tiny-lm: root mean squares of coordinates, error of the levels",
        "rounded | largest | smallest | 2 bits | 3 bits | 4 bits",
        rows,
    )


def draw_rotation(x: mx.array) -> Figure:
    """Draw histograms of the coordinates of unit vectors x (n, dim) before and after the rotation.

    They show all coordinates, and those with the largest, median and smallest root mean square.
    """
    dim = x.shape[1]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    bins, u = np.linspace(-5, 5, 71), np.linspace(-4.5, 4.5, 400)
    density = np.exp((dim - 3) / 2 * np.log1p(-u * u / dim))
    density /= density.sum() * (u[1] - u[0])
    levels = codebook(dim, 3).levels
    for axis, (title, (y, _)) in zip(axes, rotations(x).items()):
        values = np.array(y) * sqrt(dim)
        rms = np.sqrt((values * values).mean(axis=0))
        for i, which in zip(np.argsort(rms)[[-1, dim // 2, 0]], ("largest", "median", "smallest")):
            label = f"{which}, rms {rms[i]:.2f}"
            axis.hist(values[:, i], bins, density=True, histtype="step", label=label)
        axis.hist(values.ravel(), bins, density=True, color="0.85", label="all coordinates")
        axis.set(xlabel="coordinate, times √d", title=title, xlim=(-5, 5))
        if axis is not axes[0]:
            axis.plot(u, density, "k", lw=1, label="on the sphere")
            axis.plot(levels, np.zeros(8), "k|", ms=14, mew=2, label="levels of 3 bits")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("density")
    return figure


def draw_distortion(panels: dict[str, dict[tuple[str, int], Measured]]) -> Figure:
    """Plot squared error against stored bits, with a panel for each kind of vectors."""
    figure = Figure(figsize=(5.2 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, results) in zip(axes, panels.items()):
        bits = np.linspace(1, 5.5, 50)
        axis.fill_between(bits, 4**-bits, 1e-9, color="0.9", label="impossible")
        axis.plot(bits, sqrt(3) * pi / 2 * 4**-bits, "k--", lw=1, label="bound of Theorem 1")
        for name, (color, style) in STYLES.items():
            points = [(m.stored, m.error) for m in results.values() if m.name == name]
            axis.plot(*zip(*points), style, color=color, ms=4 if style != "*" else 9, label=name)
        axis.set(yscale="log", xlim=(1, 5.5), ylim=(5e-4, 2), title=title)
        axis.set(xlabel="stored bits per value", ylabel="squared error")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower left")
    return figure


def draw_inner_products(
    results: dict[tuple[str, int], Measured], curves: dict[str, list[tuple]], bits: int
) -> Figure:
    """Plot variance against bits and, with sentences, bias and spread against the true product."""
    figure = Figure(figsize=(9.6 if curves else 5.2, 4.2), layout="constrained")
    axes = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
    b = np.linspace(1, 5.5, 50)
    axes[0].fill_between(b, 4**-b, 1e-9, color="0.9", label="impossible")
    axes[0].plot(b, sqrt(3) * pi**2 * 4**-b, "k--", lw=1, label="bound of Theorem 2")
    for name in ("qjl", "prod", "prod-orthogonal", "eden", "turboquant"):
        color, style = STYLES[name]
        points = [(m.stored, m.variance) for m in results.values() if m.name == name]
        axes[0].plot(*zip(*points), style, color=color, ms=4, label=name)
    axes[0].set(yscale="log", xlim=(1, 5.5), ylim=(5e-4, 4), xlabel="stored bits per value")
    axes[0].set(ylabel="variance of the product, times d", title="unbiased methods, sphere")
    axes[0].grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    for name, points in curves.items():
        middle, mean, deviation = map(np.array, zip(*points))
        color, _ = STYLES[name]
        axes[1].plot(middle, mean, "o-", color=color, ms=3, label=name)
        axes[1].fill_between(middle, mean - deviation, mean + deviation, color=color, alpha=0.15)
    if curves:
        axes[1].axhline(0, color="k", lw=0.8)
        axes[1].set(xlabel="product of two sentences", ylabel="error: mean and standard deviation")
        axes[1].set_title(f"sentence embeddings, {bits} bits")
        axes[1].legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--vectors", type=int, default=100_000, help="on the sphere (default: %(default)s)")
    add("--sentences", type=int, default=4000, help="to embed; 0 for none (default: %(default)s)")
    add("--out", type=Path, default=Path("reproduction"), help="folder of the pictures")
    args = parser.parse_args()
    if args.vectors < 2 * QUERIES or 0 < args.sentences < 2 * QUERIES:
        parser.error(f"use {2 * QUERIES} or more vectors and sentences, or no sentences.")
    matplotlib.use("agg")
    try:
        sentences = args.sentences and embeddings.embed(embeddings.sentences(args.sentences))
    except ValueError as error:
        raise SystemExit(f"{error} --sentences 0 does without.") from error

    results = measure_all(sphere(args.vectors, DIM))
    print_theorem_1(results)
    print_theorem_2(results)
    print_all(results)
    panels, curves, bits = {f"sphere, {DIM} dimensions": results}, {}, 2
    if args.sentences:
        # Their mean is not zero. It stays, because the methods do not remove it either.
        vectors = mx.array(sentences)
        on_sentences = measure_all(vectors)
        panels[f"sentence embeddings, {embeddings.DIM} dimensions"] = on_sentences
        print_embeddings(on_sentences, measure_all(sphere(len(vectors), embeddings.DIM)))
        curves = inner_products(vectors, bits, ["mse", "prod", "eden"])
        print_inner_products(curves, bits)

    keys = keys_of_tiny_lm()
    print_rotations(keys)

    args.out.mkdir(parents=True, exist_ok=True)
    figures = {
        "rotation.png": draw_rotation(keys),
        "distortion.png": draw_distortion(panels),
        "inner-products.png": draw_inner_products(results, curves, bits),
    }
    for name, figure in figures.items():
        figure.savefig(args.out / name, dpi=90)
        print(f"Wrote {args.out / name}")


if __name__ == "__main__":
    main()
