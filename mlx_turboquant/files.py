"""Files that are written whole: JSON, and arrays in the safetensors format."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .stored_arrays import read_header, seal


def safetensors_path(file: str | Path) -> Path:
    """The path with the ending ".safetensors", which mlx expects."""
    file = Path(file)
    return file if file.suffix == ".safetensors" else file.with_name(file.name + ".safetensors")


def write_whole(file: Path, write: Callable[[Path], None], key: str) -> None:
    """Write ``file`` so that it is complete or not there: to a temporary name, then renamed.

    ``write`` makes a safetensors file with room for checksums under ``key`` of its metadata, which
    is filled then.

    Raises:
        OSError: the file cannot be written whole, for want of space for instance.
    """
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}-") as folder:
        complete = Path(folder) / file.name
        try:
            write(complete)
            read_header(complete)
            seal(complete, key)
        except (RuntimeError, ValueError) as error:
            raise OSError(f"{file} cannot be written whole: is there space for it?") from error
        os.replace(complete, file)
        with suppress(OSError):  # where folders cannot be synced
            parent = os.open(file.parent, os.O_RDONLY)
            os.fsync(parent)  # a power cut would undo the renaming
            os.close(parent)


@contextmanager
def write_errors(place: Path) -> Iterator[None]:
    """Say of an OSError which ``place`` was to be written, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it was said by a block within this one
            raise
        raise OSError(
            f"{place} cannot be written ({error.strerror}): use a place with space and permission."
        ) from error


def make_folder(folder: Path) -> None:
    """Make a folder where there is none; OSError if it cannot be made or written to."""
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_json(file: Path, contents: dict[str, Any]) -> None:
    """Write ``file`` so that it is complete or not there; its folder is made where there is none.

    Raises:
        OSError: the file cannot be written.
    """
    make_folder(file.parent)
    with (
        write_errors(file),
        tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}-") as folder,
    ):
        complete = Path(folder) / file.name
        complete.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        os.replace(complete, file)


def check_target(file: str | Path, key: str, what: str) -> Path:
    """The path that a file is saved at; ValueError if it cannot be saved there.

    A file that is there already must have ``key`` in its metadata, which says that this package
    wrote it; ``what`` is what the message calls such a file.
    """
    file = safetensors_path(file)
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent} is not a folder: save to a folder that exists.")
    if file.exists() and key not in read_header(file)["__metadata__"]:
        raise ValueError(f"{file} exists and is not a {what} of mlx_turboquant: use another name.")
    return file


def check_versions(
    file: Path, saved: dict[str, str], versions: dict[str, str], remedy: str
) -> None:
    """Raise ValueError unless the metadata of a file name the ``versions`` of this package."""
    for name, version in versions.items():
        if saved.get(name) != version:
            raise ValueError(
                f"{file} was written with {name} version {saved.get(name)}, this is version "
                f"{version}: {remedy}."
            )
