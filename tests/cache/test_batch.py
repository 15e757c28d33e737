"""The batch form of the cache: sequences that join, grow, are trimmed and leave."""

import importlib

import mlx.core as mx
import pytest
from conftest import peak_of_growth
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from mlx_lm import batch_generate
from tokens import basis_of, keys_and_values

from mlx_turboquant import TurboQuantKVCache, enable, make_prompt_cache
from mlx_turboquant.cache.fetched import Link
from mlx_turboquant.cache.latent import TurboQuantLatentCache
from mlx_turboquant.codec.basis import Basis
from mlx_turboquant.kernels.attention import decode_attention
from mlx_turboquant.kernels.quantize import dense
from mlx_turboquant.kernels.tokens import CAPACITY_UNIT

# The package mlx_lm hides the module behind the function of the same name.
generate = importlib.import_module("mlx_lm.generate")

HEADS, DIM, WINDOW, SINKS = 2, 32, 12, 3


def new_cache(**changes) -> TurboQuantKVCache:
    arguments = {"key_bits": 8, "value_bits": 8, "window": WINDOW, "sink_tokens": SINKS}
    return TurboQuantKVCache(**{**arguments, **changes})


def random_tokens(rows: int, count: int, seed: int) -> tuple[mx.array, mx.array]:
    """Keys and values."""
    return keys_and_values(count, seed, rows=rows, heads=HEADS, dim=DIM)


class Batches(RuleBasedStateMachine):
    """Random calls, compared with a list of the tokens that each sequence should have."""

    def __init__(self):
        super().__init__()
        self.batch = TurboQuantKVCache.merge([new_cache()])
        self.expected = [random_tokens(1, 0, 0)]
        self.seed = 0

    def tokens(self, rows: int, count: int) -> tuple[mx.array, mx.array]:
        self.seed += 1
        return random_tokens(rows, count, self.seed)

    def note(self, new: tuple[mx.array, mx.array], counts: list[int]) -> None:
        self.expected = [
            tuple(
                mx.concatenate([old, x[row : row + 1, :, :count]], axis=2)
                for old, x in zip(tokens, new)
            )
            for row, (tokens, count) in enumerate(zip(self.expected, counts))
        ]

    @rule(count=st.integers(1, 60))
    def append(self, count):
        new = self.tokens(len(self.expected), count)
        mask = self.batch.make_mask(count)
        keys, values = self.batch.update_and_fetch(*new)
        self.note(new, [count] * len(self.expected))
        self.compare_attention(keys, values, mask, [count] * len(self.expected), count)

    @rule(data=st.data(), chunk=st.integers(1, 50))
    def append_padded(self, data, chunk):
        sizes = st.lists(
            st.integers(0, 70), min_size=len(self.expected), max_size=len(self.expected)
        )
        lengths = data.draw(sizes.filter(any))
        longest = max(lengths)
        self.batch.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
        for start in range(0, longest, chunk):
            count = min(chunk, longest - start)
            new = self.tokens(len(lengths), count)
            real = [max(0, min(n - start, count)) for n in lengths]
            mask = self.batch.make_mask(count)
            keys, values = self.batch.update_and_fetch(*new)
            self.note(new, real)
            self.compare_attention(keys, values, mask, real, count)
        self.batch.finalize()

    def compare_attention(self, keys, values, mask, real, count):
        """Check attention that reads packed tokens and attention that needs arrays."""
        queries, _ = self.tokens(len(real), count)
        outputs = [
            mx.fast.scaled_dot_product_attention(
                queries, mx.array(keys), mx.array(values), scale=DIM**-0.5, mask=mask
            )
        ]
        if count <= 8 and keys.tokens.packed_count:
            kind = None if count == 1 else "causal"
            outputs.append(decode_attention(queries, keys.tokens, DIM**-0.5, kind))
        self.compare_outputs(queries, outputs, real)

    def compare_outputs(self, queries, outputs, real):
        for row, tokens in enumerate(self.expected):
            # Outputs for padding are ignored.
            end = tokens[0].shape[2]
            visible = mx.arange(end) <= mx.arange(end - real[row], end)[:, None]
            expected = mx.fast.scaled_dot_product_attention(
                queries[row : row + 1, :, : real[row]], *tokens, scale=DIM**-0.5, mask=visible
            )
            for output in outputs:
                # Scores and values of size 1, both with an 8-bit error of 0.5 %.
                assert mx.allclose(output[row : row + 1, :, : real[row]], expected, atol=0.05)

    @rule(count=st.integers(0, 40))
    def trim(self, count):
        assert self.batch.trim(count) == min(count, max(x[0].shape[2] for x in self.expected))
        self.expected = [
            tuple(x[:, :, : max(x.shape[2] - count, 0)] for x in tokens) for tokens in self.expected
        ]

    @precondition(lambda self: len(self.expected) > 1)
    @rule(data=st.data())
    def filter(self, data):
        rows = st.lists(st.sampled_from(range(len(self.expected))), min_size=1, unique=True)
        self.filter_rows(sorted(data.draw(rows)))

    def filter_rows(self, rows):
        self.batch.filter(rows)
        self.expected = [self.expected[row] for row in rows]

    @precondition(lambda self: len(self.expected) < 5)
    @rule(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=2))
    def extend(self, lengths):
        caches = [new_cache() for _ in lengths]
        for cache, length in zip(caches, lengths):
            new = self.tokens(1, length)
            if length:
                cache.update_and_fetch(*new)
            self.expected.append(new)
        self.batch.extend(TurboQuantKVCache.merge(caches))

    @rule(data=st.data())
    def leave_and_come_back(self, data):
        row = data.draw(st.sampled_from(range(len(self.expected))))
        if not self.batch.empty():
            others = [r for r in range(len(self.expected)) if r != row]
            alone = self.batch.extract(row).merge([self.batch.extract(row)])
            if others:
                self.batch.filter(others)
                self.batch.extend(alone)
            else:
                self.batch = alone
            self.expected = [self.expected[r] for r in (*others, row)]

    @invariant()
    def every_sequence_has_its_tokens(self):
        assert self.batch.offset.tolist() == [x[0].shape[2] for x in self.expected]
        if self.batch.empty():
            return
        for row, tokens in enumerate(self.expected):
            cache = self.batch.extract(row)
            assert cache.offset == tokens[0].shape[2]
            packed, exact = cache.packed_tokens, cache.exact_tokens
            sinks = min(exact, SINKS)
            for restored, x in zip(dense(cache._tokens()), tokens):
                assert mx.array_equal(restored[:, :, :sinks], x[:, :, :sinks])
                assert mx.array_equal(restored[:, :, sinks + packed :], x[:, :, sinks + packed :])
                assert mx.allclose(restored, x, atol=0.1)  # 8 bits: 0.5 % on average


def test_sinks_that_a_trim_has_left_stay_in_front_of_new_ones():
    batches = Batches()
    batches.extend(lengths=[47])
    batches.trim(45)  # leaves two of three sinks
    batches.append(45)
    batches.every_sequence_has_its_tokens()


TestBatches = Batches.TestCase
TestBatches.settings = settings(stateful_step_count=12, deadline=None)


def test_packed_tokens_of_a_batch_are_those_of_the_caches_alone():
    caches = [new_cache(key_bits=3, value_bits=2) for _ in range(3)]
    for row, cache in enumerate(caches):
        cache.update_and_fetch(*random_tokens(1, 50 + 40 * row, row))
    batch = TurboQuantKVCache.merge(caches)
    for row, cache in enumerate(caches):
        extracted = batch.extract(row)
        assert extracted.packed_tokens == cache.packed_tokens > 0
        for mine, theirs in zip(extracted.state, cache.state):
            same = mx.array_equal(mine, theirs) if isinstance(mine, mx.array) else mine == theirs
            assert same


READS_TOKENS = Link(is_hooked=True, needs_arrays=False)


@pytest.mark.parametrize(
    "chunks, link", [((64,), Link()), ((1,) * 33, Link()), ((1,) * 33, READS_TOKENS)]
)
def test_growing_buffers_of_all_layers_are_not_twice_in_memory(chunks, link):
    batches = [TurboQuantKVCache.merge([TurboQuantKVCache()] * 2) for _ in range(16)]
    for batch in batches:
        batch.link = link
    # A quarter and more if they were; those of few layers are an eighth.
    assert peak_of_growth(batches, 2, chunks) < 0.2


def test_a_batch_takes_the_memory_of_its_longest_sequence_times_their_number():
    """The free space of a sequence is at most 256 tokens and a step."""
    caches = [new_cache(key_bits=4, value_bits=4) for _ in range(4)]
    for cache in caches:
        cache.update_and_fetch(*random_tokens(1, 2000, 1))
    batch = TurboQuantKVCache.merge(caches)
    dense = 4 * 2 * HEADS * 2000 * DIM * 2
    assert batch.nbytes == pytest.approx(sum(cache.nbytes for cache in caches), rel=0.2)
    assert batch.nbytes < dense * 0.5
    batch.filter([2])
    assert batch.nbytes == pytest.approx(caches[2].nbytes, rel=0.2)


def test_caches_with_different_settings_are_not_batched():
    for change in (
        {"key_bits": 4},
        {"value_bits": 4},
        {"window": 1},
        {"sink_tokens": 0},
        {"seed": 1},
        {"codec": "trellis"},
        {"max_size": 500},
        {"basis": basis_of(DIM, HEADS, 2)},
    ):
        with pytest.raises(ValueError, match="different settings cannot be batched"):
            TurboQuantKVCache.merge([new_cache(), new_cache(**change)])


def test_caches_with_equal_bases_are_batched_and_those_with_different_ones_are_not():
    first, other = basis_of(DIM, HEADS, 2), basis_of(DIM, HEADS, 2, seed=1)
    equal = Basis(first.axes, first.weights)
    caches = [new_cache(key_bits=3, basis=basis) for basis in (first, equal)]
    for row, cache in enumerate(caches):
        cache.update_and_fetch(*random_tokens(1, 60 + 40 * row, row))
    batch = TurboQuantKVCache.merge(caches)
    for row in (1, 0):
        extracted = batch.extract(row)
        assert extracted.settings.basis is first
        for mine, theirs in zip(extracted.state[-8:], caches[row].state[-8:]):
            assert mx.array_equal(mine, theirs)
    batch.filter([1])
    assert batch.extract(0).settings.basis is first
    names = f"Basis.{other.digest[:8]}.*Basis.{first.digest[:8]}"
    with pytest.raises(ValueError, match=rf"cannot be batched \(.*{names}.*: use the same"):
        batch.extend(TurboQuantKVCache.merge([new_cache(key_bits=3, basis=other)]))


def test_a_sequence_of_trellis_codes_comes_back_from_a_batch():
    caches = [new_cache(codec="trellis", key_bits=2, window=0) for _ in range(2)]
    for row, cache in enumerate(caches):
        cache.update_and_fetch(*random_tokens(1, 40 + 30 * row, row))
    batch = TurboQuantKVCache.merge(caches)
    batch.update_and_fetch(*random_tokens(2, 1, 2))
    for row, cache in enumerate(caches):
        cache.update_and_fetch(*(x[row : row + 1] for x in random_tokens(2, 1, 2)))
        extracted = batch.extract(row)
        assert extracted.codec == "trellis"
        for mine, theirs in zip(extracted.state[-8:-2], cache.state[-8:-2]):
            assert mx.array_equal(mine, theirs)


def test_padding_on_the_left_is_refused():
    batch = TurboQuantKVCache.merge([new_cache(), new_cache()])
    batch.prepare(left_padding=[0, 0])
    with pytest.raises(ValueError, match=r"\[0, 3\] on the left is not possible"):
        batch.prepare(left_padding=[0, 3])


LENGTHS = (5, 70, 200, 333, 1, 33, 70)


def prompts_of(lengths=LENGTHS) -> list[list[int]]:
    return [
        mx.random.randint(0, 128, (length,), key=mx.random.key(i)).tolist()
        for i, length in enumerate(lengths)
    ]


def alone(model, prompt: list[int], count: int) -> list[int]:
    cache = model.make_cache()
    steps = generate.generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache)
    return [token for token, _ in steps]


@pytest.mark.parametrize("window", [0, 16])
def test_sequences_that_join_and_leave_say_what_they_say_alone(random_model, window):
    """At 8 bits; four at a time, so that one joins when another ends."""
    model = enable(random_model, 8, window=window)
    prompts, counts = prompts_of(), (40, 20, 60, 33, 45, 1, 50)
    generator = generate.BatchGenerator(
        model, completion_batch_size=4, prefill_batch_size=3, prefill_step_size=64
    )
    said = {uid: [] for uid in generator.insert(prompts, max_tokens=list(counts))}
    unfinished = set(said)
    while unfinished:
        for response in generator.next()[1]:
            said[response.uid].append(response.token)
            if response.finish_reason is not None:
                unfinished.remove(response.uid)
    expected = [alone(model, prompt, count) for prompt, count in zip(prompts, counts)]
    assert list(said.values()) == expected


def test_batch_generate_says_what_the_single_sequences_say(tiny_lm):
    model, tokenizer = tiny_lm
    enable(model, 8, window=16)
    texts = ["The code is", "Once upon a time there was a small house. " * 6, "def f(x):"]
    prompts = [tokenizer.encode(text) for text in texts]
    response = batch_generate(model, tokenizer, prompts, max_tokens=24)
    singles = [generate.generate(model, tokenizer, prompt, max_tokens=24) for prompt in prompts]
    # mlx-lm drops the space before the first word of a single sequence.
    assert [text.lstrip() for text in response.texts] == [text.lstrip() for text in singles]


def test_at_four_bits_a_batch_differs_by_less_than_the_codec(random_model):
    prompts = prompts_of((80, 150, 110))
    caches = [make_prompt_cache(random_model, 4, window=16) for _ in prompts]
    exact = [generate.make_prompt_cache(random_model) for _ in prompts]
    for prompt, *pair in zip(prompts, caches, exact):
        for cache in pair:
            random_model(mx.array([prompt]), cache=cache)
    batch = [layers[0].merge(list(layers)) for layers in zip(*caches)]
    for step in range(40):
        tokens = mx.array([[step], [step + 1], [step + 2]])
        together = random_model(tokens, cache=batch)
        for row, (cache, plain) in enumerate(zip(caches, exact)):
            single, expected = (
                random_model(tokens[row : row + 1], cache=layers)[0] for layers in (cache, plain)
            )
            codec = mx.linalg.norm(single - expected)
            assert mx.linalg.norm(together[row] - single) < 0.1 * codec


def chunk(batches):
    batches.append(5)


def padded(batches):
    batches.batch.prepare(lengths=[0, 1], right_padding=[1, 0])
    new = batches.tokens(2, 1)
    batches.batch.update_and_fetch(*new)
    batches.batch.finalize()
    batches.note(new, [0, 1])


def replaced_keys(batches):
    batches.batch.keys = batches.batch.keys * 1


def decoded(batches, steps: int) -> None:
    """Decode token by token without arrays, as enabled models do, and compare every step."""
    for _ in range(steps):
        new = batches.tokens(len(batches.expected), 1)
        keys, _ = batches.batch.update_and_fetch(*new)
        batches.note(new, [1] * len(batches.expected))
        queries, _ = batches.tokens(len(batches.expected), 1)
        output = decode_attention(queries, keys.tokens, DIM**-0.5)
        batches.compare_outputs(queries, [output], [1] * len(batches.expected))


@pytest.mark.parametrize(
    "change",
    [
        chunk,
        padded,
        replaced_keys,
        lambda batches: batches.trim(40),
        lambda batches: batches.extend([60]),
        lambda batches: batches.filter_rows([1]),
    ],
)
def test_a_step_that_reuses_the_one_before_sees_what_happened_in_between(change):
    batches = Batches()
    batches.extend([60, 66])
    batches.filter_rows([1, 2])
    batches.batch.link = READS_TOKENS
    decoded(batches, 3)
    assert batches.batch._repeats > 3
    change(batches)
    decoded(batches, 80)  # blocks leave the windows, and the exact buffers fill up
    batches.every_sequence_has_its_tokens()


def limited_rows(lengths) -> list[TurboQuantKVCache]:
    """Limited caches after prompts: two to four blocks besides sinks and window."""
    max_size = WINDOW + SINKS + 40 + 2 * CAPACITY_UNIT
    caches = [new_cache(max_size=max_size) for _ in lengths]
    for seed, (cache, length) in enumerate(zip(caches, lengths)):
        cache.update_and_fetch(*random_tokens(1, length, seed))
    return caches


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=3),
    st.lists(st.sampled_from([1, 1, 1, 5, 40, 200]), min_size=1, max_size=12),
)
def test_limited_sequences_forget_in_a_batch_what_they_forget_alone(lengths, sizes):
    caches = limited_rows(lengths)
    batch = TurboQuantKVCache.merge(caches)
    for seed, size in enumerate(sizes):
        new = random_tokens(len(caches), size, 100 + seed)
        queries, _ = random_tokens(len(caches), size, 200 + seed)
        masks = batch.make_mask(size, return_array=True, window_size=60)
        keys, values = batch.update_and_fetch(*new)
        together = attend(queries, keys, values, masks)
        for row, cache in enumerate(caches):
            rows = slice(row, row + 1)
            mask = cache.make_mask(size, return_array=True, window_size=60)
            keys, values = cache.update_and_fetch(*(x[rows] for x in new))
            alone = attend(queries[rows], keys, values, mask)
            assert mx.allclose(together[rows], alone, atol=1e-4)  # float32 sums in another order
    assert batch.offset.tolist() == [cache.offset for cache in caches]
    assert batch.is_trimmable() == all(cache.is_trimmable() for cache in caches)
    for row, cache in enumerate(caches):
        for mine, theirs in zip(batch.extract(row).state, cache.state):
            same = mx.array_equal(mine, theirs) if isinstance(mine, mx.array) else mine == theirs
            assert same


def attend(queries, keys, values, mask) -> mx.array:
    keys, values = mx.array(keys), mx.array(values)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=DIM**-0.5, mask=mask)


def test_limited_sequences_can_be_generated_together(random_model):
    """Longer than the limit of a sequence; rotary positions continue past it."""
    enable(random_model, 8, window=16, max_size=240)
    prompts = prompts_of((300, 40, 150))
    generator = generate.BatchGenerator(random_model, completion_batch_size=3)
    said = {uid: [] for uid in generator.insert(prompts, max_tokens=[120] * 3)}
    while any(len(tokens) < 120 for tokens in said.values()):
        for response in generator.next()[1]:
            said[response.uid].append(response.token)
    # A sequence that is prefilled at once evicts the same tokens as in the batch.
    assert said[list(said)[1]] == alone(random_model, prompts[1], 120)


def test_a_token_of_a_latent_batch_takes_as_many_bytes_as_alone():
    cache = TurboQuantLatentCache(4, 4, window=16)
    cache.update_and_fetch(mx.ones((1, 1, 100, 64)), mx.ones((1, 1, 100, 16)))
    assert cache.token_nbytes == 64 * 4 // 8 + 2 + 2 * 16
    assert cache.merge([cache, cache]).token_nbytes == cache.token_nbytes
