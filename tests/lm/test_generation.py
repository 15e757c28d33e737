"""mlx-lm's ways to generate, each with compressed caches."""

import random

import mlx.core as mx
import pytest
from conftest import variant
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache as make_exact_cache
from mlx_lm.models.cache import trim_prompt_cache
from tiny_families import tiny_model
from tokens import continuation, random_tokens

from mlx_turboquant import disable, make_prompt_cache
from mlx_turboquant.kernels.storage import PackedKV

CODE = (
    "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n\n\n"
)


@pytest.fixture
def prompt(tiny_lm) -> mx.array:
    """About 200 tokens."""
    return tiny_lm[1].encode(7 * CODE + "def write(path, text):\n", return_tensors="mlx")[0]


@pytest.mark.parametrize("draft_tokens", [1, 4])
@pytest.mark.parametrize("draft", ["itself", "always wrong"])
@pytest.mark.parametrize("window", [0, 8, 128])
def test_speculative_decoding_says_what_the_plain_run_says(
    tiny_lm, prompt, window, draft, draft_tokens
):
    model = tiny_lm[0]
    drafting = model if draft == "itself" else variant(model)
    caches = [make_prompt_cache(m, 8, window=window) for m in (model, drafting)]
    steps = speculative_generate_step(
        prompt,
        model,
        drafting,
        max_tokens=40,
        num_draft_tokens=draft_tokens,
        prompt_cache=sum(caches, []),
    )
    said, accepted = zip(*((token, from_draft) for token, _, from_draft in steps))
    assert list(said) == continuation(model, prompt, make_exact_cache(model))
    assert sum(accepted) >= 20 if draft == "itself" else sum(accepted) < 4
    assert caches[0][0].packed_tokens >= 32 * ((prompt.size - window) // 32)


def test_no_token_is_quantized_twice_while_drafts_are_taken_back(tiny_lm, prompt, monkeypatch):
    model, quantized = tiny_lm[0], []

    def counting(packed, new):
        quantized.append(new[0].shape[2])
        return append(packed, new)

    drafting = variant(model)
    caches = [make_prompt_cache(m, 8, window=8) for m in (model, drafting)]
    append = PackedKV.append
    monkeypatch.setattr(PackedKV, "append", counting)
    options = {"max_tokens": 80, "num_draft_tokens": 4, "prompt_cache": sum(caches, [])}
    list(speculative_generate_step(prompt, model, drafting, **options))
    # A window of 8 is longer than any draft, so no packed token is ever trimmed.
    assert sum(quantized) == sum(layer.packed_tokens for layer in sum(caches, []))


@pytest.mark.parametrize("size", [1, 7, 2048])
def test_the_prompt_may_be_read_in_chunks_of_any_size(tiny_lm, prompt, size):
    model = tiny_lm[0]
    expected = continuation(model, prompt, make_exact_cache(model))
    compressed = make_prompt_cache(model, 8, window=16)
    assert continuation(model, prompt, compressed, prefill_step_size=size) == expected
    assert compressed[0].packed_tokens >= 160


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 67, 68, 69, 100, 101])
def test_prompts_around_the_window_are_continued_as_without_compression(tiny_lm, prompt, length):
    """A window of 64 and 4 sinks: 68 tokens are exact, and the first block leaves at 100."""
    model = tiny_lm[0]
    expected = continuation(model, prompt[:length], make_exact_cache(model))
    assert continuation(model, prompt[:length], make_prompt_cache(model, 8, window=64)) == expected


def test_an_empty_prompt_is_refused_and_changes_nothing(tiny_lm):
    compressed = make_prompt_cache(tiny_lm[0], 8)
    with pytest.raises(ValueError, match="prompt"):
        continuation(tiny_lm[0], mx.array([], mx.int32), compressed)
    assert all(layer.empty() for layer in compressed)


def test_a_prompt_that_was_interrupted_can_be_read_on(tiny_lm, prompt):
    model = tiny_lm[0]
    compressed = make_prompt_cache(model, 8, window=16)

    def interrupt(processed, total):
        if processed >= 120:
            raise KeyboardInterrupt

    options = {"prefill_step_size": 60, "prompt_progress_callback": interrupt}
    with pytest.raises(KeyboardInterrupt):
        continuation(model, prompt, compressed, **options)
    seen = compressed[0].offset
    assert seen == 120
    said = continuation(model, prompt[seen:], compressed)
    assert said == continuation(model, prompt, make_exact_cache(model))


@pytest.mark.parametrize("after", [1, 2, 30, 33])
def test_a_generation_that_was_stopped_can_go_on(tiny_lm, prompt, after):
    model = tiny_lm[0]
    expected = continuation(model, prompt, make_exact_cache(model), count=60)
    compressed = make_prompt_cache(model, 8, window=16)
    steps = generate_step(prompt, model, max_tokens=60, prompt_cache=compressed)
    said = [next(steps)[0] for _ in range(after)]
    steps.close()
    # mlx-lm has computed one token more than it has returned.
    trim_prompt_cache(compressed, compressed[0].offset - (prompt.size + after - 1))
    rest = continuation(model, mx.array(said[-1:]), compressed, count=60 - after)
    assert said + rest == expected


class Graph:
    """A file for ``mx.export_to_dot`` that counts lines."""

    def __init__(self):
        self.lines = 0

    def write(self, text: str) -> None:
        self.lines += text.count("\n")


def graph_size(arrays: list[mx.array]) -> int:
    """The size of the graph that these arrays need, in lines of its drawing."""
    graph = Graph()
    mx.export_to_dot(graph, *arrays)
    return graph.lines


def held_beside_nbytes(prompt_cache) -> int:
    """Bytes of everything but the cache, which should be the same at any time."""
    mx.synchronize()
    return mx.get_active_memory() - sum(layer.nbytes for layer in prompt_cache)


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3n", "gemma4", "deepseek_v3"])
def test_between_calls_a_model_holds_nothing_but_its_caches(family, is_enabled):
    """Also if layers share keys and values, or if attention gets them as arrays."""
    model = tiny_model(family)
    prompt = random_tokens(1, 600, vocabulary=512)
    for is_measured in (False, True):  # constants first
        compressed = make_prompt_cache(model, 4, window=16)
        if not is_enabled:
            disable(model)
        before = held_beside_nbytes(compressed)
        for count in (600, 1, 1, 40, 1):
            mx.eval(model(prompt[:, :count], cache=compressed))
            beside = held_beside_nbytes(compressed) - before
            assert not is_measured or beside < 100_000  # what the allocator rounds up
    disable(model)


def generate_long(model, count: int, check_every: int, **settings) -> None:
    """Generate ``count`` tokens; graph and memory must not grow after the first 300."""
    continuation(model, mx.array([1]), make_prompt_cache(model, **settings), count=200)  # constants
    compressed = make_prompt_cache(model, **settings)
    token, sizes, beside = mx.array([[1]]), [], []
    for step in range(count):
        logits = model(token, cache=compressed)
        token = logits[:, -1:].argmax(axis=-1)
        if step >= 300:
            sizes.append(graph_size([token]))
        mx.eval(token)  # mlx-lm evaluates the token only, not the cache
        if step % check_every == 300 % check_every and step >= 300:
            beside.append(held_beside_nbytes(compressed))
    assert compressed[0].offset == count
    # A step that packs a block has a larger graph, but not a larger one later on.
    assert max(sizes[-200:]) <= max(sizes[:200])
    assert max(beside) - min(beside) < 100_000  # what the allocator rounds up


@pytest.mark.parametrize("settings", [{}, {"max_size": 300}], ids=["growing", "limited"])
def test_a_long_generation_grows_neither_the_graph_nor_memory_beside_the_cache(
    random_model, settings
):
    generate_long(random_model, 1000, check_every=50, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"max_size": 1000}], ids=["growing", "limited"])
def test_twenty_thousand_tokens_grow_neither_the_graph_nor_memory_beside_the_cache(
    random_model, settings
):
    generate_long(random_model, 20_000, check_every=500, **settings)


@pytest.mark.parametrize("turns", [300, pytest.param(1_000, marks=pytest.mark.slow)])
def test_turns_that_are_taken_back_leave_what_was_there(random_model, turns):
    """Every turn is prefilled in a chunk, answered in three tokens, and mostly trimmed again."""
    choose, tokens = random.Random(0), []
    compressed = make_prompt_cache(random_model, 8, window=16)
    beside = []
    for turn in range(turns):
        said = [choose.randrange(128) for _ in range(choose.randint(1, 60))]
        logits = random_model(mx.array([said]), cache=compressed)
        for _ in range(3):
            token = logits[:, -1:].argmax(axis=-1)
            said.append(token.item())
            logits = random_model(token, cache=compressed)
        mx.eval(logits)
        tokens += said
        kept = choose.randint(max(0, len(tokens) - 90), min(len(tokens), 400))
        assert trim_prompt_cache(compressed, len(tokens) - kept) == len(tokens) - kept
        tokens = tokens[:kept]
        assert [layer.offset for layer in compressed] == [kept] * 2
        if turn >= 100:
            del logits, token
            beside.append(held_beside_nbytes(compressed))
    assert max(beside) - min(beside) < 100_000  # what the allocator rounds up
    following = random_tokens(1, 20)
    exact = make_exact_cache(random_model)
    random_model(mx.array([tokens]), cache=exact)
    expected = random_model(following, cache=exact)
    # 8 bits, as in the tests of whole models.
    error = random_model(following, cache=compressed) - expected
    assert mx.linalg.norm(error) < 0.01 * mx.linalg.norm(expected)
