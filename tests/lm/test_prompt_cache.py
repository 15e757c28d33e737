"""Prompt caches are saved as they are, and refused if they are damaged or do not fit."""

import copy
import json
import pickle
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import PROMPT, REPOSITORY, logits, profile_of, variant
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache
from safetensors.numpy import load_file, save_file
from tiny_families import FAMILIES, tiny_model
from tokens import basis_of, normal, random_tokens

from mlx_turboquant import (
    TurboQuantKVCache,
    disable,
    enable,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_turboquant.lm import prompt_cache
from mlx_turboquant.lm.prompt_cache import CODEC_VERSION, FORMAT_VERSION
from mlx_turboquant.lm.report import flat_caches
from mlx_turboquant.stored_arrays import room_for_checksums, seal

MEGABYTE = 1 << 20


def states(cache) -> list:
    return [part for _, part in tree_flatten([layer.state for layer in cache])]


def assert_same(cache, expected) -> None:
    """Check for the same numbers and the same bytes."""
    for a, b in zip(states(cache), states(expected), strict=True):
        if isinstance(a, mx.array):
            assert a.dtype == b.dtype and mx.array_equal(a, b, equal_nan=True)
        else:
            assert a == b


@pytest.fixture
def saved(random_model, tmp_path) -> Path:
    cache = make_prompt_cache(random_model, 4, window=16)
    logits(random_model, cache)
    return save_prompt_cache(tmp_path / "cache", cache, random_model)


@pytest.mark.parametrize("bits", [3, 8])
def test_a_saved_cache_goes_on_with_the_same_bytes_and_logits(random_model, tmp_path, bits):
    cache = make_prompt_cache(random_model, bits, window=16)
    logits(random_model, cache)
    file = save_prompt_cache(tmp_path / "cache", cache, random_model, {"note": "hello"})
    assert file == tmp_path / "cache.safetensors"
    loaded, metadata = load_prompt_cache(tmp_path / "cache", random_model, return_metadata=True)
    assert metadata["note"] == "hello"
    assert_same(loaded, cache)
    assert mx.array_equal(logits(random_model, loaded), logits(random_model, cache))
    assert_same(loaded, cache)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek_v32"])
def test_the_caches_of_every_family_are_the_same_after_loading(family, tmp_path):
    """Mixed lists, lists of lists, shared layers and latent vectors among them."""
    model = tiny_model(family)
    cache = make_prompt_cache(model, 4, window=16)
    model(PROMPT[None, :90], cache=cache)
    file = save_prompt_cache(tmp_path / "cache", cache, model)
    loaded = load_prompt_cache(file, model)
    assert_same(loaded, cache)
    token = PROMPT[None, :1]
    for _ in range(8):
        expected, output = model(token, cache=cache), model(token, cache=loaded)
        assert mx.array_equal(output, expected)
        token = expected[:, -1:].argmax(axis=-1)
    assert_same(loaded, cache)
    disable(model)


@pytest.mark.parametrize("tokens", [1, 3, 5, 36, 37, 68, 150, 199, 500])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "longcat_flash"])
def test_the_beginning_of_a_cache_is_loaded_as_if_it_had_been_trimmed(family, tmp_path, tokens):
    model = tiny_model(family)
    cache = make_prompt_cache(model, 3.5, window=16)
    model(PROMPT[None, :199], cache=cache)
    file = save_prompt_cache(tmp_path / "cache", cache, model)
    loaded = load_prompt_cache(file, model, tokens=tokens)
    mlx_lm_cache.trim_prompt_cache(cache, max(199 - tokens, 0))
    mx.eval(model(PROMPT[None, 199:], cache=cache), model(PROMPT[None, 199:], cache=loaded))
    assert_same(loaded, cache)
    disable(model)


@pytest.mark.parametrize("tokens", [None, 3, 68, 150])
def test_a_cache_brings_its_bases_whatever_the_profile_is_now(random_model, tmp_path, tokens):
    first, second = (profile_of(random_model, 0.1, 0.1, seed=seed) for seed in (0, 2))
    cache = make_prompt_cache(random_model, 3, window=16, profile=first)
    logits(random_model, cache)
    file = save_prompt_cache(tmp_path / "cache", cache, random_model)
    enable(random_model, 3, window=16, profile=second)
    loaded = load_prompt_cache(file, random_model, tokens=tokens)
    assert [layer.settings.basis for layer in loaded] == list(first.bases)
    mlx_lm_cache.trim_prompt_cache(cache, 200 - tokens if tokens else 0)
    assert_same(loaded, cache)
    assert mx.array_equal(logits(random_model, loaded), logits(random_model, cache))


def test_the_beginning_of_a_cache_takes_the_memory_of_its_tokens(random_model, tmp_path):
    cache = make_prompt_cache(random_model, 4, window=16)
    for _ in range(20):
        logits(random_model, cache)
    file = save_prompt_cache(tmp_path / "cache", cache, random_model)
    held = sum(layer.nbytes for layer in cache)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    beginning = load_prompt_cache(file, tokens=400)
    assert beginning[0].offset == 400
    assert mx.get_peak_memory() - before < held / 4


def test_what_cannot_be_cut_back_has_no_beginning(tmp_path):
    model = tiny_model("qwen3_next")
    cache = make_prompt_cache(model, 4, window=16)
    model(PROMPT[None], cache=cache)
    file = save_prompt_cache(tmp_path / "cache", cache, model)
    with pytest.raises(ValueError, match="cannot be cut back to 50 tokens: load all of it"):
        load_prompt_cache(file, model, tokens=50)
    with pytest.raises(ValueError, match="The first 0 tokens cannot be loaded alone: load 1"):
        load_prompt_cache(file, model, tokens=0)
    disable(model)


def test_a_limited_cache_goes_on_forgetting(random_model, tmp_path):
    cache = make_prompt_cache(random_model, 4, window=16, max_size=124)
    logits(random_model, cache)
    assert cache[0].forgotten > 0
    loaded = load_prompt_cache(save_prompt_cache(tmp_path / "c", cache, random_model))
    assert mx.array_equal(logits(random_model, loaded), logits(random_model, cache))
    assert_same(loaded, cache)


@pytest.mark.parametrize("trimmed", [0, 10, 80, 200])
def test_a_trimmed_cache_and_an_empty_one_are_the_same_after_loading(
    random_model, tmp_path, trimmed
):
    cache = make_prompt_cache(random_model, 4, window=16)
    if trimmed:
        logits(random_model, cache)
        mlx_lm_cache.trim_prompt_cache(cache, trimmed)
    loaded = load_prompt_cache(save_prompt_cache(tmp_path / "c", cache, random_model), random_model)
    assert_same(loaded, cache)
    assert mx.array_equal(logits(random_model, loaded), logits(random_model, cache))


def test_a_file_is_as_small_as_what_the_cache_holds(random_model, saved):
    held = sum(x.nbytes for x in states(load_prompt_cache(saved)) if isinstance(x, mx.array))
    assert held < saved.stat().st_size < held + 5000  # the header


def test_mlx_lm_saves_and_loads_it_with_its_own_functions(random_model, saved, tmp_path):
    cache = load_prompt_cache(saved)
    loaded = mlx_lm_cache.load_prompt_cache(str(saved))
    assert [type(layer) for layer in loaded] == [TurboQuantKVCache] * 2
    assert_same(loaded, cache)
    file = tmp_path / "stock.safetensors"
    mlx_lm_cache.save_prompt_cache(str(file), cache)
    assert_same(mlx_lm_cache.load_prompt_cache(str(file)), cache)
    with pytest.raises(ValueError, match="not a prompt cache of mlx_turboquant"):
        load_prompt_cache(file)  # without a version the meaning of its codes is unknown


def test_a_cache_of_another_model_is_refused(random_model, saved):
    for other in (variant(random_model), variant(random_model, rope_theta=5.0)):
        other.update(random_model.parameters() if other.args.rope_theta == 5.0 else {})
        norm = other.model.norm
        norm.weight = norm.weight + (other.args.rope_theta != 5.0)
        with pytest.raises(ValueError, match="belongs to another model"):
            load_prompt_cache(saved, other)


@pytest.mark.parametrize("name, version", [("CODEC", CODEC_VERSION), ("FORMAT", FORMAT_VERSION)])
def test_a_cache_of_another_version_is_refused(random_model, saved, monkeypatch, name, version):
    monkeypatch.setattr(prompt_cache, f"{name}_VERSION", "99")
    expected = f"{name.lower()} version {version}, this is version 99"
    with pytest.raises(ValueError, match=expected):
        load_prompt_cache(saved, random_model)


def test_a_cache_of_another_seed_than_the_enabled_one_is_refused(random_model, saved):
    bits = load_prompt_cache(saved)[0].key_bits
    assert load_prompt_cache(saved, enable(random_model, 3))[0].key_bits == bits
    enable(random_model, 4, seed=7)
    with pytest.raises(ValueError, match="saved with seed 0, the model is enabled with seed 7"):
        load_prompt_cache(saved, random_model)


@pytest.mark.parametrize("tokens", [None, 100])
def test_a_cache_of_another_codec_than_the_enabled_one_is_refused(random_model, tmp_path, tokens):
    cache = make_prompt_cache(random_model, key_bits=2, value_bits=1, window=16, codec="trellis")
    logits(random_model, cache)
    file = save_prompt_cache(tmp_path / "cache", cache, random_model)
    loaded = load_prompt_cache(file, random_model, tokens=tokens)
    assert [layer.codec for layer in loaded] == ["trellis"] * 2
    mlx_lm_cache.trim_prompt_cache(cache, 200 - tokens if tokens else 0)
    assert_same(loaded, cache)
    assert mx.array_equal(logits(random_model, loaded), logits(random_model, cache))
    load_prompt_cache(file, enable(random_model, 3, codec="trellis"), tokens=tokens)
    enable(random_model, 3)
    expected = "codec trellis, the model is enabled with codec scalar: enable it with the codec of"
    with pytest.raises(ValueError, match=expected):
        load_prompt_cache(file, random_model, tokens=tokens)


def test_foreign_files_are_refused(random_model, tmp_path):
    weights, text = tmp_path / "weights.safetensors", tmp_path / "text.safetensors"
    save_file({"weight": np.zeros(3, np.float32)}, weights)
    text.write_text("not a safetensors file, but long enough to hold a header length")
    plain = tmp_path / "plain.safetensors"
    mlx_lm_cache.save_prompt_cache(str(plain), [KVCache()])
    for file, message in (
        (weights, "not a prompt cache of mlx_turboquant"),
        (text, "not a complete safetensors file"),
        (plain, "not a prompt cache of mlx_turboquant"),
    ):
        with pytest.raises(ValueError, match=message):
            load_prompt_cache(file, random_model)
    with pytest.raises(ValueError, match="does not exist"):
        load_prompt_cache(tmp_path / "missing.safetensors", random_model)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_refused(random_model, saved, kept):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(kept * len(data)) if kept == 0.5 else kept])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load_prompt_cache(saved, random_model)


def test_a_file_with_more_behind_its_end_is_refused(random_model, saved):
    saved.write_bytes(saved.read_bytes() + bytes(8))
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load_prompt_cache(saved, random_model)


def test_any_changed_bit_is_found(random_model, saved):
    data = saved.read_bytes()
    for place in random.Random(0).sample(range(len(data)), 200):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        saved.write_bytes(changed)
        with pytest.raises(ValueError):
            load_prompt_cache(saved, random_model)


class File:
    """The parts of a prompt-cache file, which can be joined again with valid checksums."""

    def __init__(self, file: Path):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        self.header, self.data = json.loads(content[8:start]), content[start:]

    def write(self, file: Path) -> None:
        metadata = self.header.setdefault("__metadata__", {})
        if has_checksums := "0.checksums" in metadata:
            metadata["0.checksums"] = room_for_checksums(len(self.data))
        text = json.dumps(self.header, separators=(",", ":")).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + self.data)
        if has_checksums:
            seal(file)

    def array(self, name: str) -> bytearray:
        start, stop = self.header[name]["data_offsets"]
        return bytearray(self.data[start:stop])

    def set_array(self, name: str, content: bytes) -> None:
        start, stop = self.header[name]["data_offsets"]
        assert len(content) == stop - start
        self.data = self.data[:start] + bytes(content) + self.data[stop:]


def _terabytes(file: File) -> None:
    file.header["0.13"]["shape"] = [1, 2, 2**20, 2**20, 32]


def _terabytes_of_nothing(file: File) -> None:
    file.header["0.13"] = {"dtype": "U32", "shape": [0, 2**40], "data_offsets": [0, 0]}


def _overlapping(file: File) -> None:
    file.header["0.16"]["data_offsets"] = file.header["0.13"]["data_offsets"]


def _wrong_dtype(file: File) -> None:
    file.header["0.13"]["dtype"] = "F32"


def _wrong_words(file: File) -> None:
    *heads, words, lanes = file.header["0.13"]["shape"]
    file.header["0.13"]["shape"] = [*heads, 2 * words, lanes // 2]


def _negative(name: str) -> Callable[[File], None]:
    return lambda file: file.set_array(name, np.int32(-32).tobytes())


def _billions(name: str) -> Callable[[File], None]:
    return lambda file: file.set_array(name, np.int32(2**30).tobytes())


def _missing_array(file: File) -> None:
    del file.header["0.13"]


def _missing_metadata(name: str) -> Callable[[File], None]:
    return lambda file: file.header["__metadata__"].pop(name)


def _a_class_that_is_none(file: File) -> None:
    file.header["__metadata__"]["1.0"] = "TemporaryDirectory"


def _one_layer_more_than_classes(file: File) -> None:
    del file.header["__metadata__"]["1.1"]


def _a_list_of_billions(file: File) -> None:
    file.header["0.4000000000"] = file.header.pop("0.13")


def _a_scalar_that_is_an_array(file: File) -> None:
    file.header["__metadata__"]["2.1.0"] = "0.13"


@pytest.mark.parametrize(
    "change",
    [
        *(_terabytes, _terabytes_of_nothing, _overlapping, _wrong_dtype, _wrong_words),
        *(_negative(name) for name in ("0.0", "0.2", "0.5", "0.8", "0.9", "0.10")),
        *(_billions(name) for name in ("0.0", "0.3", "0.8", "0.9", "0.10")),
        _missing_array,
        *(_missing_metadata(name) for name in ("0.format", "0.seed", "0.checksums")),
        *(_missing_metadata(name) for name in ("1.1", "2.1.1")),
        *(_a_class_that_is_none, _one_layer_more_than_classes, _a_list_of_billions),
        _a_scalar_that_is_an_array,
    ],
)
def test_a_file_made_to_harm_is_refused_before_anything_large_is_there(saved, change):
    file = File(saved)
    change(file)
    file.write(saved)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with pytest.raises(ValueError, match="cache.safetensors (is|was)"):
        load_prompt_cache(saved)
    assert mx.get_peak_memory() - before < MEGABYTE


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe{}",
        b'{"0.0":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"0.0":{}}',
        b'{"__metadata__":{"0.codec":"1"},"__metadata__":{"0.codec":"1"}}',
        b'{"__metadata__":[]}',
        b"[]",
        b"",
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path, header):
    file = tmp_path / "cache.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load_prompt_cache(file)


def test_a_header_of_terabytes_is_refused(tmp_path):
    file = tmp_path / "cache.safetensors"
    with file.open("wb") as content:
        content.write((2**40).to_bytes(8, "little"))
        content.truncate(2**41)  # takes no space on the disk
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load_prompt_cache(file)


def small_mixed_caches() -> list:
    """40 tokens in caches of all kinds, one of them with a basis, and one recurrent state."""
    x, wide = normal((1, 1, 40, 16)), normal((1, 1, 40, 32))
    rotating, plain, arrays = RotatingKVCache(8, keep=2), KVCache(), ArraysCache(2)
    compressed = [TurboQuantKVCache(4, 2, window=w, sink_tokens=1) for w in (0, 64)]
    for cache in (rotating, plain, *compressed):
        cache.update_and_fetch(x, x)
    based = TurboQuantKVCache(3, 2, window=0, sink_tokens=1, basis=basis_of(32, 1, 2))
    based.update_and_fetch(wide, wide)
    plain.keys, plain.values = plain.keys[:, :, :40], plain.values[:, :, :40]
    arrays[0] = x[:, 0]
    return [compressed[0], rotating, CacheList(compressed[1], arrays), plain, based]


def assert_usable(caches) -> None:
    """Check that a compressed cache takes more tokens and returns all of them."""
    for layer in flat_caches(caches):
        assert layer.nbytes >= 0 and layer.size() >= 0
        if isinstance(layer, TurboQuantKVCache):
            keys = mx.ones((1, 1, 40, 32 if layer.settings.basis else 16), mx.float32)
            if not layer.empty():
                keys = mx.ones((*layer.keys.shape[:2], 40, layer.keys.shape[3]))
            fetched = layer.update_and_fetch(keys, keys)
            mx.eval(fetched)
            assert all(x.shape[2] == layer.size() for x in fetched)


def changed_header(file: File, choose: random.Random) -> None:
    """Make one change to the header, as a faulty or malicious tool might."""
    name = choose.choice(list(file.header))
    entry, metadata = file.header[name], file.header.get("__metadata__", {"": ""})
    change = choose.randrange(6)
    if change == 0:
        other = choose.choice(list(file.header))
        file.header[name], file.header[other] = file.header[other], entry
    elif change == 1:
        del file.header[name]
    elif change == 2:
        file.header[choose.choice(["0.99", "-1", "a.b", "", "0.0.0", "3.0"])] = entry
    elif change == 3 and "shape" in entry:
        field = choose.choice(["dtype", "shape", "data_offsets"])
        others = ["F32", "U32", "BF16", "BOOL", [], [1], [-1, 4], [2**31] * 4, [0, 4], None, {}]
        entry[field] = choose.choice(others)
    elif change == 4 and "shape" in entry:
        entry["shape"] = choose.sample(entry["shape"], len(entry["shape"]))
    else:
        key = choose.choice(list(metadata))
        names = ["scalar", "string", "none", "KVCache", "CacheList", "0.0", "", "1", "x" * 1000]
        metadata[key] = choose.choice(names)


@pytest.mark.parametrize("files", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_files_with_random_faults_are_refused_or_usable(tmp_path, files):
    """Their checksums are valid, so that the checks after them are tested."""
    path = tmp_path / "cache.safetensors"
    model = tiny_model("llama")
    save_prompt_cache(path, small_mixed_caches(), model)
    original = File(path)
    numbers = [name for name, entry in original.header.items() if entry.get("shape") == []]
    choose, outcomes = random.Random(1), {"refused": 0, "usable": 0}
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(files):
        file = copy.deepcopy(original)
        for _ in range(choose.randint(1, 2)):
            if choose.random() < 0.6:
                changed_header(file, choose)
            elif (name := choose.choice(numbers)) in file.header:
                values = [-1, 0, 1, 2, 8, 31, 32, 33, 64, 2**31 - 1, choose.randrange(-99, 99)]
                number = np.int32(choose.choice(values)).tobytes()
                unchanged = file.header[name] == original.header[name]
                if unchanged and len(file.array(name)) == len(number):
                    file.set_array(name, number)
        file.write(path)
        try:
            cache = load_prompt_cache(path)
        except ValueError:
            outcomes["refused"] += 1
        else:
            outcomes["usable"] += 1
            assert_usable(cache)
    assert min(outcomes.values()) > files / 20
    assert mx.get_peak_memory() - before < 32 * MEGABYTE


def test_saving_never_overwrites_another_kind_of_file(random_model, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file({"weight": np.ones(3, np.float32)}, weights)
    cache = make_prompt_cache(random_model, 4)
    with pytest.raises(ValueError, match="exists and is not a prompt cache"):
        save_prompt_cache(weights, cache, random_model)
    assert load_file(weights)["weight"].tolist() == [1, 1, 1]


def test_saving_needs_a_folder(random_model, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        save_prompt_cache(tmp_path / "nowhere" / "c", make_prompt_cache(random_model), random_model)


def test_a_cache_that_could_not_be_loaded_is_not_saved(random_model, tmp_path):
    with pytest.raises(ValueError, match="QuantizedKVCache is not a kind of cache"):
        save_prompt_cache(tmp_path / "c", [QuantizedKVCache()], random_model)


def test_a_full_disk_leaves_the_old_file_and_no_other(random_model, saved):
    before = saved.read_bytes()
    cache = make_prompt_cache(random_model, 8, window=16)
    logits(random_model, cache)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # what fits on the disk
    try:
        with pytest.raises(OSError, match="cannot be written whole"):
            save_prompt_cache(saved, cache, random_model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
    save_prompt_cache(saved, cache, random_model)
    assert_same(load_prompt_cache(saved, random_model), cache)


SAVES_FOR_EVER = """
import sys
from tiny_families import tiny_model
from mlx_turboquant import load_prompt_cache, save_prompt_cache

model = tiny_model("llama")
cache = load_prompt_cache(sys.argv[1], model)
while True:
    print(save_prompt_cache(sys.argv[1], cache, model), flush=True)
"""


def test_a_process_that_is_killed_while_saving_leaves_a_whole_file(tmp_path):
    model = tiny_model("llama")
    cache = make_prompt_cache(model, 8)
    model(random_tokens(1, 3000, vocabulary=512), cache=cache)
    file = save_prompt_cache(tmp_path / "cache", cache, model)
    choose = random.Random(0)
    for _ in range(3):
        command = [sys.executable, "-c", SAVES_FOR_EVER, str(file)]
        with subprocess.Popen(
            command, cwd=REPOSITORY / "tests", stdout=subprocess.PIPE, text=True
        ) as process:
            for _ in range(choose.randint(1, 20)):
                assert process.stdout.readline() == f"{file}\n"
            process.send_signal(signal.SIGKILL)
        assert_same(load_prompt_cache(file, model), cache)
    disable(model)


@pytest.mark.parametrize(
    "again", [lambda cache: cache, lambda cache: pickle.loads(pickle.dumps(cache))]
)
def test_a_cache_that_was_loaded_without_a_model_is_still_that_of_its_model(
    random_model, saved, tmp_path, again
):
    cache = again(load_prompt_cache(saved))
    save_prompt_cache(tmp_path / "same", cache, random_model)
    with pytest.raises(ValueError, match="weights of the model have changed"):
        save_prompt_cache(tmp_path / "other", cache, variant(random_model))


def test_a_pickled_cache_goes_on_without_the_fast_path(random_model):
    cache = make_prompt_cache(random_model, 4, window=16)
    random_model(PROMPT[None, :100], cache=cache)
    again = pickle.loads(pickle.dumps(cache))
    assert cache[0].link.is_hooked and not again[0].link.is_hooked
    expected = random_model(PROMPT[None, 100:103], cache=cache)
    found = random_model(PROMPT[None, 100:103], cache=again)
    assert mx.allclose(found, expected, atol=1e-4)  # sums in another order
