import ast
import importlib.resources
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from conftest import REPOSITORY

from mlx_turboquant.lm.calibrate import calibration_texts

KERNEL_FILES = sorted(
    path.name for path in (REPOSITORY / "metal").iterdir() if path.suffix in (".metal", ".h", ".md")
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the checkout, so that no build folder is left behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("mlx_turboquant", "metal"):
        shutil.copytree(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "-w", "dist"], cwd=source, check=True, capture_output=True)
    return next((source / "dist").glob("*.whl"))


def test_the_installed_package_has_its_kernel_files():
    """The tests run on an editable installation."""
    folder = importlib.resources.files("mlx_turboquant.metal")
    assert KERNEL_FILES and all((folder / name).is_file() for name in KERNEL_FILES)


def test_a_wheel_contains_the_kernel_files_and_the_command(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"mlx_turboquant/metal/{name}" for name in KERNEL_FILES} <= set(names)
    assert any(name.endswith("entry_points.txt") for name in names)
    assert not any(name.startswith(("tests/", "examples/")) for name in names)


def test_a_wheel_contains_every_module(wheel):
    modules = (
        path.relative_to(REPOSITORY) for path in (REPOSITORY / "mlx_turboquant").rglob("*.py")
    )
    assert set(map(str, modules)) <= set(zipfile.ZipFile(wheel).namelist())


def test_a_wheel_contains_the_texts_of_calibration(wheel):
    texts = [f"mlx_turboquant/lm/calibration/{name}.txt" for name in calibration_texts()]
    names = zipfile.ZipFile(wheel).namelist()
    assert len(texts) == 4 and set(texts) <= set(names)


def test_a_package_from_the_wheel_finds_its_kernel_files(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import importlib.resources as r, mlx_turboquant;"
        "print(mlx_turboquant.__file__);"
        "print(*sorted(p.name for p in r.files('mlx_turboquant.metal').iterdir()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        check=True,
        capture_output=True,
        text=True,
    )
    module, files = run.stdout.splitlines()
    assert module.startswith(str(tmp_path))
    assert set(KERNEL_FILES) <= set(files.split())


def test_all_that_the_package_imports_is_declared():
    """Except matplotlib, of the extra "evaluate", which only the drawing modules import."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w-]+", each)[0].replace("-", "_") for each in project["dependencies"]]
    known = {*names, *sys.stdlib_module_names, "mlx_turboquant"}
    undeclared = {}
    for file in (REPOSITORY / "mlx_turboquant").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for name in {module.split(".")[0] for module in modules} - known:
                undeclared.setdefault(name, set()).add(file.name)
    assert undeclared == {"matplotlib": {"pictures.py", "benchmark_pictures.py"}}


def test_without_matplotlib_all_that_does_not_draw_is_imported():
    code = (
        "import sys; sys.modules['matplotlib'] = None; import importlib, pkgutil, mlx_turboquant\n"
        "for each in pkgutil.walk_packages(mlx_turboquant.__path__, 'mlx_turboquant.'):\n"
        "    if not each.name.endswith('pictures'): print(importlib.import_module(each.name))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "mlx_turboquant.cli.doctor" in run.stdout


def test_only_the_chat_imports_prompt_toolkit():
    code = "import sys, mlx_turboquant.cli.server; print('prompt_toolkit' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


@pytest.mark.parametrize("command", ["evaluate", "benchmark"])
def test_without_matplotlib_a_command_says_what_to_install(command):
    code = (
        "import sys; sys.modules['matplotlib'] = None; from mlx_turboquant import cli;"
        f"sys.argv = ['mlx_turboquant', '{command}', '--model', 'none']; cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert "matplotlib is not installed" in line and "pip install 'mlx-turboquant-cache[" in line
