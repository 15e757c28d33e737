"""No cache is ever used with other weights, other settings or another scope."""

import copy
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import pytest
from adapters import adapter_folder
from conftest import variant
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from mlx_lm.tuner.utils import load_adapters, remove_lora_layers

from mlx_turboquant import disable, enable, load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_turboquant.lm import prompt_store
from mlx_turboquant.lm.prompt_store import PromptStore
from mlx_turboquant.lm.settings import Settings

SETTINGS = [
    Settings(2, uniform=True, window=16),
    Settings(key_bits=5, value_bits=3, window=16),
    Settings(key_bits=5, value_bits=3, window=32),
    Settings(key_bits=5, value_bits=3, window=16, sink_tokens=0),
]


class Owner(NamedTuple):
    """The model that computed a cache: its base, whether it is quantized, and its adapter."""

    base: int
    bits: int | None
    adapter: int | None


class Held(NamedTuple):
    owner: Owner
    settings: Settings
    tokens: list[int]
    cache: list


def text(seed: int, count: int) -> list[int]:
    """Random tokens; texts of one seed share a prefix, and all share the first 20 tokens."""
    shared, own = random.Random(0), random.Random(seed)
    return [shared.randrange(128) for _ in range(20)] + [own.randrange(128) for _ in range(count)]


def common(first: list[int], second: list[int]) -> int:
    return len(os.path.commonprefix([first, second]))


def next_logits(model, cache) -> mx.array:
    return model(mx.array([[5]]), cache=copy.deepcopy(cache))[0, -1]


class Identities(RuleBasedStateMachine):
    """Models whose weights change, and caches that are kept in memory, in files and in a store."""

    bases: list[nn.Module] = []
    adapters: list[Path] = []

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = PromptStore(self.folder / "store", delay=0)
        self.models: dict[tuple[int, int | None], nn.Module] = {}
        self.adapter_of: dict[tuple[int, int | None], int] = {}
        self.held: list[Held] = []
        self.files: list[tuple[Path, Held]] = []
        self.kept: list[tuple[str, Held]] = []
        self.uses(0, None)

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.folder)
        for model in self.models.values():
            disable(model)

    @property
    def owner(self) -> Owner:
        return Owner(*self.place, self.adapter_of.get(self.place))

    @rule(base=st.integers(0, 1), bits=st.sampled_from([None, 4, 8]))
    def uses(self, base, bits):
        self.place = (base, bits)
        if self.place not in self.models:
            self.models[self.place] = copy.deepcopy(self.bases[base])
            if bits is not None:
                nn.quantize(self.models[self.place], group_size=32, bits=bits)
        self.model = self.models[self.place]

    @rule(adapter=st.sampled_from([None, 0, 1]))
    def changes_the_adapter(self, adapter):
        if self.place in self.adapter_of:
            remove_lora_layers(self.model)
            del self.adapter_of[self.place]
        if adapter is not None:
            load_adapters(self.model, self.adapters[adapter])
            self.adapter_of[self.place] = adapter

    @rule(settings=st.sampled_from([None, *SETTINGS]))
    def is_enabled(self, settings):
        if settings is None:
            disable(self.model)
        else:
            enable(self.model, settings)

    @rule(settings=st.sampled_from(SETTINGS), seed=st.integers(1, 2), count=st.integers(0, 60))
    def reads(self, settings, seed, count):
        self.held.append(self.read(settings, text(seed, count)))

    def read(self, settings: Settings, tokens: list[int]) -> Held:
        cache = make_prompt_cache(self.model, settings)
        self.model(mx.array([tokens]), cache=cache)
        mx.eval([layer.state for layer in cache])
        return Held(self.owner, settings, tokens, cache)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def saves(self, data):
        held = data.draw(st.sampled_from(self.held))
        file = self.folder / f"{len(self.files)}.safetensors"
        if held.owner == self.owner:
            save_prompt_cache(file, held.cache, self.model)
            self.files.append((file, held))
        else:
            with pytest.raises(ValueError, match="weights of the model have changed"):
                save_prompt_cache(file, held.cache, self.model)
            assert not file.exists()

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def loads(self, data):
        file, held = data.draw(st.sampled_from(self.files))
        if held.owner != self.owner:
            with pytest.raises(ValueError, match="belongs to another model"):
                load_prompt_cache(file, self.model)
            return
        cache = load_prompt_cache(file, self.model)
        self.check(cache, held.settings, held.tokens)
        self.held.append(held._replace(cache=cache))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), scope=st.sampled_from(["", "a", "b"]))
    def keeps(self, data, scope):
        held = data.draw(st.sampled_from(self.held))
        if held.owner != self.owner:
            with pytest.raises(ValueError, match="weights of the model have changed"):
                self.store.keep(self.model, held.tokens, held.cache, scope=scope)
            return
        self.store.keep(self.model, held.tokens, held.cache, scope=scope)
        if data.draw(st.booleans()):  # before the prompt is written
            self.changes_the_adapter(data.draw(st.sampled_from([None, 0, 1])))
        self.store.close()
        self.store = PromptStore(self.folder / "store", delay=0)
        self.kept.append((scope, held))

    @rule(
        settings=st.sampled_from(SETTINGS),
        scope=st.sampled_from(["", "a", "b"]),
        seed=st.integers(1, 2),
        count=st.integers(1, 60),
    )
    def finds(self, settings, scope, seed, count):
        wanted = text(seed, count)
        own = [
            held.tokens
            for kept_scope, held in self.kept
            if (kept_scope, held.owner, held.settings) == (scope, self.owner, settings)
        ]
        best = max((min(common(tokens, wanted), len(wanted) - 1) for tokens in own), default=0)
        found = self.store.find(
            self.model, wanted, make_prompt_cache(self.model, settings), scope=scope
        )
        assert (found[1] if found else 0) == best
        if found:
            self.check(found[0], settings, wanted[:best])

    def check(self, cache: list, settings: Settings, tokens: list[int]) -> None:
        """Check that it continues like a new cache of this model with these settings."""
        expected = next_logits(self.model, self.read(settings, tokens).cache)
        # A longer text that was cut back has other block boundaries.
        difference = mx.abs(next_logits(self.model, cache) - expected).max()
        assert difference < 0.5 * mx.abs(expected).max()


@pytest.mark.parametrize("examples, steps", [(8, 20), pytest.param(60, 60, marks=pytest.mark.slow)])
def test_no_token_of_other_weights_settings_or_scopes_is_ever_used(
    random_model, tmp_path, monkeypatch, examples, steps
):
    monkeypatch.setattr(prompt_store, "LEAST_TOKENS", 16)
    monkeypatch.setattr(Identities, "bases", [random_model, variant(random_model)])
    folders = [adapter_folder(tmp_path / str(seed), random_model, seed) for seed in (1, 2)]
    monkeypatch.setattr(Identities, "adapters", folders)
    machine = Identities.TestCase
    machine.settings = hypothesis_settings(
        max_examples=examples, stateful_step_count=steps, deadline=None
    )
    machine().runTest()
