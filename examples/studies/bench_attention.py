"""Time the decode attention of one layer with MLX's caches and ours, in one run.

    python examples/studies/bench_attention.py --tokens 4096 32768 131072
    python examples/studies/bench_attention.py --groups 1 4 8 --head-dims 64 128 256 --batches 1 8

The caches alternate. A measurement is a chain of independent calls in one evaluation, which hides
the gaps between launches. If MLX takes longer to launch a call than the call itself, the chain
shows the launch time. To time the kernels alone, run one call of each cache under a profiler:

    ncu -k regex:"turboquant|sdpa" --metrics gpu__time_duration.sum \
        python examples/studies/bench_attention.py --once
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from mlx_lm.models.base import quantized_scaled_dot_product_attention

from mlx_turboquant.kernels.attention import decode_attention
from mlx_turboquant.kernels.storage import PackedKV, layouts_of
from mlx_turboquant.kernels.tokens import VisibleTokens

PRESETS = ((4, 4), (4, 2), (3, 3), (8, 4))
CHUNK = 8192


class Shape(NamedTuple):
    batch: int
    heads: int
    group: int
    head_dim: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"batch {self.batch}, {self.heads} x {self.group} heads of {self.head_dim}, "
            f"{self.tokens:,} tokens"
        )


class Arm(NamedTuple):
    attend: Callable[[mx.array], mx.array]
    nbytes: int


def dense_arm(keys: mx.array, values: mx.array, scale: float) -> Arm:
    def attend(queries):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale)

    return Arm(attend, keys.nbytes + values.nbytes)


def affine_arm(keys: mx.array, values: mx.array, scale: float, bits: int) -> Arm:
    """mlx-lm's own quantized cache with groups of 64."""
    packed = [mx.quantize(x, group_size=64, bits=bits) for x in (keys, values)]
    mx.eval(packed)

    def attend(queries):
        # A copy, because the queries are scaled in place.
        return quantized_scaled_dot_product_attention(
            queries * 1, *packed, scale=scale, mask=None, group_size=64, bits=bits
        )

    return Arm(attend, sum(part.nbytes for parts in packed for part in parts))


def compressed_arm(keys, values, scale, key_bits, value_bits) -> Arm:
    """A cache with 4 sinks and 128 recent tokens exact, and the rest packed."""
    packed = PackedKV(layouts_of(key_bits, value_bits), seed=0)
    last = keys.shape[2] - 128
    for start in range(4, last, CHUNK):
        new_keys, new_values = (x[:, :, start : min(start + CHUNK, last)] for x in (keys, values))
        packed.append([new_keys, new_values])
        mx.eval(packed.arrays)
    exact = [mx.concatenate([x[:, :, :4], x[:, :, last:]], axis=2) for x in (keys, values)]
    mx.eval(exact)
    tokens = VisibleTokens(
        *packed.sides, packed.count, *exact, exact_count=132, sink_count=4, recent_start=4
    )
    nbytes = sum(x.nbytes for x in (*exact, *packed.used()))
    return Arm(lambda queries: decode_attention(queries, tokens, scale), nbytes)


def arms_of(shape: Shape) -> dict[str, Arm]:
    size = (shape.batch, shape.heads, shape.tokens, shape.head_dim)
    keys, values = (mx.random.normal(size).astype(mx.bfloat16) for _ in range(2))
    mx.eval(keys, values)
    scale = shape.head_dim**-0.5
    arms = [dense_arm(keys, values, scale)]
    arms += [affine_arm(keys, values, scale, bits) for bits in (4, 8)]
    arms += [compressed_arm(keys, values, scale, *bits) for bits in PRESETS]
    return dict(zip(arm_names(), arms))


def arm_names() -> list[str]:
    return ["bf16", "affine4", "affine8", *(f"K{key}V{value}" for key, value in PRESETS)]


def random_queries(shape: Shape, calls: int) -> list[mx.array]:
    size = (shape.batch, shape.heads * shape.group, 1, shape.head_dim)
    queries = [mx.random.normal(size).astype(mx.bfloat16) for _ in range(calls)]
    mx.eval(queries)
    return queries


def seconds_per_call(function: Callable[[mx.array], mx.array], inputs: list[mx.array]) -> float:
    """The time of the evaluation alone: the graph is built before."""
    outputs = [function(x) for x in inputs]
    begin = time.perf_counter()
    mx.eval(outputs)
    return (time.perf_counter() - begin) / len(inputs)


def bandwidth() -> float:
    """Bytes per second, read and written, of a copy of half a gigabyte."""
    data = mx.ones((1 << 28,), mx.bfloat16)
    mx.eval(data)
    return 2 * data.nbytes / min(seconds_per_call(mx.abs, [data] * 4) for _ in range(5))


def runs(name: str, arm: Arm, queries: mx.array) -> bool:
    """Compile an arm, and return False where MLX has no quantized product for the shape."""
    try:
        mx.eval(arm.attend(queries))
    except RuntimeError as error:
        print(f"{name:8} does not run: {error}", flush=True)
        return False
    return True


def measure(shape: Shape, calls: int, repeats: int) -> Iterator[tuple[str, float, int]]:
    """Yield name, median seconds per call and bytes of the cache of every arm."""
    queries = random_queries(shape, calls)
    arms = {name: arm for name, arm in arms_of(shape).items() if runs(name, arm, queries[0])}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats + 1):  # the first round warms up
        for name, arm in arms.items():
            times[name].append(seconds_per_call(arm.attend, queries))
    for name, arm in arms.items():
        yield name, statistics.median(times[name][1:]), arm.nbytes


def plot(results: list[tuple[Shape, dict[str, float]]], file: Path) -> None:
    """Plot time relative to bfloat16 against tokens, with a panel for every other setting."""
    import matplotlib.pyplot as plt

    panels: dict[Shape, list[tuple[Shape, dict[str, float]]]] = {}
    for shape, medians in results:
        panels.setdefault(shape._replace(tokens=0), []).append((shape, medians))
    # Colours are the same in every panel, though MLX cannot run every arm in each.
    colours = {name: f"C{index}" for index, name in enumerate(arm_names())}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (panel, points) in zip(axes.flat, panels.items()):
        tokens = [shape.tokens for shape, _ in points]
        for name, colour in colours.items():
            ratios = [medians.get(name, math.nan) / medians["bf16"] for _, medians in points]
            axis.plot(tokens, ratios, marker="o", markersize=4, label=name, color=colour)
        axis.set(xscale="log", xlabel="tokens", ylabel="time relative to bf16")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks(tokens, [f"{count // 1024}k" for count in tokens], minor=False)
        axis.set_title(str(panel).rpartition(",")[0], fontsize=10)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(file, dpi=90)
    print(f"Wrote {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--heads", type=int, default=8, help="key and value heads")
    parser.add_argument(
        "--groups", type=int, nargs="+", default=[4], help="query heads per key head"
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--calls", type=int, default=30, help="calls in one evaluation")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--png", type=Path, help="file for a picture of the ratios")
    parser.add_argument("--once", action="store_true", help="one call of each arm, for a profiler")
    args = parser.parse_args()

    product = itertools.product(args.batches, args.groups, args.head_dims, args.tokens)
    shapes = [Shape(batch, args.heads, *rest) for batch, *rest in product]
    if args.once:
        for shape in shapes:
            for arm in arms_of(shape).values():
                mx.eval(arm.attend(random_queries(shape, 1)[0]))
        return
    device = mx.device_info().get("device_name", "CPU")
    bytes_per_second = bandwidth()
    print(f"{device}, MLX {mx.__version__}, a copy moves {bytes_per_second / 1e9:,.0f} GB/s")
    results = []
    for shape in shapes:
        print(
            f"\n{shape}\ncache    microseconds  to bf16   MB read  share of bandwidth", flush=True
        )
        medians: dict[str, float] = {}
        for name, seconds, nbytes in measure(shape, args.calls, args.repeats):
            medians[name] = seconds
            share = nbytes / bytes_per_second / seconds
            ratio = seconds / medians["bf16"]
            numbers = f"{seconds * 1e6:12.1f} {ratio:8.2f} {nbytes / 1e6:9.1f} {share:19.0%}"
            print(f"{name:8} {numbers}", flush=True)
        results.append((shape, medians))
    if args.png:
        plot(results, args.png)


if __name__ == "__main__":
    main()
