"""Compressed caches of three real models, which ``make test-real`` downloads once."""

from itertools import islice
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from answers import long_prompt
from conftest import REAL_MODELS
from mlx_lm.models.cache import make_prompt_cache as make_exact_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from real_models import SOURCES, fetch
from tokens import continuation

from mlx_turboquant import disable, enable, load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_turboquant.lm import texts
from mlx_turboquant.lm.calibrate import calibrate
from mlx_turboquant.lm.compression import give_profile
from mlx_turboquant.lm.loading import prepare_for_device
from mlx_turboquant.measure.cache_specs import preset
from mlx_turboquant.measure.evaluate import Comparison, following_tokens
from mlx_turboquant.measure.tasks import TASKS, TaskRun, pair

pytestmark = pytest.mark.real

QUESTION = "Explain in detail what this text is about."
# KL divergence at 4 and 3 bits on one text: 2.5 times the mean of four texts (docs/quality.md),
# because texts differ by a third and more.
DIVERGENCES = {
    "smollm2-135m": (0.0026, 0.013),
    "qwen2.5-coder-0.5b": (0.0029, 0.0144),
    "gemma-3-270m": (0.0086, 0.034),
}


class Real(NamedTuple):
    name: str
    model: nn.Module
    tokenizer: TokenizerWrapper


@pytest.fixture(scope="module", params=SOURCES)
def loaded(request) -> Real:
    """A model with a profile, as the commands would give it one."""
    model, tokenizer = mlx_lm.load(str(fetch(request.param, REAL_MODELS)))
    prepare_for_device(model)
    give_profile(model, calibrate(model, tokenizer))
    return Real(request.param, model, tokenizer)


@pytest.fixture
def real(loaded):
    yield loaded
    disable(loaded.model)


def prompt_of(real: Real, length: int = 600, text: int = 0) -> list[int]:
    """A question about ``length`` tokens of a bundled text."""
    contents = texts.bundled_texts()[text]
    return long_prompt(real.tokenizer, contents, length, QUESTION, "The bundled text")


def test_eight_bits_give_the_answer_of_the_exact_cache(real):
    prompt = prompt_of(real)
    expected = continuation(real.model, prompt, make_exact_cache(real.model), 100)
    cache = make_prompt_cache(real.model, 8)
    assert continuation(real.model, prompt, cache, 100) == expected


def test_four_and_three_bits_stay_as_close_as_was_measured(real):
    contents = texts.bundled_texts()
    [context] = texts.contexts(real.tokenizer, contents[1:2], 1537, 1)
    comparison = Comparison(real.model, [preset("4"), preset("3")])
    comparison.text(context, 256)
    _, *ours = (scores.summary()["kl_mean"] for scores in comparison.scores)
    assert all(kl < bound for kl, bound in zip(ours, DIVERGENCES[real.name]))
    assert 0 < ours[0] < ours[1]


def test_a_batch_answers_as_its_sequences_do_alone(real):
    prompts = [prompt_of(real, length, text) for length, text in ((300, 0), (450, 1), (220, 2))]
    alone = [
        continuation(real.model, prompt, make_prompt_cache(real.model, 8), 40) for prompt in prompts
    ]
    enable(real.model, 8)
    texts_of_batch = mlx_lm.batch_generate(real.model, real.tokenizer, prompts, max_tokens=40).texts
    for text, tokens in zip(texts_of_batch, alone):
        # A batch stops at the end of an answer.
        assert real.tokenizer.decode(tokens).startswith(text)


def test_a_saved_prompt_is_continued_as_if_it_had_just_been_read(real, tmp_path):
    prompt = prompt_of(real)
    cache = make_prompt_cache(real.model, 4)
    mx.eval(real.model(mx.array(prompt[:-1])[None], cache=cache))
    file = save_prompt_cache(tmp_path / "prompt", cache, real.model)
    loaded = load_prompt_cache(file, real.model)
    kept, again = (
        list(islice(following_tokens(real.model, each, prompt[-1]), 40)) for each in (cache, loaded)
    )
    assert again == kept


def test_codes_in_a_thousand_tokens_are_found_where_the_exact_cache_finds_them(real, tmp_path):
    prose = [line for text in texts.bundled_texts() for line in text.splitlines() if line.strip()]
    specs = [preset("4"), preset("3")]
    tasks = TaskRun(real.model, real.tokenizer, specs, prose, tmp_path / "tasks.jsonl", {})
    result = tasks.do(TASKS["keys"], 1024, passages=1)
    for spec in specs:
        assert pair([result], spec.name).only_exact <= 1
