"""Axes for the keys of a model, learned from calibration texts."""

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..codec.basis import Basis, learned_basis
from ..codec.packing import RUN
from .compressible import Compressible, plain_caches
from .hook import observed_attention

_SINKS = 4
_TOKENS = 1024
# Places of a text at which axes have to suit: half of them evenly spread, half in their logarithms.
_LONGEST, _PLACES = 32768, 64


class Moments(NamedTuple):
    """Moments for each key head of a layer, float64 (H, dim, dim), over texts.

    They are the covariances of keys within a text, and the second moments of the means of keys and
    of queries.
    """

    keys: np.ndarray
    means: np.ndarray
    queries: np.ndarray

    def turned(self, turns: np.ndarray) -> "Moments":
        """The mean moments where x becomes x @ A, for each A of turns (n, dim, dim).

        A cache removes the mean of the first tokens, so means that turn away from it remain.
        """

        def mean(moment: np.ndarray, turns: np.ndarray) -> np.ndarray:
            return np.mean([a.T @ moment @ a for a in turns], axis=0)

        left = mean(self.means, turns - np.eye(turns.shape[-1]))
        return Moments(mean(self.keys, turns) + left, self.means, mean(self.queries, turns))


def moments(
    model: nn.Module, places: list[Compressible], texts: list[list[int]]
) -> list[tuple[Compressible, Moments | None]]:
    """The moments of the keys of each compressed layer; None for latent attention."""
    sums: list[Any] = [[0, 0, 0] for _ in places]
    for text in texts:
        caches, found = plain_caches(model), {}

        def observe(queries, keys, cache=None, scale=1.0, *_, found=found, **others):
            found[id(cache)] = queries, keys

        with observed_attention(model, observe):
            model(mx.array([text[:_TOKENS]]), cache=caches)
        for i, place in enumerate(places):
            if place.values is None or place.keys.dim % RUN:
                continue
            queries, keys = found[id(place.of(caches))]
            keys = np.array(keys[0, :, _SINKS:].astype(mx.float32), np.float64)
            queries = np.array(queries[0].astype(mx.float32), np.float64)
            queries = queries.reshape(len(keys), -1, queries.shape[-1])
            mean = keys.mean(axis=1, keepdims=True)
            new = [x.swapaxes(1, 2) @ x / x.shape[1] for x in (keys - mean, mean, queries)]
            sums[i] = [old + added / len(texts) for old, added in zip(sums[i], new)]
    return [
        (place, None if isinstance(sums[i][0], int) else Moments(*sums[i]))
        for i, place in enumerate(places)
    ]


def learned_axes(model: nn.Module, place: Compressible, found: Moments | None) -> Basis | None:
    """The basis of the keys of a layer that suits all places of a text, or None."""
    if found is None:
        return None
    rope = next(
        (
            module
            for name, module in model.layers[place.layer].named_modules()
            if name.endswith("rope")
        ),
        None,
    )
    if rope is not None:
        half = _PLACES // 2
        offsets = np.append(np.linspace(0, _LONGEST, half), np.geomspace(1, _LONGEST, half))
        found = found.turned(_turns(rope, place.keys.dim, offsets))
    return learned_basis(found.keys, found.queries)


def _turns(rope: Any, dim: int, offsets: np.ndarray) -> np.ndarray:
    """Matrices (n, dim, dim) by which a rotary embedding moves vectors x, as x @ A, to places."""
    axes = mx.eye(dim)[:, None, None]
    start, *others = (
        np.array(rope(axes, offset=int(offset))[:, 0, 0], np.float64) for offset in (0, *offsets)
    )
    return np.linalg.inv(start) @ np.stack(others)
