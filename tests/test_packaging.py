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
    """But for matplotlib, which the extra "evaluate" brings."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", each)[0] for each in project["dependencies"]}
    imported = set()
    for file in (REPOSITORY / "mlx_turboquant").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    others = imported - set(sys.stdlib_module_names) - {"mlx_turboquant"}
    assert others <= {name.replace("-", "_") for name in names} | {"matplotlib"}


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
