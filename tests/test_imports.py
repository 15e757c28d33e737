"""The public names can be imported, and imports between the folders run one way."""

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import mlx_turboquant
from mlx_turboquant import search

ROOT = Path(mlx_turboquant.__file__).parent
# For each folder or top-level module of the package, the others that it imports.
ARROWS = {
    "codec": set(),
    "stored_arrays": set(),
    "files": {"stored_arrays"},
    "kernels": {"codec", "files"},
    "search": {"codec", "kernels", "files", "stored_arrays"},
    "cache": {"codec", "kernels"},
    "lm": {"codec", "kernels", "cache", "files", "stored_arrays"},
    "measure": {"codec", "kernels", "cache", "files", "lm"},
    "cli": {"codec", "kernels", "cache", "files", "lm", "measure", "__version__"},
    "__main__": {"cli"},
    "library": {"cache", "codec", "lm", "search"},
    "__init__": {"library"},
}


def imported(file: Path) -> Iterator[str]:
    """The full name of everything that the statements of a file import."""
    package = ".".join(file.relative_to(ROOT.parent).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_public_names_are_there():
    assert [name for name in mlx_turboquant.__all__ if not hasattr(mlx_turboquant, name)] == []
    assert mlx_turboquant.VectorIndex is search.VectorIndex
    assert mlx_turboquant.SearchResult is search.SearchResult and len(search.METRICS) == 3


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_one_way(file):
    part = file.relative_to(ROOT).with_suffix("").parts[0]
    paths = [name.split(".") for name in imported(file)]
    assert {path[1] for path in paths if path[0] == "mlx_turboquant"} <= ARROWS[part] | {part}
    assert part in ("lm", "measure", "cli") or all(path[0] != "mlx_lm" for path in paths)
