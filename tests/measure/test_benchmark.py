"""What the benchmark measures; no test depends on speed."""

import gc

import mlx.core as mx
from tokens import random_tokens

from mlx_turboquant.lm.settings import Settings
from mlx_turboquant.measure.benchmark import Measurement, measure, median
from mlx_turboquant.measure.cache_specs import EXACT, MLX_LM, preset

PROMPTS = random_tokens(2, 600, seed=1)
# Beside the cache there are the tokens, and what the allocator rounds up.
ROUNDING = 50_000


def test_the_cache_is_that_of_all_tokens_and_all_that_is_held(random_model):
    for spec in (EXACT, *MLX_LM, preset("4", Settings(window=32))):
        mx.eval(PROMPTS)
        measured = measure(random_model, spec, PROMPTS, 20)
        cache = spec.make_cache(random_model)
        # One more token is the end of the prompt, and one the step in flight.
        for tokens in (PROMPTS[:, :599], *mx.split(PROMPTS[:, :22], 22, axis=1)):
            random_model(tokens, cache=cache)
            spec.after_chunk(cache)
        assert measured.cache_nbytes == sum(layer.nbytes for layer in cache)
        assert measured.cache_nbytes <= measured.decode_active < measured.cache_nbytes + ROUNDING
        assert measured.decode_active <= measured.decode_peak
        assert measured.prefill_active <= measured.prefill_peak
        assert 0 < measured.prefill < measured.first_token
        assert 0 < measured.graph < measured.decode


def test_garbage_that_is_collected_in_between_is_not_missing_from_what_is_held(random_model):
    garbage = [mx.zeros(1_000_000)]
    mx.eval(garbage)
    garbage.append(garbage)
    del garbage  # only the garbage collector frees it
    measured = measure(random_model, EXACT, PROMPTS, 20, lambda tokens: gc.collect())
    assert measured.cache_nbytes <= measured.decode_active


def test_progress_counts_the_tokens_of_one_sequence(random_model):
    counts = []
    measure(random_model, EXACT, PROMPTS, 20, counts.append)
    assert sum(counts) == 600 + 20


def test_a_prompt_is_read_with_one_dense_layer_at_a_time(random_model):
    """The exact cache of 6,000 tokens has 6 MB per layer; a chunk takes the same for all caches."""
    prompt = mx.broadcast_to(PROMPTS[:1, :1], (1, 6000))
    exact, ours = (measure(random_model, spec, prompt, 10) for spec in (EXACT, preset("4")))
    layer = 6000 * 2 * 2 * 64 * 4
    assert ours.prefill_peak < exact.prefill_peak + 2 * layer
    assert ours.prefill_active < 0.5 * exact.prefill_active


def test_the_median_is_that_of_each_number():
    runs = [Measurement(*(float(i),) * 4, *(i,) * 5) for i in (1, 5, 3)]
    assert median(runs) == Measurement(*(3.0,) * 4, *(3,) * 5)
