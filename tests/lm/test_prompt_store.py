"""The prompt store: the prompts that it finds are right, whatever happened to its files."""

import json
import logging
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import profile_of, variant
from damage import claiming_terabytes, emptied, truncated, with_flipped_bits
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from tiny_families import tiny_model

from mlx_turboquant import enable, load_prompt_cache, save_prompt_cache
from mlx_turboquant import make_prompt_cache as make_compressed_cache
from mlx_turboquant.lm import prompt_store
from mlx_turboquant.lm.prompt_store import FORMAT_VERSION, PromptStore, clear, reading, version_of
from mlx_turboquant.lm.report import flat_caches

LEAST = 16
# Bytes of an entry of the state machine, at most.
LARGEST = 200_000


@pytest.fixture(autouse=True)
def few_tokens_are_enough(monkeypatch):
    monkeypatch.setattr(prompt_store, "LEAST_TOKENS", LEAST)


@pytest.fixture
def model(random_model):
    return enable(variant(random_model), 4, window=16)


def text(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(128) for _ in range(count)]


def read(model, tokens: list[int], chunk: int = 64) -> list:
    cache = make_prompt_cache(model)
    for start in range(0, len(tokens), chunk):
        model(mx.array([tokens[start : start + chunk]]), cache=cache)
    return cache


def keep(folder: Path, model, *texts: list[int], size: int = 10**9) -> PromptStore:
    store = PromptStore(folder, size, delay=0)
    for tokens in texts:
        store.keep(model, tokens, read(model, tokens), "a model", "a text")
    store.close()
    return PromptStore(folder, size, delay=0)


def find(store: PromptStore, model, tokens: list[int], **options) -> tuple[list, int] | None:
    return store.find(model, tokens, make_prompt_cache(model), **options)


def next_logits(model, cache, token: int) -> mx.array:
    return model(mx.array([[token]]), cache=cache)[0, -1]


def test_a_prompt_is_found_by_a_store_that_did_not_keep_it(model, tmp_path):
    tokens = text(0, 100)
    cache, known = find(keep(tmp_path, model, tokens), model, [*tokens, 7])
    assert known == 100
    expected = next_logits(model, read(model, tokens), 7)
    assert mx.array_equal(next_logits(model, cache, 7), expected)


def test_what_a_text_begins_with_is_found_where_it_departs(model, tmp_path):
    tokens = text(0, 100)
    store = keep(tmp_path, model, tokens, text(1, 100))
    cache, known = find(store, model, [*tokens[:70], *text(2, 30)])
    assert known == 70 or tokens[70] == text(2, 30)[0]
    assert {layer.offset for layer in flat_caches(cache)} == {known}


def test_the_longest_beginning_is_found(model, tmp_path):
    common = text(0, 50)
    store = keep(tmp_path, model, common + text(1, 50), common + text(2, 50))
    assert find(store, model, common + text(2, 60))[1] == 100


def test_one_token_is_always_left_to_be_read(model, tmp_path):
    tokens = text(0, 100)
    assert find(keep(tmp_path, model, tokens), model, tokens)[1] == 99


def test_nothing_is_found_that_is_no_longer_than_what_is_there(model, tmp_path):
    tokens = text(0, 100)
    store = keep(tmp_path, model, tokens)
    assert find(store, model, [*tokens, 1], least=100) is None
    assert find(store, model, [*tokens, 1], least=99)[1] == 100


def test_other_models_and_settings_do_not_find_it(model, random_model, tmp_path):
    tokens = text(0, 100)
    store = keep(tmp_path, model, tokens)
    assert find(store, enable(variant(random_model), 3, window=16), [*tokens, 1]) is None
    assert find(store, enable(variant(random_model), 4, window=32), [*tokens, 1]) is None
    assert find(store, enable(variant(random_model, num_hidden_layers=1), 4), tokens) is None


SETTINGS = [
    {"bits": 4},
    {"bits": 2},
    {"key_bits": 4, "value_bits": 4},
    {"bits": 4, "window": 32},
    {"bits": 4, "sink_tokens": 8},
    {"bits": 4, "max_size": 512},
    {"bits": 4, "codec": "trellis"},
    {"bits": 4, "seed": 1},
]


def settings_of(cache: list) -> list[tuple]:
    names = ("key_bits", "value_bits", "window", "sink_tokens", "max_size", "seed", "codec")
    return [tuple(getattr(layer, name) for name in names) for layer in cache]


def test_every_cache_is_found_only_for_those_of_its_own_settings(random_model, tmp_path):
    tokens = text(0, 250)
    for settings in SETTINGS:
        store = PromptStore(tmp_path, delay=0)
        cache = make_compressed_cache(random_model, **settings)
        assert store.find(random_model, [*tokens, 1], cache) is None
        random_model(mx.array([tokens]), cache=cache)
        store.keep(random_model, tokens, cache)
        store.close()
    enable(random_model, 3)  # this does not affect caches that are made without it
    for settings in SETTINGS[:-2]:  # the last have another codec or seed than the model
        cache = make_compressed_cache(random_model, **settings)
        found, known = store.find(random_model, [*tokens, 1], cache)
        assert known == 250 and settings_of(found) == settings_of(cache)
    assert find(store, random_model, [*tokens, 1]) is None


def test_a_cache_with_tokens_tells_its_settings_as_well(random_model, tmp_path):
    tokens, cache = text(0, 250), make_compressed_cache(random_model, 2, max_size=200, window=32)
    random_model(mx.array([tokens]), cache=cache)
    assert cache[0].forgotten
    store = PromptStore(tmp_path, delay=0)
    store.keep(random_model, tokens, cache)
    store.close()
    found, known = store.find(random_model, [*tokens, 1], cache)
    assert known == found[0].offset == 250 and settings_of(found) == settings_of(cache)


def test_prompts_of_other_bases_are_not_found_and_can_still_be_loaded(random_model, tmp_path):
    tokens, settings = text(0, 100), {"window": 16}
    first, second = (profile_of(random_model, 0.1, 0.1, seed=seed) for seed in (0, 2))
    enable(random_model, 3, profile=first, **settings)
    store = keep(tmp_path, random_model, tokens)
    expected = next_logits(random_model, read(random_model, tokens), 7)
    enable(random_model, 3, profile=second, **settings)
    assert find(store, random_model, [*tokens, 7]) is None
    [entry] = store.entries()
    cache = load_prompt_cache(entry.file, random_model)
    assert mx.array_equal(next_logits(random_model, cache, 7), expected)
    # Found again by an equal profile, as another process loads it.
    enable(random_model, 3, profile=profile_of(random_model, 0.1, 0.1, seed=0), **settings)
    assert find(store, random_model, [*tokens, 7])[1] == 100


def test_other_scopes_do_not_find_it(model, tmp_path):
    tokens = text(0, 100)
    store = PromptStore(tmp_path, delay=0)
    store.keep(model, tokens, read(model, tokens), scope="alice")
    store.close()
    assert find(store, model, [*tokens, 1], scope="bob") is None
    assert find(store, model, [*tokens, 1]) is None
    assert find(store, model, [*tokens, 1], scope="alice")[1] == 100


def test_caches_that_cannot_be_trimmed_serve_only_what_they_are_a_beginning_of(tmp_path):
    model = enable(tiny_model("gemma3"), 4, window=16)
    tokens = text(0, 100)
    store = keep(tmp_path, model, tokens)
    assert find(store, model, [*tokens, 1])[1] == 100
    assert find(store, model, [*tokens[:70], *text(1, 40)]) is None


def test_a_recurrent_state_is_kept_and_found(tmp_path):
    model = enable(tiny_model("qwen3_next"), 4, window=16)
    tokens = text(0, 100)
    cache, known = find(keep(tmp_path, model, tokens), model, [*tokens, 1])
    assert known == 100
    assert mx.array_equal(next_logits(model, cache, 1), next_logits(model, read(model, tokens), 1))


class Words:
    """A stand-in for a tokenizer, whose text is for display only."""

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


@pytest.mark.parametrize("family, kept", [("qwen3_next", [128, 64]), ("llama", [190])])
def test_what_cannot_be_cut_back_is_kept_while_it_is_read_and_the_rest_at_the_end(
    tmp_path, monkeypatch, family, kept
):
    monkeypatch.setattr(prompt_store, "CHECKPOINT_TOKENS", 64)
    model, tokens = enable(tiny_model(family), 4, window=16), text(0, 190)
    store, caches = PromptStore(tmp_path, delay=0), make_prompt_cache(model)
    with reading(store, model, Words(), tokens, caches) as (cache, known, progress):
        assert cache is caches and known == 0
        steps = generate_step(
            mx.array(tokens),
            model,
            prompt_cache=cache,
            max_tokens=1,
            prefill_step_size=32,
            prompt_progress_callback=progress,
        )
        list(steps)
    store.close()
    assert [len(entry.tokens) for entry in PromptStore(tmp_path).entries()] == kept
    if family == "qwen3_next":
        found, known = find(store, model, [*tokens[:150], *text(1, 20)])
        assert known == 128
        expected = next_logits(model, read(model, tokens[:128], 32), 5)
        assert mx.array_equal(next_logits(model, found, 5), expected)


def test_what_is_read_after_a_find_is_kept_with_what_was_generated(model, tmp_path):
    tokens = text(0, 100)
    store = keep(tmp_path, model, tokens[:60])
    said, cache = list(tokens), make_prompt_cache(model)
    with reading(store, model, Words(), said, cache, name="a model") as (found, known, _):
        assert known == 60 and found is not cache
        model(mx.array([tokens[60:]]), cache=found)
        next_logits(model, found, 7)
        said.append(7)
    store.close()
    (entry,) = PromptStore(tmp_path).entries()
    assert entry.tokens.tolist() == [*tokens, 7] and entry.model.startswith("a model (")


@pytest.mark.parametrize("keeps_prompt", [True, False])
def test_a_prompt_is_kept_before_its_reply_only_if_asked(model, tmp_path, keeps_prompt):
    tokens, store = text(0, 100), PromptStore(tmp_path, delay=0)
    reader = reading(
        store, model, Words(), tokens, make_prompt_cache(model), keeps_prompt=keeps_prompt
    )
    with pytest.raises(KeyboardInterrupt):
        with reader as (cache, _, progress):
            model(mx.array([tokens]), cache=cache)
            progress(len(tokens), len(tokens))
            raise KeyboardInterrupt
    store.close()
    assert len(PromptStore(tmp_path).entries()) == keeps_prompt


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [-1]},
        {"tokens": "words"},
        {"tokens": [[1], [2, 3]]},
        {"messages": 5},
        "[" * 10**5,
    ],
)
def test_a_conversation_that_was_crafted_is_listed_as_unreadable(model, tmp_path, change):
    store = PromptStore(tmp_path)
    chat = {"tokens": [1], "model": "tiny", "messages": []}
    text = change if isinstance(change, str) else json.dumps(chat | change)
    metadata = {"0.chat": text, "0.identity": "a", "0.made_by": "b"}
    mx.save_safetensors(str(store.session_file("monday")), {"a": mx.zeros(1)}, metadata)
    [session] = store.sessions()
    assert session.beginning.startswith("cannot be read: ")


def test_what_ends_in_the_middle_of_a_step_is_not_kept(model, tmp_path):
    tokens, store = text(0, 100), PromptStore(tmp_path, delay=0)
    with pytest.raises(KeyboardInterrupt):
        with reading(store, model, Words(), tokens, read(model, tokens)):
            raise KeyboardInterrupt
    store.close()
    assert store.entries() == []


def test_a_closed_store_refuses_what_it_would_lose_and_still_finds(model, tmp_path):
    tokens = text(0, 100)
    store = PromptStore(tmp_path, delay=60)
    store.keep(model, tokens, read(model, tokens))
    store.close()
    with pytest.raises(ValueError, match="is closed: open the store again to keep prompts"):
        store.keep(model, text(1, 100), read(model, text(1, 100)))
    assert find(store, model, [*tokens, 1])[1] == 100
    store.close()
    assert [entry.tokens.tolist() for entry in store.entries()] == [tokens]


def test_files_of_others_in_its_folder_are_left_alone(model, tmp_path):
    weights = tmp_path / "model.safetensors"
    mx.save_safetensors(str(weights), {"weight": mx.ones(4)})
    store = keep(tmp_path, model, text(0, 100))
    assert len(store.entries()) == 1 and find(store, model, text(1, 100)) is None
    assert list(store.check()) == [True]
    assert clear(tmp_path) == 1 and store.entries() == []
    assert mx.array_equal(mx.load(str(weights))["weight"], mx.ones(4))


def test_few_tokens_are_not_kept(model, tmp_path):
    assert keep(tmp_path, model, text(0, LEAST - 1)).entries() == []


def test_a_longer_text_takes_the_place_of_its_beginning(model, tmp_path):
    tokens = text(0, 100)
    keep(tmp_path, model, tokens[:60])
    store = keep(tmp_path, model, tokens)
    assert [len(entry.tokens) for entry in store.entries()] == [100]


def test_what_is_there_is_not_written_again(model, tmp_path):
    tokens = text(0, 100)
    keep(tmp_path, model, tokens)
    store = PromptStore(tmp_path, delay=0)
    for count in (100, 60):
        store.keep(model, tokens[:count], read(model, tokens[:count]))
    store.close()
    assert store.statistics()["written_bytes"] == 0


def test_a_cache_that_a_longer_one_follows_at_once_is_never_written(model, tmp_path):
    tokens = text(0, 100)
    store = PromptStore(tmp_path, delay=60)
    for count in (50, 75, 100):
        store.keep(model, tokens[:count], read(model, tokens[:count]))
    store.close()
    assert store.statistics()["written"] == 1


def test_the_cache_may_be_used_on_while_it_is_written(model, tmp_path):
    tokens = text(0, 100)
    cache = read(model, tokens)
    store = PromptStore(tmp_path, delay=60)
    store.keep(model, tokens, cache)
    for token in text(1, 50):
        next_logits(model, cache, token)
    store.close()
    found, _ = find(PromptStore(tmp_path), model, [*tokens, 7])
    expected = next_logits(model, read(model, tokens), 7)
    assert mx.array_equal(next_logits(model, found, 7), expected)


def test_of_a_cache_with_more_tokens_than_the_text_the_text_is_kept(model, tmp_path):
    tokens = text(0, 100)
    store = PromptStore(tmp_path, delay=0)
    store.keep(model, tokens[:80], read(model, tokens))
    store.close()
    assert find(store, model, [*tokens[:80], 1])[1] == 80


def test_the_least_recently_used_go_first(model, tmp_path):
    texts = [text(seed, 100) for seed in range(3)]
    store = keep(tmp_path, model, texts[0])
    size = store.entries()[0].nbytes
    keep(tmp_path, model, texts[1])
    time.sleep(0.02)  # longer than a tick of the file system
    find(store, model, [*texts[0], 1])
    store = keep(tmp_path, model, texts[2], size=int(2.5 * size))
    assert find(store, model, [*texts[1], 1]) is None
    assert find(store, model, [*texts[0], 1]) and find(store, model, [*texts[2], 1])


def test_what_alone_is_larger_than_the_limit_is_not_written(model, tmp_path):
    assert keep(tmp_path, model, text(0, 100), size=1000).entries() == []


def test_only_the_owner_may_ever_read_what_is_kept(model, tmp_path, monkeypatch):
    modes, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: [modes.append(old.stat().st_mode), replace(old, new)]
    )
    store = keep(tmp_path / "store", model, text(0, 100))
    assert store.folder.stat().st_mode & 0o077 == 0
    cache = make_prompt_cache(model)
    save_prompt_cache(tmp_path / "chat", cache, model, {"chat": "{}"})
    assert [mode & 0o077 for mode in modes[-2:]] == [0, 0]
    save_prompt_cache(tmp_path / "prompt", cache, model)
    assert modes[-1] & 0o077


def with_another_token(contents: bytes) -> bytes:
    """Change a token; the file stays well-formed."""
    place = contents.index(b'"0.tokens":"') + 20
    return contents[:place] + (b"B" if contents[place] != 66 else b"C") + contents[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [truncated, with_flipped_bits, with_another_token, claiming_terabytes, emptied],
)
def test_a_damaged_entry_is_removed_with_a_warning_and_read_again(model, tmp_path, damage, caplog):
    tokens = text(0, 100)
    store = keep(tmp_path, model, tokens)
    file = store.entries()[0].file
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING, logger="mlx_turboquant"):
        found = find(store, model, [*tokens, 1]) or find(PromptStore(tmp_path), model, tokens)
    assert found is None
    assert not file.exists() and "is removed from the store" in caplog.text


def test_files_that_change_places_between_models_are_told_apart(model, random_model, tmp_path):
    other = enable(variant(random_model, num_hidden_layers=1), 4, window=16)
    tokens = text(0, 100)
    keep(tmp_path, model, tokens)
    store = keep(tmp_path, other, tokens)
    first, second = (entry.file for entry in store.entries())
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    for each in (model, other):
        found = find(PromptStore(tmp_path), each, [*tokens, 1])
        assert found is None or len(found[0]) == len(each.layers)


def test_two_stores_share_a_folder(model, tmp_path):
    first, second = (PromptStore(tmp_path, delay=0) for _ in range(2))
    texts = [text(seed, 100) for seed in range(6)]
    for place, tokens in enumerate(texts):
        (first, second)[place % 2].keep(model, tokens, read(model, tokens))
    first.close(), second.close()
    for tokens in texts:
        assert find(first, model, [*tokens, 1])[1] == find(second, model, [*tokens, 1])[1] == 100


def test_an_entry_that_another_process_removes_is_read_again(model, tmp_path):
    tokens = text(0, 100)
    store = keep(tmp_path, model, tokens)
    store.entries()
    PromptStore(tmp_path).prune(0)
    assert find(store, model, [*tokens, 1]) is None


def test_a_disk_without_space_costs_a_warning(model, tmp_path, monkeypatch, caplog):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(prompt_store, "write_prompt_cache", full)
    assert keep(tmp_path, model, text(0, 100)).entries() == []
    assert "is not kept: No space left on device" in caplog.text


def test_a_clock_that_was_set_back_loses_nothing(model, tmp_path, monkeypatch):
    tokens = text(0, 100)
    keep(tmp_path, model, tokens)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    store = keep(tmp_path, model, text(1, 100))
    assert find(store, model, [*tokens, 1])[1] == 100


@pytest.mark.parametrize("contents", ["", "{", '{"format": "old"}'])
def test_what_a_store_says_of_itself_is_written_again_if_it_is_lost(model, tmp_path, contents):
    tokens = text(0, 100)
    keep(tmp_path, model, tokens)
    (tmp_path / "store.json").write_text(contents)
    assert find(PromptStore(tmp_path), model, [*tokens, 1])[1] == 100


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_a_store_of_another_version_is_refused_until_it_is_cleared(model, tmp_path, version):
    tokens = text(0, 100)
    keep(tmp_path, model, tokens)
    (tmp_path / "store.json").write_text(json.dumps({"format": version}))
    own = f"version {version}, this is version {FORMAT_VERSION}: use another folder, or clear it"
    with pytest.raises(ValueError, match=own):
        PromptStore(tmp_path)
    assert clear(tmp_path) == 1 and PromptStore(tmp_path).entries() == []


def test_a_folder_that_is_a_file_and_a_size_of_nothing_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder: give the folder"):
        PromptStore(tmp_path / "file")
    with pytest.raises(ValueError, match="A store of 0 bytes holds nothing"):
        PromptStore(tmp_path / "store", 0)


def test_clearing_leaves_what_is_not_of_the_store(model, tmp_path):
    keep(tmp_path, model, text(0, 100))
    sessions = tmp_path / "sessions"
    sessions.mkdir()
    others = [tmp_path / "mine.safetensors", sessions / "book.safetensors", sessions / "notes.md"]
    for file in others[:2]:
        mx.save_safetensors(str(file), {"a": mx.ones(3)})
    others[2].write_text("of somebody")
    assert clear(tmp_path) == 1
    assert all(file.exists() for file in others)


def test_a_folder_of_another_program_is_no_store(tmp_path):
    (tmp_path / "store.json").write_text('{"format": 1}')
    assert version_of(tmp_path) is None


def test_an_entry_that_cannot_be_looked_at_is_passed_over(model, tmp_path, caplog):
    tokens = text(0, 100)
    store = keep(tmp_path, model, tokens)
    loop = tmp_path / f"{'0' * 32}.safetensors"
    loop.symlink_to(loop)
    assert find(store, model, [*tokens, 1])[1] == 100
    assert "cannot be used" in caplog.text and loop.is_symlink()


class Store(RuleBasedStateMachine):
    """Random operations, compared with a plain list of what was kept."""

    model = None  # shared by all runs: making one takes longer than a run

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.kept: list[list[int]] = []
        self.size = 10**9
        self.store = PromptStore(self.folder, self.size, delay=0)

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.folder)

    def reopened(self) -> None:
        self.store.close()
        self.store = PromptStore(self.folder, self.size, delay=0)

    @rule(seed=st.integers(0, 3), common=st.integers(0, 60), count=st.integers(1, 90))
    def keeps(self, seed, common, count):
        tokens = (text(0, common) + text(seed + 1, count))[:100]
        self.store.keep(self.model, tokens, read(self.model, tokens))
        self.reopened()
        if len(tokens) >= LEAST:
            self.kept.append(tokens)
        if self.store.statistics()["bytes"] > self.size - LARGEST:
            self.forget_what_went()  # the store may have made room

    @rule(seed=st.integers(0, 3), common=st.integers(0, 60), count=st.integers(1, 90))
    def finds(self, seed, common, count):
        wanted = text(0, common) + text(seed + 1, count)
        best = max((_alike(tokens, wanted) for tokens in self.kept), default=0)
        best = min(best, len(wanted) - 1)
        found = find(self.store, self.model, wanted)
        assert (found[1] if found else 0) == best
        if found:
            expected = next_logits(self.model, read(self.model, wanted[:best]), 5)
            # A longer text that was cut back has other block boundaries.
            difference = mx.abs(next_logits(self.model, found[0], 5) - expected).max()
            assert difference < 0.25 * mx.abs(expected).max()

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def loses_a_file(self, data):
        entries = self.store.entries()
        if entries:
            entry = data.draw(st.sampled_from(entries))
            contents = bytearray(entry.file.read_bytes())
            contents[data.draw(st.integers(0, len(contents) - 1))] ^= 1 << data.draw(
                st.integers(0, 7)
            )
            entry.file.write_bytes(contents)
            lost = entry.tokens.tolist()
            self.kept = [each for each in self.kept if _alike(each, lost) < len(each)]
            find(self.store, self.model, [*lost, 1])  # this removes it
            self.reopened()

    @rule(size=st.sampled_from([2 * LARGEST, 4 * LARGEST, 10**9]))
    def is_limited(self, size):
        self.size = size
        self.reopened()
        self.store.prune(size)
        self.forget_what_went()

    @rule(keep_bytes=st.integers(0, 400_000))
    def is_pruned(self, keep_bytes):
        self.store.prune(keep_bytes)
        assert self.store.statistics()["bytes"] <= keep_bytes
        self.forget_what_went()

    def forget_what_went(self):
        left = [entry.tokens.tolist() for entry in self.store.entries()]
        self.kept = [
            tokens for tokens in self.kept if any(_alike(tokens, x) == len(tokens) for x in left)
        ]

    @invariant()
    def it_stays_within_its_size(self):
        assert self.store.statistics()["bytes"] <= self.size

    @invariant()
    def nothing_that_was_written_is_lost(self):
        there = [entry.tokens.tolist() for entry in self.store.entries()]
        for tokens in self.kept:
            assert any(_alike(tokens, each) == len(tokens) for each in there)


def _alike(first: list[int], second: list[int]) -> int:
    count = 0
    for a, b in zip(first, second):
        if a != b:
            break
        count += 1
    return count


@pytest.mark.parametrize(
    "runs, steps", [(8, 12), pytest.param(200, 50, marks=pytest.mark.slow)], ids=["few", "10 000"]
)
def test_any_operations_leave_a_store_that_tells_the_truth(model, monkeypatch, runs, steps):
    monkeypatch.setattr(Store, "model", model)
    machine = Store.TestCase
    machine.settings = hypothesis_settings(
        max_examples=runs, stateful_step_count=steps, deadline=None
    )
    machine("runTest").runTest()
