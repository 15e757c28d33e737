"""Requests are let in while they fit, in the order in which they came."""

import threading
import time

import pytest
from conftest import variant
from mlx_lm.models.cache import make_prompt_cache
from tiny_families import FAMILIES, tiny_model
from tokens import random_tokens

from mlx_turboquant import enable
from mlx_turboquant.cli.admission import Admission, DoesNotFit, KeptPrompts
from mlx_turboquant.lm.compressible import compressible_caches
from mlx_turboquant.lm.loading import device_nbytes
from mlx_turboquant.lm.settings import Settings
from mlx_turboquant.measure.cache_specs import CacheSpec
from mlx_turboquant.measure.footprint import chunk_nbytes, footprint

TOKENS = 1000


@pytest.fixture
def model(random_model):
    return enable(variant(random_model), 4)


def admission_for(model, requests: float) -> Admission:
    """One with room for so many requests of 1 000 tokens."""
    each = footprint(model, CacheSpec("ours", settings=Settings(4))).prompt_nbytes(TOKENS)
    room = int(requests * each) + 10
    admission = Admission(device_nbytes(model) + chunk_nbytes(model) + room)
    assert admission.use(model, Settings(4)) == room
    return admission


def run(admission: Admission, count: int) -> tuple[int, list[int]]:
    """How many of ``count`` requests ran at once at the most, and the order they were let in."""
    running, most, order, lock = 0, 0, [], threading.Lock()

    def request(number: int) -> None:
        nonlocal running, most
        with admission.admitted(TOKENS):
            with lock:
                running += 1
                most = max(most, running)
                order.append(number)
            time.sleep(0.02)
            with lock:
                running -= 1

    threads = [threading.Thread(target=request, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
        time.sleep(0.002)
    for thread in threads:
        thread.join(10)
    return most, order


@pytest.mark.parametrize("requests", [1, 3])
def test_as_many_run_as_fit_and_the_others_wait_their_turn(model, requests):
    most, order = run(admission_for(model, requests), 12)
    assert most == requests
    assert sorted(order) == list(range(12))
    assert order[:requests] == list(range(requests))


def test_what_never_fits_is_refused_at_once(model):
    admission = admission_for(model, 1.5)
    with pytest.raises(DoesNotFit, match="2,000 tokens, .* needs .* ask for less"):
        with admission.admitted(2 * TOKENS):
            pass
    with admission.admitted(TOKENS):  # as before
        pass


def test_room_comes_back_when_a_request_fails(model):
    admission = admission_for(model, 1)
    for _ in range(3):
        with pytest.raises(RuntimeError), admission.admitted(TOKENS):
            raise RuntimeError


def test_a_limit_without_room_for_a_prompt_is_refused(model):
    with pytest.raises(ValueError, match="use a larger --memory-limit"):
        Admission(device_nbytes(model)).use(model, Settings(4))


def test_before_the_model_is_there_requests_are_let_in():
    with Admission(1).admitted(10**6):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_models_is_counted(family):
    model = tiny_model(family)
    if compressible_caches(model):
        assert Admission(10**12).use(enable(model, 4), Settings(4)) < 10**12


def cache_of(model, count: int) -> list:
    cache = make_prompt_cache(model)
    for start in range(0, count, 200):
        model(random_tokens(200, seed=start)[None], cache=cache)
    return cache


def filled(admission: Admission, cache: list) -> KeptPrompts:
    """With as many copies of a cache as fit."""
    kept = KeptPrompts(admission, 10**6)
    for number in range(1 + admission.left // nbytes_of(cache)):
        kept.insert_cache("model", [number] * 800, cache)
    return kept


def nbytes_of(cache: list) -> int:
    return sum(layer.nbytes for layer in cache)


def test_kept_prompts_make_room_for_requests_and_come_back_to_it(model):
    admission, cache = admission_for(model, 3), cache_of(model, 800)
    kept, each = filled(admission, cache), nbytes_of(cache)
    with admission.admitted(TOKENS), admission.admitted(TOKENS):
        kept.trim_to(n_bytes=10**12)
        assert kept.nbytes <= admission.left < kept.nbytes + each
        # One of the two has an answer, and its cache the room that it had until now.
        for number in range(3):
            kept.insert_cache("model", [7, number] * 400, cache)
            assert kept.nbytes <= admission.left + each
    before = len(kept)
    kept.trim_to(n_bytes=10**12)
    assert len(kept) == before > 0


def test_a_kept_prompt_is_found_before_it_makes_room_for_the_request_that_goes_on_with_it(model):
    admission = admission_for(model, 1)
    kept = KeptPrompts(admission)
    kept.insert_cache("model", [1] * 800, cache_of(model, 800))
    with admission.admitted(TOKENS):
        cache, rest = kept.fetch_nearest_cache("model", [*[1] * 800, 2])
        kept.trim_to(n_bytes=10**12)
        assert len(kept) == 0 and rest == [2] and cache[0].offset == 800
