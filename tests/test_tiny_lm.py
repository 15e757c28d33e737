"""The bundled model with exact and compressed caches."""

import mlx_lm
import pytest
from find_code import standard_library_tokens
from hidden_codes import answer, hide_codes
from mlx_lm.models.cache import make_prompt_cache as make_exact_cache
from tokens import continuation

from mlx_turboquant import cache_size, make_prompt_cache


def test_eight_bits_write_the_same_200_tokens(tiny_lm):
    model, tokenizer = tiny_lm
    prompt = standard_library_tokens(tokenizer, 1500)[:1500]
    exact = continuation(model, prompt, make_exact_cache(model), 200)
    cache = make_prompt_cache(model, 8)
    assert len(exact) >= 200
    assert continuation(model, prompt, cache, 200) == exact
    assert cache[0].packed_tokens > 1500


@pytest.mark.parametrize("bits, ratio", [(4, 2.7), (3, 3.3)])
@pytest.mark.parametrize("length", [4000, pytest.param(8000, marks=pytest.mark.slow)])
def test_the_code_is_found_in_a_long_text(tiny_lm, length, bits, ratio):
    model, tokenizer = tiny_lm
    text = standard_library_tokens(tokenizer, length)
    prompt, code = hide_codes(tokenizer, text, length, seed=length)
    cache = make_prompt_cache(model, bits)
    tokens = continuation(model, prompt, cache, 8)
    assert tokenizer.decode(tokens).startswith(answer(code))
    # The limits are for 4,000 tokens on a CPU, where exact values take four bytes.
    assert cache_size(cache).fp16_nbytes > ratio * cache_size(cache).nbytes


def test_generate_of_mlx_lm_takes_the_cache(tiny_lm):
    """The three lines of the README."""
    model, tokenizer = tiny_lm
    text = mlx_lm.generate(
        model,
        tokenizer,
        prompt="def add(a, b):\n    return",
        max_tokens=5,
        prompt_cache=make_prompt_cache(model, bits=4),
    )
    assert text.startswith("a + b")
