"""Run commands in processes that are forked from one that has imported the package."""

import ctypes
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from subprocess import CompletedProcess

from mlx_turboquant import cli

# Otherwise each would import mlx-lm for a second or more.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["mlx_turboquant.cli.generate", "mlx_turboquant.cli.evaluate"])
_SECONDS = 120


def run(
    *arguments: str,
    input: str = "",
    cwd: str | Path = ".",
    env: dict[str, str] | None = None,
) -> CompletedProcess:
    """Run ``mlx_turboquant`` and return its output and status, as :func:`subprocess.run` does."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        for stream in streams:
            stream.write_text(input if stream.name == "stdin" else "")
        about = arguments, streams, cwd, dict(os.environ) if env is None else env
        process = _processes.Process(target=_main, args=about)
        process.start()
        process.join(_SECONDS)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{arguments} still runs after {_SECONDS} seconds.")
        _, output, messages = (stream.read_text() for stream in streams)
        return CompletedProcess(arguments, process.exitcode, output, messages)


def _main(
    arguments: tuple[str, ...], streams: list[Path], cwd: str | Path, env: dict[str, str]
) -> None:
    for descriptor, (stream, mode) in enumerate(zip(streams, "rww")):
        with stream.open(mode) as opened:
            os.dup2(opened.fileno(), descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["mlx_turboquant", *arguments]
    cli.main()


def not_above_permissions() -> None:
    """Drop root's capability to write to all folders (CAP_DAC_OVERRIDE, Linux)."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def wait_for_a_measured_layer(cache_home: Path) -> None:
    """Wait until a calibration has kept its first layer; most of the others are still to come."""
    deadline = time.monotonic() + 120
    while not list((cache_home / "mlx_turboquant" / "profiles").glob("*.unfinished")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
