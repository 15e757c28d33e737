"""The short examples, as their docstrings say how to run them."""

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
