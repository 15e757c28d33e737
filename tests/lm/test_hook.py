"""One hook for each module of mlx-lm serves all models and threads that use its attention."""

import threading
from collections.abc import Callable

import mlx.core as mx
import pytest
from conftest import logits, variant
from mlx_lm.models import base, llama
from mlx_lm.models import cache as mlx_lm_cache
from tokens import random_tokens

from mlx_turboquant import disable, enable, make_prompt_cache
from mlx_turboquant.lm.compressible import compressible_caches
from mlx_turboquant.lm.hook import observed_attention
from mlx_turboquant.lm.sensitivity import key_sensitivities

ORIGINAL = llama.scaled_dot_product_attention


def scaled_dot_product_attention(
    queries, keys, values, cache, scale, mask, sinks=None, window_size=None
):
    """Attention with one more argument, as a later version of mlx-lm may have it."""
    if window_size is not None:
        distance = mx.arange(keys.shape[2])[-queries.shape[2] :, None] - mx.arange(keys.shape[2])
        mask = (distance >= 0) & (distance < window_size)
    return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Run ``work(0)`` to ``work(count - 1)`` at once, and wait for all."""
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class NextAttention(llama.Attention):
    """Llama's attention with a call of that function."""

    window_size = None

    def __call__(self, x, mask=None, cache=None):
        shape = (*x.shape[:2], -1, 64)
        queries, keys, values = (
            project(x).reshape(shape).swapaxes(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = (self.rope(each, offset=cache.offset) for each in (queries, keys))
        keys, values = cache.update_and_fetch(keys, values)
        output = scaled_dot_product_attention(
            queries, keys, values, cache, self.scale, mask, window_size=self.window_size
        )
        return self.o_proj(output.swapaxes(1, 2).reshape(*x.shape[:2], -1))


@pytest.mark.parametrize("window_size", [None, 20])
def test_an_argument_that_decode_attention_does_not_know_gets_dense_tokens(
    random_model, window_size
):
    model = variant(random_model)
    for layer in model.layers:
        layer.self_attn.__class__ = NextAttention
        layer.self_attn.window_size = window_size
    fast = make_prompt_cache(model, 8, window=16)
    found = logits(model, fast)
    assert not fast[0].link.needs_arrays
    dense_cache = make_prompt_cache(model, 8, window=16)
    disable(model)
    expected = logits(model, dense_cache)
    # The default is our decode attention, which adds in another order.
    assert mx.array_equal(found, expected) == (window_size is not None)
    assert mx.allclose(found, expected, atol=1e-4)
    exact = logits(model, mlx_lm_cache.make_prompt_cache(model))
    assert mx.linalg.norm(found - exact) < 0.02 * mx.linalg.norm(exact)


def test_an_observer_sees_the_attention_of_its_own_thread_alone(random_model):
    other, seen = variant(random_model), []
    mx.eval(other.parameters())
    inside, done = threading.Event(), threading.Event()

    def run_in_the_background():
        inside.wait(60)
        mx.eval(other(mx.ones((1, 4), mx.int32)))
        done.set()

    thread = threading.Thread(target=run_in_the_background)
    thread.start()
    with observed_attention(random_model, lambda queries, keys, *_, **__: seen.append(queries)):
        inside.set()
        assert done.wait(60)
        random_model(mx.ones((1, 3), mx.int32))
    thread.join()
    assert [queries.shape[2] for queries in seen] == [3, 3]
    assert llama.scaled_dot_product_attention is ORIGINAL


def test_a_model_that_is_enabled_while_another_one_is_measured_stays_enabled(random_model):
    """Both have one architecture and share its attention."""
    other = variant(random_model)
    mx.eval(other.parameters())
    measuring, enabled = threading.Event(), threading.Event()

    def enable_other():
        measuring.wait(60)
        enable(other, 4, window=0, sink_tokens=0)
        enabled.set()

    thread = threading.Thread(target=enable_other)
    thread.start()

    def wait(*_, **__):
        measuring.set()
        assert enabled.wait(60)

    with observed_attention(random_model, wait):
        key_sensitivities(random_model, compressible_caches(random_model))
    thread.join()
    expected = logits(other, other.make_cache())
    assert llama.scaled_dot_product_attention is not ORIGINAL
    disable(other)
    assert llama.scaled_dot_product_attention is ORIGINAL
    dense = logits(other, make_prompt_cache(other, 4, window=0, sink_tokens=0))
    assert mx.allclose(expected, dense, atol=1e-4)  # sums in another order
    disable(other)


def test_many_threads_enable_run_and_disable_models_of_one_architecture(random_model):
    models = [variant(random_model) for _ in range(4)]
    mx.eval([model.parameters() for model in models])
    alone = [logits(model, make_prompt_cache(model, 4, window=16)) for model in models]
    mx.eval(alone)
    for model in models:
        disable(model)
    failures = []

    def use(index):
        try:
            for _ in range(3):
                enable(models[index], 4, window=16)
                found = logits(models[index], models[index].make_cache())
                assert mx.array_equal(found, alone[index])
                disable(models[index])
        except BaseException as error:
            failures.append(error)

    in_threads(use, len(models))
    assert failures == []
    assert llama.scaled_dot_product_attention is ORIGINAL


def test_threads_that_read_prompts_with_one_model_at_once_get_their_own_logits(random_model):
    """The same chunks as one after the other, so the logits are equal."""
    make_prompt_cache(random_model, 8, window=16)  # hooks the attention
    prompts = [random_tokens(1, 200, seed=seed) for seed in range(4)]
    mx.eval(random_model.parameters(), prompts)
    found: dict[int, mx.array] = {}

    def read(number: int) -> None:
        cache, logits = make_prompt_cache(random_model, 8, window=16), []
        for start in range(0, 200, 50):
            logits.append(random_model(prompts[number][:, start : start + 50], cache=cache))
            mx.eval(logits)
        found[number] = mx.concatenate(logits, axis=1)
        mx.eval(found[number])

    for number in range(4):
        read(number)
    alone = dict(found)
    in_threads(read, 4)
    assert all(mx.array_equal(found[number], alone[number]) for number in range(4))
    assert all(found[number] is not alone[number] for number in range(4))
