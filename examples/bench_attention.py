"""Time of one layer's decode attention: MLX's own caches and ours, in one run.

    python examples/bench_attention.py --tokens 4096 32768 131072

The arms alternate. Each measurement is a chain of independent calls in one evaluation, which hides
the gaps between launches; the table has the median per call and its ratio to bfloat16.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models.base import quantized_scaled_dot_product_attention

from mlx_turboquant.attention import CachedTokens, decode_attention
from mlx_turboquant.storage import PackedTokens

PRESETS = ((4, 4), (4, 2), (3, 3), (8, 4))


def dense_arm(keys: mx.array, values: mx.array, scale: float) -> Callable[[mx.array], mx.array]:
    return lambda queries: mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale)


def affine_arm(keys, values, scale, bits) -> Callable[[mx.array], mx.array]:
    """mlx-lm's own quantized cache, groups of 64."""
    packed = [mx.quantize(x, group_size=64, bits=bits) for x in (keys, values)]
    mx.eval(packed)
    return lambda queries: quantized_scaled_dot_product_attention(
        queries * 1, *packed, scale=scale, mask=None, group_size=64, bits=bits
    )


def compressed_arm(keys, values, scale, key_bits, value_bits) -> Callable[[mx.array], mx.array]:
    """Four sinks and 128 recent tokens exact, the rest packed."""
    packed = PackedTokens(key_bits, 0, True), PackedTokens(value_bits, 0, False)
    for store, x in zip(packed, (keys, values)):
        for start in range(4, x.shape[2] - 128, 8192):
            store.append(x[:, :, start : min(start + 8192, x.shape[2] - 128)])
            mx.eval(store.codes, store.scales)
    exact = [mx.concatenate([x[:, :, :4], x[:, :, -128:]], axis=2) for x in (keys, values)]
    mx.eval(exact)
    tokens = CachedTokens(*packed, *exact, exact_count=132, sink_count=4)
    return lambda queries: decode_attention(queries, tokens, scale)


def seconds_per_call(arm, queries: list[mx.array]) -> float:
    begin = time.perf_counter()
    mx.eval([arm(query) for query in queries])
    return (time.perf_counter() - begin) / len(queries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 32768, 131072])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8, help="key and value heads")
    parser.add_argument("--group", type=int, default=4, help="query heads per key head")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--calls", type=int, default=30, help="calls in one evaluation")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    print("tokens   cache    microseconds   ratio to bf16")
    for tokens in args.tokens:
        shape = (args.batch, args.heads, tokens, args.head_dim)
        keys, values = (mx.random.normal(shape).astype(mx.bfloat16) for _ in range(2))
        query_shape = (args.batch, args.heads * args.group, 1, args.head_dim)
        queries = [mx.random.normal(query_shape).astype(mx.bfloat16) for _ in range(args.calls)]
        mx.eval(keys, values, queries)
        scale = args.head_dim**-0.5
        arms = {"bf16": dense_arm(keys, values, scale)}
        arms |= {f"affine{bits}": affine_arm(keys, values, scale, bits) for bits in (4, 8)}
        for key_bits, value_bits in PRESETS:
            arm = compressed_arm(keys, values, scale, key_bits, value_bits)
            arms[f"K{key_bits}V{value_bits}"] = arm
        times: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(args.repeats + 1):  # the first round warms up
            for name, arm in arms.items():
                times[name].append(seconds_per_call(arm, queries))
        medians = {name: statistics.median(series[1:]) for name, series in times.items()}
        for name, median in medians.items():
            ratio = median / medians["bf16"]
            print(f"{tokens:7,}  {name:7}  {median * 1e6:12.1f}   {ratio:13.2f}", flush=True)


if __name__ == "__main__":
    main()
