"""Atomic writes of JSON and safetensors files, with checks of targets and versions."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from .stored_arrays import StoredFile, seal


def safetensors_path(file: str | Path) -> Path:
    """The path with the suffix ".safetensors", which mlx expects."""
    file = Path(file)
    return file if file.suffix == ".safetensors" else file.with_name(file.name + ".safetensors")


def write_errors(place: Path) -> AbstractContextManager[None]:
    """Add ``place`` and a remedy to an OSError that occurs while ``place`` is written."""
    return _errors(place, "written", "use a place with space and permission")


def read_errors(file: Path) -> AbstractContextManager[None]:
    """Add ``file`` and a remedy to an OSError that occurs while ``file`` is read."""
    return _errors(file, "read", "use a file that exists and that you may read")


@contextmanager
def _errors(place: Path, what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # an inner block has already added them
            raise
        raise type(error)(f"{place} cannot be {what} ({error.strerror}): {remedy}.") from error


@contextmanager
def files_at_once(folder: Path, place: Path) -> Iterator[Path]:
    """A temporary folder, whose files are moved to ``folder`` at the end; errors name ``place``."""
    with (
        write_errors(place),
        tempfile.TemporaryDirectory(dir=folder, prefix=f".{place.stem}-") as temporary,
    ):
        yield Path(temporary)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)


def write_whole(file: Path, write: Callable[[Path], None]) -> None:
    """Write ``file`` atomically: under a temporary name, which is then renamed.

    OSError if the file cannot be written whole, as on a full disk.
    """
    with files_at_once(file.parent, file) as folder:
        write_sealed(folder, file, write)
    with suppress(OSError):  # some file systems cannot sync folders
        parent = os.open(file.parent, os.O_RDONLY)
        os.fsync(parent)  # otherwise a power cut could undo the rename
        os.close(parent)


def write_sealed(folder: Path, file: Path, write: Callable[[Path], None]) -> Path:
    """Write what will be ``file``, which errors name, to a temporary ``folder``.

    ``write`` makes a safetensors file with :func:`.room_for_checksums` in its metadata. They are
    filled in afterwards. OSError if the file cannot be written whole, as on a full disk.
    """
    complete = folder / file.name
    try:
        write(complete)
        StoredFile(complete)  # raises an error if it is not complete
        seal(complete)
    except (RuntimeError, ValueError) as error:
        raise OSError(f"{file} cannot be written whole: is there space for it?") from error
    return complete


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Create a folder unless it exists; OSError if it cannot be created or written to."""
    with write_errors(folder):
        folder.mkdir(mode, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_json(file: Path, contents: dict[str, Any]) -> None:
    """Write ``file`` atomically, and create its folder if needed; OSError if that fails."""
    write_text(file, json.dumps(contents, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write ``file`` atomically, and create its folder if needed; OSError if that fails."""
    make_folder(file.parent)
    with files_at_once(file.parent, file) as folder:
        (folder / file.name).write_text(text, encoding="utf-8")


def make_way(file: Path, mark: str, what: str) -> None:
    """Create the folder of a text file that will be written; OSError if that fails.

    ValueError if the file exists and is not a ``what``, because it does not contain the ``mark``.
    """
    with read_errors(file):
        is_own = file.is_file() and mark.encode() in file.read_bytes()
        if file.exists() and not is_own:
            raise ValueError(f"{file} exists and is not a {what}: give another name.")
    make_folder(file.parent)


def check_target(file: str | Path, key: str, what: str) -> Path:
    """The path to save a file at; OSError if its folder cannot be written to.

    ValueError if there is no folder, or another file, which the message says is not a ``what``:
    one without ``key`` in its metadata, which shows that this package wrote it.
    """
    file = safetensors_path(file)
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent} is not a folder: save to a folder that exists.")
    with read_errors(file):
        is_other = file.exists() and key not in StoredFile(file).metadata
    if is_other:
        raise ValueError(f"{file} exists and is not a {what} of mlx_turboquant: use another name.")
    make_folder(file.parent)
    return file


def check_versions(
    file: Path, saved: dict[str, str], versions: dict[str, str], remedy: str
) -> None:
    """Raise ValueError unless the ``saved`` metadata of a file have these ``versions``."""
    for name, version in versions.items():
        if saved.get(name) != version:
            raise ValueError(
                f"{file} was written with {name} version {saved.get(name)}, this is version "
                f"{version}: {remedy}."
            )
