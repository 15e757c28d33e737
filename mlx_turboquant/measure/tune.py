"""Measure which settings of the attention kernel are fastest on this machine."""

import math
import time
from collections.abc import Callable, Iterator
from functools import cache
from statistics import median
from typing import NamedTuple

import mlx.core as mx

from ..kernels.attention import Configuration, DecodeAttention
from ..kernels.runtime import backend
from ..kernels.storage import PackedKV, layouts_of, shared_quantizer
from ..kernels.tokens import VisibleTokens
from ..kernels.tuning import (
    Tuning,
    Tunings,
    default_tunings,
    heads_key,
    save_tunings,
    tuning_for,
    tunings,
)
from ..lm.heads import Heads

# Packed tokens of a sequence: a short chat, a document, a repository.
LENGTHS = (2048, 16384, 65536)
_BITS = 4
_EXACT_TOKENS = 160
_ROUNDS = 5
_ROUND_SECONDS = 0.01
# A smaller gain may be noise.
_LEAST_GAIN = 0.02

Attend = Callable[[mx.array], mx.array]


class Measured(NamedTuple):
    """Seconds per call over ``tokens`` packed tokens: MLX's attention, the table's, the best."""

    tokens: int
    exact: float
    table: float
    best: float
    tuning: Tuning
    is_table: bool


def ratios(heads: Heads, length: int) -> list[float | None]:
    """Return the times over ``length`` packed tokens, relative to MLX's attention in bfloat16.

    They are those of the settings in use, with levels that are computed and with a table of pairs.
    None means that the kernel does not run.
    """
    setup = _Setup(heads, length)
    used = tuning_for(
        tunings(backend(), heads.dim, heads.value_dim, heads.group), length * heads.key_heads
    )
    both = [used._replace(pair_table=pair_table) for pair_table in (0, 1)]
    arms = {each: setup.attention(_kernel(heads, ((0, each),))) for each in both}
    seconds = _seconds({"exact": setup.exact, **arms}, setup.queries)
    return [seconds[each] / seconds["exact"] if each in seconds else None for each in both]


def tune(heads: Heads) -> Iterator[Measured]:
    """Measure sensible tunings for these heads at each of ``LENGTHS``, and save the best.

    First one number changes at a time. Then those that gained change together, and last the number
    of threadgroups. OSError if the result cannot be saved.
    """
    kernel_of = cache(lambda tuning: _kernel(heads, ((0, tuning),)))
    found: list[tuple[int, Tuning]] = []
    before = 0
    for length in LENGTHS:
        measured = _tune_length(heads, length, kernel_of)
        packed_tokens = length * heads.key_heads
        if not found or measured.tuning != found[-1][1]:
            # From the geometric mean of this length and the one before.
            found.append((math.isqrt(before * packed_tokens), measured.tuning))
        before = packed_tokens
        yield measured
    save_tunings({heads_key(heads.dim, heads.value_dim, heads.group): tuple(found)})


def _tune_length(
    heads: Heads, length: int, kernel_of: Callable[[Tuning], DecodeAttention | None]
) -> Measured:
    setup = _Setup(heads, length)
    table = tuning_for(default_tunings(backend(), heads.group), length * heads.key_heads)
    changed = _changed(table, heads.group)
    seconds = _seconds({each: setup.attention(kernel_of(each)) for each in changed}, setup.queries)
    gains = {
        name: value
        for tuning, each in seconds.items()
        for name, value in tuning._asdict().items()
        if value != getattr(table, name) and each < (1 - _LEAST_GAIN) * seconds[table]
    }
    together = table._replace(**gains)
    fastest = min((table, together, *seconds), key=lambda each: seconds.get(each, math.inf))
    last = {table, together, fastest}
    last |= {fastest._replace(threadgroups=fastest.threadgroups * n // 2) for n in (1, 4, 8)}
    arms = {each: setup.attention(kernel_of(each)) for each in last}
    seconds = _seconds({"exact": setup.exact, **arms}, setup.queries)
    mlx = seconds.pop("exact")
    fastest = min(seconds, key=seconds.get)
    if seconds[fastest] > (1 - _LEAST_GAIN) * seconds[table]:
        fastest = table
    return Measured(length, mlx, seconds[table], seconds[fastest], fastest, fastest == table)


class _Setup:
    """The queries of one token, and random tokens, dense and packed."""

    def __init__(self, heads: Heads, length: int):
        dims = (heads.dim, heads.value_dim)
        self.queries = _random(heads.key_heads * heads.group, 1, heads.dim)
        self._scale = heads.dim**-0.5
        # Without the exact tokens: for most numbers of tokens MLX is slow on CUDA.
        self._dense = [_random(heads.key_heads, length, dim) for dim in dims]
        exact = [_random(heads.key_heads, _EXACT_TOKENS, dim) for dim in dims]
        if heads.is_latent:
            exact[1] = exact[0]
        packed = PackedKV(layouts_of(_BITS, None if heads.is_latent else _BITS), seed=0)
        packed.append(self._dense[: len(packed.layouts)])
        self._tokens = VisibleTokens(
            keys=packed.sides[0],
            values=packed.sides[-1],
            packed_count=length,
            exact_keys=exact[0],
            exact_values=exact[1],
            exact_count=_EXACT_TOKENS,
            sink_count=4,
            recent_start=4,
        )
        mx.eval(self.queries, self._dense, exact, packed.arrays)

    def exact(self, queries: mx.array) -> mx.array:
        """Compute MLX's own attention over dense keys and values."""
        return mx.fast.scaled_dot_product_attention(queries, *self._dense, scale=self._scale)

    def attention(self, kernel: DecodeAttention | None) -> Attend | None:
        """Return the attention of ``kernel`` over packed tokens, or None without one."""
        if kernel is None:
            return None
        return lambda queries: kernel(queries, self._tokens, self._scale, None, None)


def _changed(table: Tuning, group: int) -> list[Tuning]:
    """Return the tuning of the table, and those that differ from it in one number."""
    others = {
        "rows": [rows for rows in (4, 8, 16) if rows < 2 * group],
        "accumulators": (32, 64),
        "tokens": (1, 2),
        "batch": (2, 4, 8),
        "simds": (2, 4, 8),
        "pair_table": (0, 1),
    }
    changed = [table._replace(**{name: value}) for name in others for value in others[name]]
    return list(dict.fromkeys([table, *changed]))


def _kernel(heads: Heads, chosen: Tunings) -> DecodeAttention | None:
    """Return the kernel with these tunings; None if its check fails here."""
    quantizers = [shared_quantizer(dim, _BITS, 0) for dim in (heads.dim, heads.value_dim)]
    configuration = Configuration(
        *quantizers, *[mx.bfloat16] * 3, heads.group, 1, is_latent=heads.is_latent
    )
    try:
        kernel = DecodeAttention(configuration, chosen)
        return kernel if kernel.check().holds else None
    except (RuntimeError, ValueError):
        return None


def _seconds(
    arms: dict[Tuning | str, Attend | None], queries: mx.array
) -> dict[Tuning | str, float]:
    """Return the median seconds per call of each arm that runs, all measured in turns."""
    runs = {name: attend for name, attend in arms.items() if attend is not None}
    repeats, taken = {}, {name: [] for name in runs}
    for name, attend in runs.items():
        _chain(attend, queries, 2)
        repeats[name] = max(4, int(_ROUND_SECONDS / _chain(attend, queries, 4)))
    for _ in range(_ROUNDS):
        for name, attend in runs.items():
            taken[name].append(_chain(attend, queries, repeats[name]))
    return {name: median(each) for name, each in taken.items()}


def _chain(attend: Attend, queries: mx.array, count: int) -> float:
    """Return seconds per call of ``count`` calls that depend on each other, as layers do."""
    begin = time.perf_counter()
    for _ in range(count):
        output = attend(queries)
        [queries] = mx.depends([queries], [output])
    mx.eval(output)
    return (time.perf_counter() - begin) / count


def _random(heads: int, count: int, dim: int) -> mx.array:
    """Return random vectors of one sequence: bfloat16 (1, heads, count, dim)."""
    return mx.random.normal((1, heads, count, dim)).astype(mx.bfloat16)
