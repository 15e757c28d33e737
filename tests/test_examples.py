"""The short examples, run as their docstrings say."""

import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY


@pytest.mark.parametrize(
    "name, expected",
    [
        ("enable", "TurboQuantKVCache"),
        ("save_and_load", "the file has"),
        ("batch", "282 tokens"),
        ("nearest", "query 0: vectors [0, "),
    ],
)
def test_an_example_runs_from_any_folder(name, expected, tmp_path):
    command = [sys.executable, REPOSITORY / "examples" / f"{name}.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout


def test_the_demo_prints_what_each_cache_answers_and_whether_it_is_right(tmp_path):
    command = [sys.executable, REPOSITORY / "examples" / "find_code.py", "--tokens", "1000"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    *lines, last = result.stdout.splitlines()
    code = re.fullmatch(r"The hidden code was (\d{6})\.", last)[1]
    answers = [line.split("  ") for line in lines if re.search("  (yes|no)  ", line)]
    answers = [[cell.strip() for cell in row if cell.strip()] for row in answers]
    assert [row[0] for row in answers] == ["exact", "mlx-lm 4 bits", "mlx_turboquant 4 bits"]
    assert all((row[2] == code) == (row[3] == "yes") for row in answers)
    assert answers[0][2] == code and result.returncode == 0
    assert max(map(len, lines)) <= 100
