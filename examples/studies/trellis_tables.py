"""The tables of trellis codes, and the search for the best windows of a code stream.

    python examples/studies/trellis_tables.py --windows 8

trains tables for Gaussian values of unit variance, a minute each with windows of 8 bits, and writes
them with their squared error: those of 8 bits to the package, others beside this file. In turns,
the best windows of many vectors are found and the mean of the values that have each window.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_turboquant.codec import trellis
from mlx_turboquant.codec.codebook import MAX_DIM, lloyd_max_levels
from mlx_turboquant.codec.trellis import checksum, follow, search
from mlx_turboquant.files import write_json

WINDOWS, BITS = (6, 8, 10), (1, 2, 3, 4)
_FILE = Path(__file__).with_suffix(".json")
_OURS = Path(trellis.__file__).with_name("trellis_tables.json")
_ROUNDS, _TRAINED = 240, (1024, 128)


def best_windows(
    x: mx.array, bits: Sequence[int], weights: mx.array, window: int, is_ring: bool = False
) -> list[mx.array]:
    """The windows of x (n, d), one array (n,) for each coordinate, with the least squared error.

    ``bits`` are those of each coordinate, and ``weights`` (n, d) or (d,) the weights of its error.
    In a ring the last bits stand before the first ones. The stream then starts as it does in the
    best path of a doubled vector, which is nearly always the best ring.
    """
    weights, tables = mx.broadcast_to(weights, x.shape), [table(window, own) for own in bits]
    start = mx.zeros((len(x), 1), mx.uint32)
    if is_ring:
        twice = [mx.concatenate([each, each], axis=1) for each in (x, weights)]
        costs = search(twice[0], [*bits, *bits], twice[1], [*tables, *tables], start)
        start = follow(costs, [*bits, *bits], costs[-1].argmin(axis=1))[:, len(bits) - 1, None]
    costs = search(x, bits, weights, tables, start)
    last = start[:, 0] if is_ring else costs[-1].argmin(axis=1)
    return list(mx.unstack(follow(costs, bits, last), axis=1))


_tables: dict[tuple[int, int], mx.array] = {}


def table(window: int, bits: int) -> mx.array:
    """The levels of all windows: float32 (2^window,)."""
    if (window, bits) not in _tables:
        if window == trellis.WINDOW:
            return trellis.table(bits)
        levels = map(float, _saved()[f"{window}, {bits}"]["levels"].split())
        _tables[window, bits] = mx.array([*levels], mx.float32)
    return _tables[window, bits]


def _saved() -> dict[str, Any]:
    return json.loads(_FILE.read_text()) if _FILE.exists() else {}


def save(window: int, bits: int) -> None:
    """Write a table that was trained to its file."""
    levels = " ".join(f"{level:.5f}" for level in table(window, bits).tolist())
    error = round(distortion(bits, window), 5 if bits < 5 else 6)
    if window == trellis.WINDOW:
        new = {"squared_error": error, "sha256": checksum(bits, error, levels), "levels": levels}
        write_json(_OURS, json.loads(_OURS.read_text()) | {str(bits): new})
    else:
        new = {"squared error": error, "levels": levels}
        write_json(_FILE, _saved() | {f"{window}, {bits}": new})


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
    """Levels in order: the new bits choose a cell, and the others a place within it."""
    size = 1 << window
    all_windows = np.arange(size)
    if bits > 5:
        levels, fine = lloyd_max_levels(MAX_DIM, window), all_windows >> bits
    else:
        levels = np.sort(np.random.default_rng(0).standard_normal(400 * size))[200::400]
        fine = np.random.default_rng(1).permutation(size >> bits)[all_windows >> bits]
    return mx.array(levels[(all_windows % (1 << bits)) * (size >> bits) + fine].astype(np.float32))


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
        for bits in range(1, 8) if window == trellis.WINDOW else BITS:
            train(window, bits)
            save(window, bits)


if __name__ == "__main__":
    main()
