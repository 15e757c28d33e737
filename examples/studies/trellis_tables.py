"""The tables of trellis codes, and the search for the best windows of a code stream.

    python examples/studies/trellis_tables.py --windows 8

trains tables for Gaussian values of unit variance, a minute each with windows of 8 bits, and writes
them beside this file with their squared error. In turns, the best windows of many vectors are found
and the mean of the values that have each window.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_turboquant.files import write_json

WINDOWS, BITS = (6, 8, 10), (1, 2, 3, 4)
_FILE = Path(__file__).with_suffix(".json")
_ROUNDS, _TRAINED = 240, (1024, 128)


def best_windows(
    x: mx.array, bits: Sequence[int], weights: mx.array, window: int, is_ring: bool = False
) -> list[mx.array]:
    """The windows of x (n, d), one array (n,) for each coordinate, with the least squared error.

    ``bits`` are those of each coordinate, and ``weights`` (n, d) or (d,) the weights of its error.
    In a ring the last bits stand before the first ones. The stream then starts as it does in the
    best path of a doubled vector, which is nearly always the best ring.
    """
    start, weights = mx.zeros((len(x), 1), mx.uint32), mx.broadcast_to(weights, x.shape)
    if is_ring:
        twice = [mx.concatenate([each, each], axis=1) for each in (x, weights)]
        start = _path(twice[0], [*bits, *bits], twice[1], window)[len(bits) - 1][:, None]
    return _path(x, bits, weights, window, start, is_ring)


def _path(
    x: mx.array,
    bits: Sequence[int],
    weights: mx.array,
    window: int,
    start: mx.array | None = None,
    is_ring: bool = False,
) -> list[mx.array]:
    """The best windows behind a window ``start`` (n, 1), or any; those of a ring end with it."""
    states = 1 << window
    cost = mx.zeros((len(x), states))
    if start is not None:
        cost = mx.where(mx.arange(states) == start, cost, 1e9)
    choices = []
    for i, k in enumerate(bits):
        # A window's low bits are the high ones of the next.
        before = cost.reshape(len(x), 1 << k, states >> k)
        choices.append(before.argmin(axis=1).astype(mx.uint8))
        cost = _with_error(before.min(axis=1), x[:, i, None], weights[:, i, None], table(window, k))
    last = start[:, 0] if is_ring else cost.argmin(axis=1)
    found = []
    for k, choice in zip(reversed(bits), reversed(choices)):
        found.append(last)
        rest = last >> k
        high = mx.take_along_axis(choice, rest[:, None], axis=1)[:, 0].astype(mx.uint32)
        last = (high << (window - k)) | rest
    return found[::-1]


@mx.compile
def _with_error(cost: mx.array, x: mx.array, weight: mx.array, levels: mx.array) -> mx.array:
    """Costs (n, s) of windows before, repeated for those after, whose levels are given."""
    errors = mx.square(x - levels).reshape(len(x), cost.shape[1], -1)
    return (cost[..., None] + weight[..., None] * errors).reshape(len(x), -1)


_tables: dict[tuple[int, int], mx.array] = {}


def table(window: int, bits: int) -> mx.array:
    """The levels of all windows: float32 (2^window,)."""
    if (window, bits) not in _tables:
        levels = map(float, _saved()[f"{window}, {bits}"]["levels"].split())
        _tables[window, bits] = mx.array([*levels], mx.float32)
    return _tables[window, bits]


def _saved() -> dict[str, Any]:
    return json.loads(_FILE.read_text()) if _FILE.exists() else {}


def train(window: int, bits: int) -> None:
    """Train a table by Lloyd's algorithm, with the best path in place of the nearest level."""
    _tables[window, bits] = _initial(window, bits)
    size = 1 << window
    for round in tqdm(range(_ROUNDS), desc=f"windows of {window}, {bits} new"):
        x = mx.random.normal(_TRAINED, key=mx.random.key(round))
        found = best_windows(x, [bits] * x.shape[1], mx.ones(x.shape[1]), window)
        windows, values = np.array(mx.stack(found, axis=1)), np.array(x)
        counts = np.bincount(windows.ravel(), minlength=size)
        sums = np.bincount(windows.ravel(), values.ravel(), size)
        before = np.array(_tables[window, bits])
        levels = np.where(counts > 3, sums / np.maximum(counts, 1), before)
        _tables[window, bits] = mx.array(levels.astype(np.float32))


def _initial(window: int, bits: int) -> mx.array:
    """Quantiles: the new bits choose a cell, and the others, in any order, a place within it."""
    size = 1 << window
    quantiles = np.sort(np.random.default_rng(0).standard_normal(400 * size))[200::400]
    all_windows = np.arange(size)
    fine = np.random.default_rng(1).permutation(size >> bits)[all_windows >> bits]
    return mx.array(
        quantiles[(all_windows % (1 << bits)) * (size >> bits) + fine].astype(np.float32)
    )


def distortion(bits: int, window: int = 8, is_ring: bool = False) -> float:
    """The mean squared error of unit Gaussian values that the table was not trained on."""
    x = mx.random.normal((512, 128), key=mx.random.key(10_000))
    windows = best_windows(x, [bits] * 128, mx.ones(128), window, is_ring)
    levels = mx.stack([mx.take(table(window, bits), each) for each in windows], axis=1)
    return mx.square(levels - x).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--windows", type=int, nargs="+", choices=WINDOWS, default=WINDOWS)
    for window in parser.parse_args().windows:
        for bits in BITS:
            train(window, bits)
            levels = " ".join(f"{level:.5f}" for level in table(window, bits).tolist())
            new = {"squared error": round(distortion(bits, window), 5), "levels": levels}
            write_json(_FILE, _saved() | {f"{window}, {bits}": new})


if __name__ == "__main__":
    main()
