"""Run the tests of metal_on_linux itself only if it, they, the compiler or MLX changed.

When all of them have passed, a stamp is left in the tool's cache folder; while it is there, they
are skipped. This is a pytest plugin; with xdist it receives the reports of all workers.
"""

import functools
import hashlib
from pathlib import Path

import mlx.core as mx
import pytest
from metal_on_linux import IS_SUPPORTED, toolchain

TESTS = "test_metal_on_linux.py"
_HERE = Path(__file__).parent
_PROPERTY = "executor stamp"
_passed: set[str] = set()


def digest(folder: Path) -> str:
    """SHA-256 of the tool and its tests in a folder and of the versions of compiler and MLX."""
    hashed = hashlib.sha256(f"{toolchain.compiler_version()}{mx.__version__}".encode())
    for file in sorted([folder / TESTS, *(folder / "metal_on_linux").rglob("*.*")]):
        if "__pycache__" not in file.parts:
            content = file.read_bytes()
            hashed.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    return hashed.hexdigest()


@functools.cache
def stamp() -> Path:
    """The file that says that the tests of these sources have passed."""
    return toolchain.cache_directory() / f"tests-passed-{digest(_HERE)}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Note in every test of the tool how many there are, because a run may select only some."""
    report = yield
    if IS_SUPPORTED and collector.name == TESTS:
        for test in report.result:
            test.user_properties.append((_PROPERTY, (str(stamp()), len(report.result))))
    return report


def pytest_runtest_logreport(report):
    """Leave the stamp when the last of the tool's tests has passed."""
    path, count = dict(report.user_properties).get(_PROPERTY, (None, 0))
    if path and report.when == "call" and report.passed:
        _passed.add(report.nodeid)
        if len(_passed) == count:
            Path(path).touch()
