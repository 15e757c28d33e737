"""Speed and memory of generation with different caches, in mlx-lm's way."""

import gc
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..lm.report import cache_size
from .cache_specs import CacheSpec, Progress, ignore

# Tokens that are decoded before the clock starts.
_WARM_UP_TOKENS = 8
LEAST_NEW_TOKENS = _WARM_UP_TOKENS + 1


class Measurement(NamedTuple):
    """One generation after a prompt. Times are in seconds, memory in bytes of MLX's allocator.

    ``prefill`` covers all tokens of the prompt but the last; ``first_token`` is the time to first
    token. ``decode`` is the time of one step of all sequences; ``graph`` is the median time in
    which Python builds its graph. Active memory is held between the steps, peak memory is the
    maximum within them. Both exclude what was held before, such as the weights. ``cache_nbytes``
    and ``unpacked``, that of :class:`.report.CacheSize`, are taken after the last token.
    """

    prefill: float
    first_token: float
    decode: float
    graph: float
    cache_nbytes: int
    prefill_active: int
    prefill_peak: int
    decode_active: int
    decode_peak: int
    unpacked: int = 0


def measure(
    model: nn.Module,
    spec: CacheSpec,
    prompts: mx.array,
    new_tokens: int,
    progress: Progress = ignore,
) -> Measurement:
    """Prefill ``prompts`` (B, n) in chunks as mlx-lm does, and decode ``new_tokens`` greedily.

    ``new_tokens`` is at least ``LEAST_NEW_TOKENS``. ``progress`` is called with the number of
    tokens of one sequence, after each chunk and at the end.
    """
    # Earlier garbage that is freed during the run would make the memory held look smaller.
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    begin = time.perf_counter()
    cache = spec.make_cache(model)
    spec.read(model, cache, prompts[:, :-1], progress)
    prefill = time.perf_counter() - begin
    steps = _decode(model, spec, cache, prompts[:, -1:])
    next(steps)
    first_token = time.perf_counter() - begin
    mx.synchronize()  # ends the next step, which holds dense tokens while it is computed
    prefill_active, prefill_peak = mx.get_active_memory() - before, mx.get_peak_memory() - before
    mx.reset_peak_memory()
    for _ in range(_WARM_UP_TOKENS):
        next(steps)
    begin = time.perf_counter()
    graphs = list(islice(steps, new_tokens - _WARM_UP_TOKENS))
    decode = (time.perf_counter() - begin) / len(graphs)
    mx.synchronize()
    progress(new_tokens + 1)
    return Measurement(
        prefill,
        first_token,
        decode,
        graph=float(np.median(graphs)),
        cache_nbytes=sum(layer.nbytes for layer in cache),
        prefill_active=prefill_active,
        prefill_peak=prefill_peak,
        decode_active=mx.get_active_memory() - before,
        decode_peak=mx.get_peak_memory() - before,
        unpacked=cache_size(cache).unpacked,
    )


def _decode(
    model: nn.Module, spec: CacheSpec, cache: list[Any], tokens: mx.array
) -> Iterator[float]:
    """Decode greedily, one step ahead of the known tokens, as mlx-lm's ``generate_step`` does.

    Yields the seconds of building the next graph when the next token of each sequence is known.
    """
    known = None
    while True:
        begin = time.perf_counter()
        following = model(tokens, cache=cache)[:, -1].argmax(axis=-1, keepdims=True)
        spec.after_chunk(cache)
        seconds = time.perf_counter() - begin
        mx.async_eval(following)
        if known is not None:
            mx.eval(known)
            yield seconds
        known = tokens = following


def median(measurements: list[Measurement]) -> Measurement:
    """The median of each field."""
    return Measurement(*(type(x[0])(np.median(x)) for x in zip(*measurements)))
