"""Reused one-token steps give the same results as new ones, whatever comes in between."""

import copy

import mlx.core as mx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_reading import assert_same
from tokens import keys_and_values

from mlx_turboquant import TurboQuantKVCache
from mlx_turboquant.cache.fetched import KVArray, Link
from mlx_turboquant.cache.latent import TurboQuantLatentCache
from mlx_turboquant.kernels.quantize import dense

HEADS, DIM = 1, 16


class Twins:
    """Two caches of the same tokens: one may reuse its steps, the other never does."""

    def __init__(self, kind: str, batched: bool):
        cache_class = TurboQuantLatentCache if kind == "latent" else TurboQuantKVCache
        limit = 150 if kind == "limited" else None
        self.twins = [cache_class(4, 4, window=4, sink_tokens=2, max_size=limit) for _ in range(2)]
        self.seed = 0
        if batched:
            self.twins = [cache.merge([cache]) for cache in self.twins]
            self.extend(60)
        self.links = [Link(is_hooked=True, needs_arrays=False) for _ in self.twins]
        for cache, link in zip(self.twins, self.links):
            cache.link = link
        self.append(70)

    @property
    def sequences(self) -> int:
        return len(getattr(self.twins[0], "lengths", [0]))

    def append(self, count: int) -> None:
        self.seed += 1
        new = keys_and_values(count, self.seed, rows=self.sequences, heads=HEADS, dim=DIM)
        seen = []
        for cache, forgets in zip(self.twins, (False, True)):
            if forgets:
                cache._step = None
            first, last = cache.update_and_fetch(*new)
            is_array = isinstance(first, KVArray)
            seen.append([*([first] if is_array else dense(first.tokens)), first.tokens.spans])
            if isinstance(last, mx.array):
                seen[-1].append(mx.array(last))
        seen = [[mx.array(x) if isinstance(x, mx.array) else x for x in each] for each in seen]
        assert_same(*seen, "seen")

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.append(1)

    def padded(self, lengths: list[int], chunk: int) -> None:
        """A prompt; in a batch its sequences have different lengths."""
        lengths = (lengths * 5)[: self.sequences]
        longest, is_batch = max(lengths), hasattr(self.twins[0], "prepare")
        for cache in self.twins if is_batch else ():
            cache.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
        for start in range(0, longest, chunk):
            self.append(min(chunk, longest - start))
        for cache in self.twins if is_batch else ():
            cache.finalize()

    def trim(self, count: int) -> None:
        for cache in self.twins:
            cache.trim(count)

    def replace_keys(self) -> None:
        for cache in self.twins:
            cache.keys = cache.keys * 2

    def copy(self) -> None:
        self.twins = [copy.deepcopy(cache) for cache in self.twins]

    def hook(self, is_hooked: bool) -> None:
        for link in self.links:
            link.is_hooked = is_hooked

    def unlink(self) -> None:
        for cache in self.twins:
            cache.link = Link()

    def restore(self) -> None:
        """Restore the cache from its state, in place."""
        for cache in self.twins:
            if hasattr(cache, "from_state"):
                cache.state = cache.state
                cache.link = cache.link if cache.link.is_hooked else self.links[0]

    def filter(self) -> None:
        if self.sequences > 1:
            for cache in self.twins:
                cache.filter([1])

    def extend(self, count: int) -> None:
        if self.sequences == 4 or not hasattr(self.twins[0], "extend"):
            return
        self.seed += 1
        new = keys_and_values(count, self.seed, heads=HEADS, dim=DIM)
        for cache in self.twins:
            joining = cache.extract(0)
            joining.trim(joining.offset)
            joining.update_and_fetch(*new)
            cache.extend(joining.merge([joining]))


counts = st.integers(1, 40)
changes = st.one_of(
    st.tuples(st.just("steps"), counts),
    st.tuples(st.just("append"), counts),
    st.tuples(st.just("padded"), st.lists(counts, min_size=2, max_size=4), st.sampled_from([1, 7])),
    st.tuples(st.just("trim"), counts),
    st.tuples(st.just("hook"), st.booleans()),
    st.tuples(st.just("extend"), counts),
    *(st.tuples(st.just(name)) for name in ("replace_keys", "copy", "unlink", "restore", "filter")),
)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", ["plain", "limited", "latent"])
@given(st.lists(changes, max_size=5))
@example([("padded", [5, 3], 1)])
@example([("hook", False)])
@example([("unlink",)])
def test_reused_steps_are_those_that_were_made_anew(kind, batched, changes):
    twins = Twins(kind, batched)
    twins.steps(3)
    for name, *arguments in changes:
        getattr(twins, name)(*arguments)
        twins.steps(3)
    for cache in twins.twins:
        cache._step = None
        cache.link = twins.links[0]
    assert_same(*twins.twins, "cache")


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_the_padding_of_a_prompt_is_not_kept_however_few_tokens_a_step_reads(chunk):
    caches = [TurboQuantKVCache(window=16) for _ in range(2)]
    for cache in caches:
        cache.update_and_fetch(*keys_and_values(100))
    batch = TurboQuantKVCache.merge(caches)
    batch.link = Link(is_hooked=True, needs_arrays=False)
    batch.prepare(lengths=[5, 3], right_padding=[0, 2])
    for start in range(0, 5, chunk):
        count = min(chunk, 5 - start)
        batch.update_and_fetch(*keys_and_values(count, rows=2))
    batch.finalize()
    assert batch.offset.tolist() == batch.lengths == [105, 103]
