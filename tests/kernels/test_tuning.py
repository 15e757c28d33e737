import json
import logging

import pytest

from mlx_turboquant.kernels import tuning
from mlx_turboquant.kernels.tuning import (
    Tuning,
    default_tunings,
    heads_key,
    least_cores,
    reset_tunings,
    save_tunings,
    saved_tunings,
    tunings,
)

FOUND = ((0, Tuning(4, 32, 1, 8, 2, 100)), (5000, Tuning(8, 64, 2, 4, 8, 200)))


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "user_cache_path", lambda name: tmp_path / name)
    saved_tunings.cache_clear()
    yield
    saved_tunings.cache_clear()


def test_what_was_measured_comes_before_the_table():
    save_tunings({heads_key(128, 128, 4): FOUND})
    assert tunings("metal", 128, 128, 4) == FOUND
    assert tunings("metal", 128, 128, 8) == default_tunings("metal", 8)


def test_tunings_are_added_to_those_of_other_heads():
    save_tunings({heads_key(128, 128, 4): FOUND})
    save_tunings({heads_key(64, 64, 4): FOUND[:1]})
    assert saved_tunings() == {heads_key(128, 128, 4): FOUND, heads_key(64, 64, 4): FOUND[:1]}


def test_reset_forgets_all_of_them():
    assert not reset_tunings()
    save_tunings({heads_key(128, 128, 4): FOUND})
    assert reset_tunings()
    assert saved_tunings() == {}


def first(contents: dict) -> dict:
    return contents["tunings"][heads_key(128, 128, 4)][0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda contents: contents.update(device="Apple M9"),
        lambda contents: contents.update(kernels="0" * 16),
        lambda contents: contents.update(format=2),
        lambda contents: contents.pop("tunings"),
        lambda contents: contents.update(tunings=[]),
        lambda contents: contents["tunings"].update({heads_key(128, 128, 4): []}),
        lambda contents: first(contents).update(rows=0),
        lambda contents: first(contents).update(rows=True),
        lambda contents: first(contents).update(simds=1.5),
        lambda contents: first(contents).update(threadgroups=10**9),
        lambda contents: first(contents).update(packed_tokens=-1),
        lambda contents: first(contents).pop("batch"),
    ],
)
def test_a_file_that_is_absurd_or_for_another_machine_is_ignored(damage, caplog):
    file = save_tunings({heads_key(128, 128, 4): FOUND})
    contents = json.loads(file.read_text())
    damage(contents)
    file.write_text(json.dumps(contents))
    saved_tunings.cache_clear()
    with caplog.at_level(logging.WARNING, logger="mlx_turboquant"):
        assert tunings("metal", 128, 128, 4) == default_tunings("metal", 4)
        tunings("metal", 64, 64, 4)
    assert len(caplog.messages) == 1
    assert "run `mlx_turboquant tune` again" in caplog.messages[0]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_file_that_is_unreadable_is_ignored(text, caplog):
    file = save_tunings({heads_key(128, 128, 4): FOUND})
    file.write_bytes(text)
    saved_tunings.cache_clear()
    assert saved_tunings() == {}
    assert len(caplog.messages) == 1


def test_without_a_file_nothing_is_said(caplog):
    assert saved_tunings() == {}
    assert not caplog.messages


@pytest.mark.parametrize(
    "architecture, cores", [("applegpu_g13g", 8), ("applegpu_g16s", 14), ("applegpu_g15d", 48)]
)
def test_a_larger_chip_gets_more_threadgroups(architecture, cores):
    assert least_cores(architecture) == cores


def test_an_unknown_chip_counts_as_the_smallest():
    assert least_cores("") == least_cores("applegpu_g99x") == 8


def test_on_cuda_eight_rows_wait_for_many_packed_tokens():
    assert [tuning.rows for _, tuning in default_tunings("cuda", 8)] == [4, 8]
    assert [tuning.rows for _, tuning in default_tunings("cuda", 4)] == [4]
