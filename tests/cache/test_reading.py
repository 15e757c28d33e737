"""Reading a cache does not change it: each is compared with a deep copy."""

import copy
import inspect
from typing import Any

import mlx.core as mx
import pytest
from tokens import keys_and_values

from mlx_turboquant import TurboQuantKVCache
from mlx_turboquant.cache.fetched import Link
from mlx_turboquant.cache.latent import TurboQuantLatentCache
from mlx_turboquant.codec.quantizer import TurboQuantizer

READS_TOKENS = Link(is_hooked=True, needs_arrays=False)
READS = {
    "size": lambda cache: cache.size(),
    "empty": lambda cache: cache.empty(),
    "is_trimmable": lambda cache: cache.is_trimmable(),
    "a mask of a step": lambda cache: cache.make_mask(1),
    "a mask of a chunk": lambda cache: cache.make_mask(20, return_array=True),
    "a mask of drafts": lambda cache: cache.make_mask(5, return_array=True),
    "a mask of a sliding window": lambda cache: cache.make_mask(3, window_size=4),
    "a copy": copy.deepcopy,
    "a representation": repr,
    "the values of its state": lambda cache: mx.eval([cache.state]),
    "a batch of it": lambda cache: cache.merge([cache]) if hasattr(cache, "merge") else None,
    "a sequence of it": lambda cache: cache.extract(0) if hasattr(cache, "extract") else None,
}


def assert_same(one: Any, other: Any, where: str) -> None:
    assert type(one) is type(other), where
    if isinstance(one, mx.array):
        assert one.dtype == other.dtype and mx.array_equal(one, other), where
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(one, (Link, TurboQuantizer)):
        assert one is other, where
    elif type(one).__module__.startswith("mlx_turboquant"):
        names = getattr(one, "__slots__", None) or vars(one)
        assert hasattr(one, "__slots__") or vars(one).keys() == vars(other).keys(), where
        for name in names:
            assert_same(getattr(one, name), getattr(other, name), f"{where}.{name}")
    else:
        assert one == other, where


def read_everything(cache: Any) -> None:
    before = copy.deepcopy(cache)
    reads = dict(READS)
    for name, member in inspect.getmembers(type(cache)):
        if isinstance(member, property):
            reads[name] = lambda cache, name=name: getattr(cache, name)
    for name, read in reads.items():
        read(cache)
        assert_same(cache, before, f"after {name}: cache")


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("reads_tokens", [False, True])
@pytest.mark.parametrize("kind", ["plain", "limited", "latent"])
def test_nothing_that_only_reads_changes_a_cache(kind, reads_tokens, batched):
    """Empty, all exact, after a chunk, in a run of steps, after a trim."""
    cache_class = TurboQuantLatentCache if kind == "latent" else TurboQuantKVCache
    limit = 236 if kind == "limited" else None
    cache = cache_class(window=16, sink_tokens=2, max_size=limit)
    if reads_tokens:
        cache.link = READS_TOKENS
    if batched:
        cache = cache.merge([cache, copy.deepcopy(cache)])
    read_everything(cache)
    for seed, count in enumerate([5, 40, 100, 1, 1, 1, 4, 200, 1, 1]):
        new = keys_and_values(count, seed, rows=2 if batched else 1, heads=1, dim=32)
        fetched = cache.update_and_fetch(*new)
        read_everything(cache)
        del fetched
    assert cache.packed_tokens > 0
    cache.trim(3)
    read_everything(cache)
