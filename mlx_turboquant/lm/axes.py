"""Bases for the keys of a model, learned from calibration texts."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..codec.basis import Basis, learned_basis
from ..codec.packing import RUN
from ..codec.quantizer import TurboQuantizer
from .compressible import Compressible
from .hook import observed_attention

_SINKS = 4
# Places of a text that a basis has to suit: half of them evenly spread, half in their logarithms.
_LONGEST, _PLACES = 32768, 64
# A basis is kept if it has the smaller error at all of these places, with these bits, on every
# sixteenth token.
_JUDGED, _JUDGED_BITS, _JUDGED_STEP = (0, 2048, 32768), 3, 16
# Queries of every fourth token are looked at.
_STEP = 4

_log = logging.getLogger("mlx_turboquant")

Rope = Callable[..., mx.array]


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
            return sum(a.T @ moment @ a for a in turns) / len(turns)

        left = mean(self.means, turns - np.eye(turns.shape[-1]))
        return Moments(mean(self.keys, turns) + left, self.means, mean(self.queries, turns))


class Watch(NamedTuple):
    """What a model shows while it reads texts.

    ``queries`` are a sample of those of each cache, by its ``id``. ``ropes`` are the rotary
    embeddings of all layers, each with its last two results.
    """

    queries: dict[int, list[mx.array]]
    ropes: list[tuple[Rope, deque[mx.array]]]


@contextmanager
def watched(model: nn.Module) -> Iterator[Watch]:
    """Watch a model, whose rotary embeddings are replaced meanwhile."""
    watch = Watch({}, [])
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.items()
        if isinstance(child, nn.Module) and "rope" in type(child).__name__.lower()
    ]

    def observe(queries: mx.array, keys: Any, cache: Any = None, *_: Any, **others: Any) -> None:
        sample = mx.contiguous(queries[:, :, ::_STEP])
        watch.queries.setdefault(id(cache), []).append(sample)

    try:
        for module, name, rope in found:
            watch.ropes.append((rope, deque(maxlen=2)))
            # As an item it keeps its place, and so the order of the weights.
            module[name] = _Noting(*watch.ropes[-1])
        with observed_attention(model, observe):
            yield watch
    finally:
        for module, name, rope in found:
            module[name] = rope


class _Noting:
    """Stands for a rotary embedding, and notes its results."""

    def __init__(self, rope: Rope, results: "deque[mx.array]"):
        self.rope, self.results = rope, results

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rope, name)

    def __call__(self, *arguments: Any, **keywords: Any) -> mx.array:
        result = self.rope(*arguments, **keywords)
        self.results.append(result)
        return result


def learned_bases(
    tokens: mx.array, places: Sequence[Compressible], caches: list[Any], watch: Watch
) -> tuple[Basis | None, ...]:
    """The bases of the keys of all layers, from tokens (texts, n) in plain ``caches``.

    A layer keeps a random rotation if that has the smaller error, if no rotary embedding of mlx-lm
    makes its keys, or if its attention is latent. The tuple is empty if no layer has a basis. A
    warning says that the tokens are too few.
    """
    known = len(set(tokens.flatten().tolist()))
    least = max((place.keys.dim for place in places if place.values), default=0)
    if known < least:  # many directions of keys are unseen
        _log.warning(
            "Keys stay in random axes: the texts begin with %d different tokens and need %d: "
            "give longer texts.",
            known,
            least,
        )
        return ()
    found = (of_layer(place, place.of(caches), watch) for place in places)
    bases = tuple(each and suitable_basis(*each) for each in found)
    return bases if any(bases) else ()


def of_layer(
    place: Compressible, cache: Any, watch: Watch
) -> tuple[mx.array, mx.array, Rope] | None:
    """The keys (texts, H, n, dim) of a layer, its queries (texts, H, m, dim) and what turns both.

    None if the layer can have no basis.
    """
    if place.values is None or place.keys.dim % RUN or id(cache) not in watch.queries:
        return None
    keys = cache.keys[:, :, : cache.offset]
    rope = next((rope for rope, made in watch.ropes if any(_ends(keys, x) for x in made)), None)
    if rope is None:
        return None
    try:
        turns(rope, place.keys.dim, [1])
    except Exception:  # an unusual embedding may raise anything
        return None
    queries = mx.concatenate(watch.queries[id(cache)], axis=2).astype(mx.float32)
    queries = queries.reshape(len(keys), keys.shape[1], -1, queries.shape[3])
    return keys[:, :, _SINKS:].astype(mx.float32), queries, rope


def _ends(keys: mx.array, x: mx.array) -> bool:
    """Whether x are the last of the keys."""
    last = keys[:, :, -x.shape[2] :]
    return x.shape == last.shape and mx.array_equal(x, last).item()


def turns(rope: Rope, dim: int, offsets: Any) -> np.ndarray:
    """Matrices (n, dim, dim) by which a rotary embedding moves vectors x, as x @ A, to places."""
    axes = mx.eye(dim)[:, None, None]
    start, *others = (
        np.array(rope(axes, offset=int(offset))[:, 0, 0], np.float64) for offset in (0, *offsets)
    )
    return np.linalg.inv(start) @ np.stack(others)


def all_places() -> np.ndarray:
    """The places of a text that a basis has to suit."""
    half = _PLACES // 2
    return np.append(np.linspace(0, _LONGEST, half), np.geomspace(1, _LONGEST, half))


def moments(keys: mx.array, queries: mx.array) -> Moments:
    """The moments of keys (texts, H, n, dim) and of queries (texts, H, m, dim)."""
    keys, queries = np.array(keys, np.float64), np.array(queries, np.float64)
    mean = keys.mean(axis=2, keepdims=True)
    parts = (keys - mean, mean, queries)
    return Moments(*((x.swapaxes(2, 3) @ x / x.shape[2]).mean(axis=0) for x in parts))


def suitable_basis(keys: mx.array, queries: mx.array, rope: Rope) -> Basis | None:
    """The basis of keys (texts, H, n, dim) that suits all places, or None.

    It is None if a random rotation has the smaller error or a number is not finite. The error is
    that of the scores at which queries (texts, H, m, dim) see keys, in squares.
    """
    dim = keys.shape[3]
    if not all(mx.isfinite(x).all().item() for x in (keys, queries)):
        return None
    found = moments(keys, queries).turned(turns(rope, dim, all_places()))
    basis = learned_basis(found.keys, found.queries)
    quantizers = [TurboQuantizer(dim, _JUDGED_BITS, basis=each) for each in (basis, None)]
    mean = keys.mean(axis=2, keepdims=True)
    for turn in mx.array(turns(rope, dim, _JUDGED).astype(np.float32)):
        losses, queries_here = [], queries @ turn
        sample = keys[:, :, ::_JUDGED_STEP] @ turn - mean
        for quantizer in quantizers:
            error = quantizer.dequantize(quantizer.quantize(sample)) - sample
            losses.append(mx.square(queries_here @ error.swapaxes(-1, -2)).sum().item())
        if not losses[0] < losses[1]:
            return None
    return basis
