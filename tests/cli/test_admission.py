"""Requests are admitted while they fit, in order of arrival."""

import importlib
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from conftest import variant
from mlx_lm.models.cache import make_prompt_cache
from tiny_families import FAMILIES, tiny_model
from tokens import random_tokens

from mlx_turboquant import enable
from mlx_turboquant.cli.admission import Admission
from mlx_turboquant.cli.kept_prompts import KeptPrompts, ScopedTokens
from mlx_turboquant.cli.requests import BadRequest
from mlx_turboquant.lm.compressible import compressible_caches
from mlx_turboquant.lm.loading import device_nbytes
from mlx_turboquant.lm.settings import Settings
from mlx_turboquant.measure.cache_specs import CacheSpec
from mlx_turboquant.measure.footprint import Footprint, chunk_nbytes, footprint

_mlx_lm_generate = importlib.import_module("mlx_lm.generate")

TOKENS = 1000
# Timeout for a thread that should go on.
SECONDS = 20
# mlx-lm does not batch the first, and gives the second masks of a wrong shape.
NOT_IN_BATCHES = ("llama4", "gemma2")


@pytest.fixture
def model(random_model):
    return enable(variant(random_model), 4)


def counted(model) -> Footprint:
    return footprint(model, CacheSpec("ours", settings=Settings(4)))


def admission_for(model, requests: float) -> Admission:
    """An Admission with room for this number of requests of 1,000 tokens."""
    room = int(requests * counted(model).prompt_nbytes(TOKENS)) + 10
    admission = Admission(device_nbytes(model) + chunk_nbytes(model) + room)
    assert admission.use(model, Settings(4)) == room
    return admission


def run(admission: Admission, count: int) -> tuple[int, list[int]]:
    """The most of ``count`` requests that ran at once, and the order in which they started."""
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
    with pytest.raises(BadRequest, match="2,000 tokens, .* needs .* ask for less"):
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


class Request(threading.Thread):
    """A request that waits to be admitted, and stays until ``leave`` is set."""

    def __init__(self, admission: Admission, tokens: int):
        super().__init__(daemon=True)
        self.admission, self.tokens = admission, tokens
        self.inside, self.leave = threading.Event(), threading.Event()
        self.refused: BadRequest | None = None
        self.start()

    def run(self) -> None:
        try:
            with self.admission.admitted(self.tokens):
                self.inside.set()
                assert self.leave.wait(SECONDS)
        except BadRequest as error:
            self.refused = error


@contextmanager
def waiting(admission: Admission, tokens: int, before: int = 0) -> Iterator[Request]:
    """A request that waits in the queue behind others, and leaves in the end."""
    request = Request(admission, tokens)
    while len(admission._waiting) <= before:
        assert request.is_alive()
        time.sleep(0.001)
    try:
        yield request
    finally:
        request.leave.set()
        request.join(SECONDS)
    assert not request.is_alive()


def cost(model, tokens: int = TOKENS) -> int:
    """Bytes of one request."""
    return int(counted(model).prompt_nbytes(tokens))


@pytest.fixture
def larger(model):
    return enable(variant(model, num_hidden_layers=20, layer_types=["full_attention"] * 20), 4)


def test_a_model_that_leaves_more_room_lets_those_in_that_wait(model, larger):
    admission = admission_for(larger, 1.5)
    with admission.admitted(TOKENS):
        with waiting(admission, TOKENS) as second, waiting(admission, TOKENS, 1) as third:
            assert admission.use(model, Settings(4)) > 3 * cost(model)
            assert second.inside.wait(SECONDS) and third.inside.wait(SECONDS)


def test_what_waits_and_does_not_fit_beside_another_model_is_refused(model, larger):
    admission = admission_for(larger, 2.5)
    tokens = counted(model).longest(admission.use(model, Settings(4)))
    with ExitStack() as requests:
        for _ in range(admission.left // cost(model)):
            requests.enter_context(admission.admitted(TOKENS))
        with waiting(admission, tokens) as long, waiting(admission, TOKENS, 1) as short:
            assert admission.use(larger, Settings(4)) < cost(larger, tokens)
            long.join(SECONDS)
            assert f"{tokens:,} tokens" in str(long.refused)
            assert not short.inside.is_set()
            requests.close()
            assert short.inside.wait(SECONDS) and not short.refused


def test_what_waits_counts_by_the_model_that_is_there_when_it_is_let_in(model, larger):
    admission = admission_for(larger, 1.5)
    with ExitStack() as first:
        first.enter_context(admission.admitted(TOKENS))
        with waiting(admission, TOKENS) as second:
            room = admission.use(model, Settings(4))
            assert second.inside.wait(SECONDS)
            assert admission.left == room - 2 * cost(model)
            first.close()
            assert admission.left == room - cost(model)
    assert admission.left == room


def test_a_long_request_makes_the_short_ones_beside_it_as_long(model):
    admission = admission_for(model, 3)
    room = admission.left
    with ExitStack() as short:
        for _ in range(2):
            short.enter_context(admission.admitted(100))
        assert admission.left == room - 2 * cost(model, 100)
        with admission.admitted(TOKENS):
            assert admission.left == room - 3 * cost(model)
        with waiting(admission, 2 * TOKENS) as long:
            assert not long.inside.is_set()
            short.close()
            assert long.inside.wait(SECONDS)  # it fits alone
    assert admission.left == room


def batches(model, prompts: list[int], later: list[int], count: int) -> Iterator[int]:
    """Bytes held at every step of a batch of random prompts, some of which come later."""
    generator = _mlx_lm_generate.BatchGenerator(model)
    tokens = random_tokens(max(prompts + later)).tolist()
    generator.insert([tokens[:length] for length in prompts], [count] * len(prompts))
    for _ in range(2):
        generator.next()
    if later:
        generator.insert([tokens[:length] for length in later], [count] * len(later))
    while any(generator.next()):
        yield generator.prompt_cache_nbytes


@pytest.mark.parametrize(
    "prompts, later, count",
    [([1024] + [64] * 7, [], 20), ([700, 30, 300, 20], [900], 70), ([20] * 5, [20] * 20, 40)],
)
def test_ragged_batches_hold_no_more_than_was_counted(model, prompts, later, count):
    admission = Admission(10**12)
    room = admission.use(model, Settings(4))
    with ExitStack() as requests:
        for length in prompts + later:
            requests.enter_context(admission.admitted(length + count))
        held = max(batches(model, prompts, later, count))
        assert held <= room - admission.left <= 3.5 * held


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batches_of_every_family_hold_no_more_than_was_counted(family):
    model = tiny_model(family)
    if not compressible_caches(model):
        pytest.skip("no layer of it can be compressed")
    admission = Admission(10**12)
    room = admission.use(enable(model, 4), Settings(4))
    if family not in NOT_IN_BATCHES:
        with admission.admitted(604), admission.admitted(24):
            assert max(batches(model, [600, 20], [], 4)) <= room - admission.left


def cache_of(model, count: int) -> list:
    cache = make_prompt_cache(model)
    for start in range(0, count, 200):
        model(random_tokens(200, seed=start)[None], cache=cache)
    return cache


def filled(admission: Admission, cache: list) -> KeptPrompts:
    """KeptPrompts with as many copies of a cache as fit."""
    kept = KeptPrompts(admission, 10**6)
    for number in range(1 + admission.left // nbytes_of(cache)):
        kept.insert_cache("model", ScopedTokens([number] * 800, ""), cache)
    return kept


def nbytes_of(cache: list) -> int:
    return sum(layer.nbytes for layer in cache)


def test_kept_prompts_make_room_for_requests_and_come_back_to_it(model):
    admission, cache = admission_for(model, 3), cache_of(model, 800)
    kept, each = filled(admission, cache), nbytes_of(cache)
    with admission.admitted(TOKENS), admission.admitted(TOKENS):
        kept.trim_to(n_bytes=10**12)
        assert kept.nbytes <= admission.left < kept.nbytes + each
        # One of the two is answered, and its cache takes the room that the request had.
        for number in range(3):
            kept.insert_cache("model", ScopedTokens([7, number] * 400, ""), cache)
            assert kept.nbytes <= admission.left + each
    before = len(kept)
    kept.trim_to(n_bytes=10**12)
    assert len(kept) == before > 0


def test_a_kept_prompt_is_found_before_it_makes_room_for_the_request_that_goes_on_with_it(model):
    admission = admission_for(model, 1)
    kept = KeptPrompts(admission)
    kept.insert_cache("model", ScopedTokens([1] * 800, ""), cache_of(model, 800))
    with admission.admitted(TOKENS):
        cache, rest = kept.fetch_nearest_cache("model", ScopedTokens([*[1] * 800, 2], ""))
        kept.trim_to(n_bytes=10**12)
        assert len(kept) == 0 and rest == [2] and cache[0].offset == 800
