"""Every family of models behaves as the table in docs/models.md says."""

import re

import mlx.core as mx
import pytest
from conftest import REPOSITORY
from mlx_lm.models import cache as mlx_lm_cache
from tiny_families import FAMILIES, tiny_model
from tokens import random_tokens

from mlx_turboquant import TurboQuantKVCache, disable, make_prompt_cache
from mlx_turboquant.cache.batch import BatchTurboQuantKVCache
from mlx_turboquant.lm import hook
from mlx_turboquant.lm.compressible import flat_caches

STEPS = 16
LEFT = {
    "RotatingKVCache": "sliding window",
    "ChunkedKVCache": "chunked attention",
    "ArraysCache": "recurrent state",
    "KVCache": "sparse attention",
}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def decode_calls(monkeypatch) -> list[int]:
    """The number of tokens in each call of the fused path."""
    calls = []
    original = hook.decode_attention

    def counted(queries, tokens, *arguments):
        calls.append(tokens.count)
        return original(queries, tokens, *arguments)

    monkeypatch.setattr(hook, "decode_attention", counted)
    return calls


def logits(model, cache, tokens: mx.array) -> mx.array:
    """Logits of a prompt in two chunks and of single tokens after it."""
    outputs = [model(tokens[:, :50], cache=cache), model(tokens[:, 50:-STEPS], cache=cache)]
    for step in range(-STEPS, 0):
        outputs.append(model(tokens[:, step:][:, :1], cache=cache))
        mx.eval(outputs[-1])
    return mx.concatenate(outputs, axis=1)


def relative_error(output: mx.array, expected: mx.array) -> float:
    """The largest error of all positions, relative to the spread of the logits."""
    spread = mx.linalg.norm(expected - expected.mean(axis=-1, keepdims=True), axis=-1)
    return (mx.linalg.norm(output - expected, axis=-1) / spread).max().item()


def documented_table() -> dict[str, tuple[str, str, str]]:
    """Compressed layers, other layers, and path, for each family."""
    text = (REPOSITORY / "docs" / "models.md").read_text()
    table = re.search(r"<!-- families -->\n(.*?)<!-- /families -->", text, re.DOTALL)[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {name: tuple(rest) for first, *rest in rows[2:] for name in re.findall("`(.*?)`", first)}


def test_the_table_names_every_family():
    assert sorted(documented_table()) == sorted(FAMILIES)


def test_a_family_is_compressed_as_the_table_says(family, decode_calls):
    model = tiny_model(family)
    tokens = random_tokens(1, 80 + STEPS, seed=1, vocabulary=512)
    expected = logits(model, mlx_lm_cache.make_prompt_cache(model), tokens)
    compressed, left, path = documented_table()[family]
    if compressed == "nothing":
        with pytest.raises(ValueError, match="No layer of this model can be compressed"):
            make_prompt_cache(model, 8)
        return
    errors = []
    for bits in (8, 4):
        cache = make_prompt_cache(model, bits, window=16)
        decode_calls.clear()
        errors.append(relative_error(logits(model, cache, tokens), expected))
        layers = flat_caches(cache)
        kinds = {isinstance(layer, TurboQuantKVCache) for layer in layers}
        others = {LEFT[type(x).__name__] for x in layers if not hasattr(x, "packed_tokens")}
        assert compressed == ("all layers" if kinds == {True} else "full attention")
        assert left == (", ".join(sorted(others)) or "-")
        assert path == ("kernels" if decode_calls else "dense")
        assert len(decode_calls) % STEPS == 0
        packed = [x.packed_tokens for x in layers if hasattr(x, "packed_tokens")]
        assert min(packed) >= 32
    disable(model)
    # The squared error of 8 bits is 1/256 of that of 4; layers of random weights magnify both.
    assert errors[0] < 0.15 and errors[0] < 0.3 * errors[1]


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_layers_that_share_keys_see_those_of_their_call_as_they_came(family, is_enabled):
    """A first chunk is exact, although most of it is packed; so are the steps after it."""
    model, tokens = tiny_model(family), random_tokens(1, 61, seed=1, vocabulary=512)
    cache, exact = make_prompt_cache(model, 2, window=24), mlx_lm_cache.make_prompt_cache(model)
    if not is_enabled:
        disable(model)
    chunks = [tokens[:, :20], tokens[:, 20:60]]
    for chunk in chunks:
        assert mx.allclose(model(chunk, cache=cache), model(chunk, cache=exact), atol=1e-4)
    assert cache[1].packed_tokens == 32
    disable(model)


def after_prompt(model, cache, prompt: mx.array, following: mx.array) -> mx.array:
    model(prompt, cache=cache)
    steps = (following[:, step : step + 1] for step in range(following.shape[1]))
    return mx.concatenate([model(token, cache=cache) for token in steps], axis=1)


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "gemma3n", "gpt_oss", "deepseek_v3", "longcat_flash", "falcon_h1"]
)
def test_batches_of_a_family_are_closer_to_its_sequences_than_these_to_the_exact_cache(family):
    """Prompts of 70, 96 and 56 tokens, right-padded. Sums in another order change codes."""
    model, lengths = tiny_model(family), [70, 96, 56]
    tokens = random_tokens(3, max(lengths), seed=1, vocabulary=512)
    following = random_tokens(3, 4, seed=1, vocabulary=512)
    caches = [make_prompt_cache(model, 8, window=16) for _ in lengths]
    batch = [layers[0].merge(list(layers)) for layers in zip(*caches)]
    for layer in batch:
        layer.prepare(lengths=lengths, right_padding=[max(lengths) - n for n in lengths])
    model(tokens, cache=batch)
    for layer in batch:
        layer.finalize()
    steps = (following[:, step : step + 1] for step in range(4))
    together = mx.concatenate([model(token, cache=batch) for token in steps], axis=1)
    assert any(isinstance(layer, BatchTurboQuantKVCache) for layer in flat_caches(batch))
    for row, length in enumerate(lengths):
        alone, exact = (
            after_prompt(model, cache, tokens[row : row + 1, :length], following[row : row + 1])
            for cache in (caches[row], mlx_lm_cache.make_prompt_cache(model))
        )
        codec = relative_error(alone, exact)
        assert relative_error(together[row : row + 1], alone) < codec
    disable(model)
