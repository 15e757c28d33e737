"""Shared models and settings of the tests."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Set before MLX reads it: plain float32 on a GPU too, for the references of the kernels.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import executor_stamp
import hypothesis
import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models import llama
from platformdirs import user_cache_path
from tokens import basis_of, random_tokens

from mlx_turboquant import disable
from mlx_turboquant.lm.allocation import Layer, chosen_sides
from mlx_turboquant.lm.compressible import compressible_caches
from mlx_turboquant.lm.loading import prepare_for_device
from mlx_turboquant.lm.profile import Profile, fingerprint

# Keep the user's profiles out of the tests, and those of the tests away from the user.
REAL_MODELS = user_cache_path("mlx_turboquant") / "models"
_cache_folder = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = _cache_folder.name

# Every run draws new examples, except in CI; no test depends on the machine's speed.
for name, examples in (("tests", 25), ("slow", 100)):
    hypothesis.settings.register_profile(
        name, max_examples=examples, deadline=None, derandomize="CI" in os.environ
    )

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY / "examples"), str(REPOSITORY / "examples" / "studies")]


def pytest_configure(config):
    slow = config.option.markexpr == "slow"
    hypothesis.settings.load_profile("slow" if slow else "tests")
    config.pluginmanager.register(executor_stamp)


@pytest.hookimpl(tryfirst=True)  # before the marks choose
def pytest_collection_modifyitems(config, items):
    """With ``-m slow`` the property tests run too, with the number of examples of that profile."""
    if config.option.markexpr == "slow":
        for item in items:
            if hypothesis.is_hypothesis_test(getattr(item, "obj", None)):
                item.add_marker("slow")


PROMPT = random_tokens(200, seed=3)


def logits(model, cache, chunks=(150, 40, 1, 1, 8)) -> mx.array:
    """Logits of the last tokens of ``PROMPT``, prefilled in chunks."""
    start, rows = 0, []
    for size in chunks:
        rows.append(model(PROMPT[None, start : start + size], cache=cache)[0])
        start += size
    return mx.concatenate(rows[1:])


def variant(model, **arguments) -> llama.Model:
    """A model like ``model`` with other arguments and other random weights."""
    return llama.Model(llama.ModelArgs(**{**vars(model.args), **arguments}))


def profile_of(model, *weights: float, seed: int | None = None) -> Profile:
    """A profile in which keys of each layer have this weight, and values a tenth of it.

    With a ``seed`` it has bases with random axes.
    """
    keys = tuple({2: (weight,), 3: (0.3 * weight,)} for weight in weights)
    values = tuple({1: (0.1 * weight,), 2: (0.03 * weight,)} for weight in weights)
    bases = (
        ()
        if seed is None
        else (
            basis_of(place.keys.dim, place.keys.heads, 2, seed + i)
            for i, place in enumerate(compressible_caches(model))
        )
    )
    return Profile(fingerprint(model), ("text",), 24, keys, values, tuple(bases))


def mean_bits(layers: list[Layer], bits: list[tuple[int, int]]) -> float:
    """The mean number of bits per compressed value, from the bytes of the codes."""
    sides = [(side.vectors, b) for side, b in chosen_sides(layers, bits)]
    nbytes = sum(vectors.nbytes(b) for vectors, b in sides)
    return 8 * nbytes / sum(vectors.heads * vectors.dim for vectors, _ in sides)


def peak_of_growth(caches, rows: int, chunks: tuple[int, ...]) -> float:
    """Peak memory, relative to held memory, while the packed buffers of all layers grow."""

    def read(count: int) -> None:
        for cache in caches:
            new = mx.random.normal((rows, 1, count, 128))
            mx.eval(new)
            cache.update_and_fetch(new, new)
        mx.eval([cache.state for cache in caches])

    read(4096 + caches[0].sink_tokens)
    before, capacity = mx.get_active_memory(), caches[0]._packed.capacity
    mx.reset_peak_memory()
    for count in chunks:
        read(count)
    assert caches[0]._packed.capacity > capacity
    return (mx.get_peak_memory() - before) / sum(cache.nbytes for cache in caches)


@pytest.fixture
def random_model() -> Iterator[llama.Model]:
    """A small Llama with random weights: two layers, four query heads on two KV heads of 64."""
    mx.random.seed(0)
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rms_norm_eps=1e-5,
        vocab_size=128,
    )
    model = llama.Model(arguments)
    mx.eval(model.parameters())
    yield model
    disable(model)


@pytest.fixture(scope="session")
def loaded_tiny_lm():
    model, tokenizer = mlx_lm.load(str(REPOSITORY / "examples" / "tiny-lm"))
    return prepare_for_device(model), tokenizer


@pytest.fixture
def tiny_lm(loaded_tiny_lm):
    """The bundled model and its tokenizer."""
    yield loaded_tiny_lm
    disable(loaded_tiny_lm[0])
