import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from executor_stamp import TESTS, digest
from metal_on_linux import IS_SUPPORTED

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not IS_SUPPORTED, reason="metal_on_linux finds its compiler here")


def test_a_changed_byte_of_any_source_changes_the_stamp(tmp_path):
    shutil.copy(HERE / TESTS, tmp_path)
    shutil.copytree(
        HERE / "metal_on_linux",
        tmp_path / "metal_on_linux",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    unchanged = digest(tmp_path)
    assert unchanged == digest(HERE)
    sources = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.name for file in sources} >= {TESTS, "toolchain.py", "executor.cpp", "shim_simd.h"}
    for file in sources:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert digest(tmp_path) != unchanged
        file.write_bytes(content)
    assert digest(tmp_path) == unchanged


@pytest.mark.parametrize(
    "options, is_left",
    [([], True), (["-n", "2"], True), (["-k", "first"], False), (["-n", "2", "--fail"], False)],
)
def test_a_stamp_is_left_when_all_tests_have_passed(tmp_path, monkeypatch, options, is_left):
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--fail', action='store_true')\n"
    )
    (tmp_path / TESTS).write_text(
        "def test_first(): pass\n\n"
        "def test_second(request): assert not request.config.getoption('--fail')\n"
    )
    monkeypatch.setenv("METAL_ON_LINUX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    command = [sys.executable, "-m", "pytest", "-p", "executor_stamp", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ("1 failed" in done.stdout) == ("--fail" in options), done.stdout
    assert any((tmp_path / "cache").glob("tests-passed-*")) == is_left
