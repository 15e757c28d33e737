"""``evaluate --tasks``."""

import json
import re

from commands import run
from test_cli import TINY_LM, assert_refused

from mlx_turboquant.measure.tasks import TASKS

EVALUATE = ("evaluate", "--model", TINY_LM, "--uniform", "--kv-bits", "4", "--prompts", "8")


def test_an_unknown_task_is_answered_with_those_that_exist():
    result = run(*EVALUATE, "--tasks", "keys", "songs")
    assert_refused(result, f"'songs' is not a task: use one of {', '.join(TASKS)}.")


def test_prompts_too_short_for_any_task_are_refused():
    assert_refused(run(*EVALUATE, "--tasks", "--length", "100"), "--length is 100: use 512 or more")


def test_tasks_have_a_table_a_verdict_and_files(tmp_path):
    options = ("--tasks", "keys", "tools", "--length", "512", "--out", str(tmp_path))
    result = run(*EVALUATE, *options)
    assert result.returncode == 0
    rows = [line.split() for line in result.stdout.splitlines() if "keys" in line]
    assert [row[:3] for row in rows] == [["mlx-lm", "4", "bits"], ["4", "bits", "keys,"]]
    assert "tools is not reported: its prompts need " in result.stdout
    assert "The model has no chat template: prompts are plain text.\n" in result.stdout
    assert re.search(
        r"\n4 bits: .* points .*, too few for a verdict, which needs 160 prompts\.", result.stdout
    )
    written = json.loads((tmp_path / "tasks.json").read_text())
    assert [row["cache"] for row in written["table"]] == ["mlx-lm 4 bits", "4 bits"]
    for case in written["cases"]:
        name = next(name for name in ("4 bits", "mlx-lm 4 bits") if name in case)
        rights = [TASKS["keys"].is_right(case[who], case["right"]) for who in ("exact", name)]
        assert sorted(rights) == [False, True]
    assert len(written["cases"]) <= 5 * 2
    about, *replies = map(json.loads, (tmp_path / "tasks.jsonl").read_text().splitlines())
    assert about["model"] == TINY_LM and len(replies) == 5  # the exact cache does two passages
    again = run(*EVALUATE, *options)
    assert again.stdout == result.stdout


def test_replies_with_other_settings_are_not_mixed(tmp_path):
    options = ("--tasks", "counting", "--length", "512", "--out", str(tmp_path))
    assert run(*EVALUATE, *options).returncode == 0
    result = run(*EVALUATE, *options, "--kv-window", "16")
    assert_refused(result, "has the replies of another run: use another --out or delete it.")
