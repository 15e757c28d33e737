"""Compare VectorIndex with faiss's quantizers at about the same bytes, and with exact search.

    pip install ".[embeddings,search]"
    python examples/studies/search.py --png search.png

The vectors are embeddings of sentences of Python's documentation, and clustered vectors of 200,
1,536 and 3,072 dimensions. For each index the tables show how often the nearest vector is among the
first k, the share of the ten nearest among the first ten, and the time to build and search. Most of
the time goes into training faiss's product quantizers.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import embeddings
import mlx.core as mx
import numpy as np

from mlx_turboquant import VectorIndex

KS = (1, 2, 4, 8, 16, 32, 64)
# Maps (queries, k) to the positions of the nearest vectors (q, k).
Search = Callable[[np.ndarray, int], np.ndarray]


class Arm(NamedTuple):
    """An index: ``build`` makes a search from vectors; ``bytes`` per vector exclude its id."""

    name: str
    bits: int
    bytes: int
    build: Callable[[np.ndarray], Search]


class Result(NamedTuple):
    """The results of an index; ``recalls`` has the share of queries for each k of ``KS``."""

    arm: Arm
    recalls: list[float]
    recall_at_10: float
    build_seconds: float
    search_seconds: float


def turboquant(dim: int, bits: int, reranked: bool) -> Arm:
    def build(vectors: np.ndarray) -> Search:
        index = VectorIndex(dim, bits)
        index.add(vectors)
        originals = vectors.__getitem__ if reranked else None
        return lambda queries, k: np.array(index.search(queries, k, originals=originals).ids)

    # Without the 8 bytes of an id: the other indexes use positions.
    size = round(VectorIndex(dim, bits).bits_per_value * dim / 8) - 8
    return Arm("VectorIndex" + ", re-ranked" * reranked, bits, size, build)


def faiss_arm(name: str, bits: int, make: Callable[[], object]) -> Arm:
    def build(vectors: np.ndarray) -> Search:
        index = make()
        index.train(vectors)
        index.add(vectors)
        return lambda queries, k: index.search(queries, k)[1]

    return Arm(f"faiss {name}", bits, make().code_size, build)


def exact(vectors: np.ndarray) -> Search:
    def search(queries: np.ndarray, k: int) -> np.ndarray:
        products = queries @ vectors.T
        nearest = np.argpartition(-products, k, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(products, nearest, axis=1), axis=1)
        return np.take_along_axis(nearest, order, axis=1)

    return search


def arms(dim: int, bits: int) -> list[Arm]:
    """VectorIndex, and faiss's indexes with about as many bytes per vector."""
    faiss = import_faiss()
    product = faiss.METRIC_INNER_PRODUCT
    # Product quantization: 256 centroids for every 8 / bits values.
    found = [
        turboquant(dim, bits, reranked=False),
        turboquant(dim, bits, reranked=True),
        faiss_arm("PQ", bits, lambda: faiss.IndexPQ(dim, dim * bits // 8, 8, product)),
        faiss_arm("RaBitQ", bits, lambda: faiss.IndexRaBitQ(dim, product, bits)),
    ]
    if bits == 4:
        kind = faiss.ScalarQuantizer.QT_4bit
        found.append(faiss_arm("SQ", bits, lambda: faiss.IndexScalarQuantizer(dim, kind, product)))
    return found


def import_faiss():
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ValueError(
            "faiss is not installed: pip install 'mlx-turboquant-cache[search]'."
        ) from error
    return faiss


def clustered(count: int, dim: int, seed: int = 1) -> np.ndarray:
    """Unit vectors around a hundred centres, with variances that fall as 1 / i: (count, dim).

    The axes are rotated at random, so that no coordinate is special.
    """
    rng = np.random.default_rng(seed)
    spread = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    centres, noise = (rng.standard_normal((n, dim), np.float32) * spread for n in (100, count))
    basis, _ = np.linalg.qr(rng.standard_normal((dim, dim), np.float32))
    vectors = (centres[rng.integers(100, size=count)] + noise) @ basis.T
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def measure(vectors: np.ndarray, queries: np.ndarray, bits: list[int]) -> list[Result]:
    """Measure all indexes on the same vectors."""
    nearest = exact(vectors)(queries, max(KS))
    candidates = [Arm("exact", 32, 4 * vectors.shape[1], exact)]
    candidates += [arm for b in bits for arm in arms(vectors.shape[1], b)]
    results = []
    for arm in candidates:
        start = time.perf_counter()
        search = arm.build(vectors)
        built = time.perf_counter()
        found = search(queries, max(KS))
        searched = time.perf_counter()
        hits = found == nearest[:, :1]
        common = [len(set(a) & set(b)) for a, b in zip(found[:, :10], nearest[:, :10])]
        results.append(
            Result(
                arm,
                [float(hits[:, :k].any(axis=1).mean()) for k in KS],
                float(np.mean(common)) / 10,
                built - start,
                searched - built,
            )
        )
    return results


def print_table(title: str, queries: int, results: list[Result]) -> None:
    print(f"\n{title}\n")
    print(f"| index | bytes a vector | recall@10 | {' | '.join(f'1 in {k}' for k in KS)} ", end="")
    print("| build, s | search, ms a query |")
    print("|---" * (5 + len(KS)) + "|")
    for arm, recalls, recall_at_10, build, search in results:
        recalls = " | ".join(f"{recall:.3f}" for recall in recalls)
        print(
            f"| {arm.name}, {arm.bits} bits | {arm.bytes} | {recall_at_10:.4f} | {recalls} ", end=""
        )
        print(f"| {build:.3f} | {1e3 * search / queries:.3f} |", flush=True)


def save_picture(file: Path, data: dict[str, list[Result]]) -> None:
    """Plot the recall of the nearest vector against k, with a panel for each set of vectors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(data), 4), layout="constrained")
    panels = figure.subplots(1, len(data), sharey=True, squeeze=False)[0]
    names = ("VectorIndex", "faiss PQ", "faiss RaBitQ", "faiss SQ")
    for panel, (title, results) in zip(panels, data.items()):
        widths = sorted({arm.bits for arm, *_ in results}, reverse=True)
        for arm, recalls, *_ in results:
            if arm.name in names:
                color, marker = f"C{names.index(arm.name)}", "xos^v"[widths.index(arm.bits) % 5]
                label = f"{arm.name}, {arm.bits} bits"
                panel.plot(KS, recalls, color=color, marker=marker, ms=5, label=label)
        panel.set(title=title, xlabel="k", xscale="log", xticks=KS, xticklabels=KS)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of queries with the nearest vector in the first k")
    panels[-1].legend(fontsize="small")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--sentences", type=int, default=19500, help="to embed, queries included")
    add("--embeddings", type=Path, help="file of embeddings.py, instead of embedding now")
    add("--dims", type=int, nargs="*", default=[200, 1536, 3072], help="of clustered vectors")
    add("--vectors", type=int, default=11000, help="clustered vectors, queries included")
    add("--queries", type=int, default=1000)
    add("--bits", type=int, nargs="+", default=[4, 2])
    add("--threads", type=int, help="of faiss (default: all)")
    add("--png", type=Path, help="write the picture to this file")
    args = parser.parse_args()
    try:
        faiss = import_faiss()
        if args.embeddings is None:
            sentences = embeddings.embed(embeddings.sentences(args.sentences))
        else:
            sentences = np.load(args.embeddings)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    if args.threads:
        faiss.omp_set_num_threads(args.threads)
    print(f"faiss {faiss.__version__}, {faiss.omp_get_max_threads()} threads", end="; ")
    print(f"MLX on the {mx.default_device().type.name}")

    data = {"sentences, d = 384": sentences}
    data |= {f"clustered, d = {dim}": clustered(args.vectors, dim) for dim in args.dims}
    results = {}
    for title, vectors in data.items():
        queries, vectors = vectors[: args.queries], vectors[args.queries :]
        results[title] = measure(vectors, queries, args.bits)
        print_table(f"{len(vectors)} vectors, {title}", len(queries), results[title])
    if args.png:
        save_picture(args.png, results)


if __name__ == "__main__":
    main()
