"""Find a clang, build kernels and the runtime library, keep what is built in a cache."""

import functools
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def _is_supported() -> bool:
    """The context switch of the fibers is x86-64 assembly; kernels are built for AVX2 and F16C."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return False
    return {"avx2", "f16c"} <= set(Path("/proc/cpuinfo").read_text().split())


IS_SUPPORTED = _is_supported()

_HERE = Path(__file__).parent
_SHIM_DIRECTORY = _HERE / "include"
_RUNTIME_SOURCES = [_HERE / "runtime" / name for name in ("executor.cpp", "memory_checker.cpp")]
_RUNTIME_HEADER = _HERE / "runtime" / "executor.h"
_CLANG_VERSIONS = (22, 21, 20, 19)

LANGUAGE_FLAGS = [
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc"),
    # The target is spelled out because zig's default is musl.
    *("-target", "x86_64-linux-gnu", "-march=x86-64-v3"),
    # Only what Metal has too. The generic address space is for clang's class temporaries.
    "-Xclang",
    "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space,+__opencl_c_int64",
    "-cl-single-precision-constant",  # Metal has no double: 1.0 is a float
    "-fno-lax-vector-conversions",
    # half and bfloat arithmetic rounds after every operation
    *("-Xclang", "-ffloat16-excess-precision=none"),
    *("-Xclang", "-fbfloat16-excess-precision=none"),
    *("-Wno-unknown-attributes", "-Wno-unknown-pragmas", "-Wno-unused-value", "-Wno-gcc-compat"),
    *("-I", str(_SHIM_DIRECTORY)),
]


class ToolchainError(RuntimeError):
    """No usable compiler, or something does not build."""


@functools.cache
def cache_directory() -> Path:
    """Where built kernels are kept; safe to delete between runs."""
    path = os.environ.get("METAL_ON_LINUX_CACHE")
    if not path:
        path = os.path.join(tempfile.gettempdir(), f"metal-on-linux-{os.getuid()}")
    os.makedirs(path, mode=0o700, exist_ok=True)
    if os.stat(path).st_uid != os.getuid():  # never load files that others can write
        path = tempfile.mkdtemp(prefix="metal-on-linux-")
    return Path(path)


@functools.cache
def clang() -> list[str]:
    """Command line of the clang driver."""
    if command := os.environ.get("METAL_ON_LINUX_CLANG"):
        return shlex.split(command)
    for version in _CLANG_VERSIONS:
        if path := shutil.which(f"clang++-{version}"):
            return [path]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "clang"]
    raise ToolchainError(
        "metal_on_linux needs clang 19 to 22: install clang-19 or the Python package ziglang, "
        "or set METAL_ON_LINUX_CLANG"
    )


@functools.cache
def compiler_version() -> str:
    """The version text of the clang driver."""
    return _run([*clang(), "--version"], "clang --version")


def start(command: list[str]) -> subprocess.CompletedProcess:
    """Run a compiler. Libraries preloaded into the tests (OpenBLAS) are not for compilers."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment.setdefault("ZIG_GLOBAL_CACHE_DIR", str(cache_directory() / "zig"))
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def compile_kernel(text: str, flags: list[str]) -> Path:
    """Build translated text as a shared library, unless the cache has it."""
    stem = cache_directory() / _digest(text, flags, _fingerprint())
    library = stem.with_suffix(".so")
    if library.exists():
        return library
    partial = f"{stem}.{os.getpid()}"
    Path(f"{partial}.metal").write_text(text)
    try:
        flags = [*LANGUAGE_FLAGS, "-fPIC", "-g1", "-w", *flags]
        _run([*clang(), *flags, "-c", f"{partial}.metal", "-o", f"{partial}.o"], "kernel")
        _run([*_linker(), "-o", f"{partial}.so", f"{partial}.o"], "link")
        os.rename(f"{partial}.so", library)
    finally:
        for suffix in (".metal", ".o"):
            Path(partial + suffix).unlink(missing_ok=True)
    return library


def remember(produce: Callable[[], list[str]], *key: str) -> list[str]:
    """The result of ``produce``, cached for this key, compiler and shim."""
    path = cache_directory() / f"{_digest(*key, _fingerprint())}.json"
    if not path.exists():
        partial = Path(f"{path}.{os.getpid()}")
        partial.write_text(json.dumps(produce()))
        os.rename(partial, path)
    return json.loads(path.read_text())


@functools.cache
def runtime_library() -> Path:
    """Build the executor's shared library, unless the cache has it."""
    text = "".join(path.read_text() for path in (*_RUNTIME_SOURCES, _RUNTIME_HEADER))
    library = cache_directory() / f"runtime-{_digest(text)}.so"
    if library.exists():
        return library
    partial = f"{library}.{os.getpid()}"
    flags = ["-O2", "-g", "-fPIC", "-shared", "-std=c++17", "-o", partial]
    command = [*_cxx(), *flags, *map(str, _RUNTIME_SOURCES), "-lpthread", "-ldl", "-lm"]
    _run(command, "runtime library")
    os.rename(partial, library)
    return library


@functools.cache
def mlx_include_directory() -> Path:
    """Where the installed mlx package keeps its kernel headers."""
    for location in importlib.util.find_spec("mlx").submodule_search_locations:
        path = Path(location) / "include"
        if (path / "mlx/backend/metal/kernels/utils.h").exists():
            return path
    raise ToolchainError("the installed mlx package has no kernel headers")


def _is_zig() -> bool:
    return "ziglang" in clang()


def _linker() -> list[str]:
    # Kernels refer to the runtime library by undefined symbols only: any linker will do.
    if _is_zig():
        return [*clang()[:-1], "ld.lld", "-shared"]
    return [*clang(), "-shared", "-nostdlib"]


def _cxx() -> list[str]:
    """The compiler of the runtime library. g++ first: zig takes a minute to build its libc++."""
    if installed := shutil.which("c++") or shutil.which("g++"):
        return [installed]
    return [*clang()[:-1], "c++", "-fno-sanitize=all"] if _is_zig() else clang()


def _run(command: list[str], what: str) -> str:
    done = start(command)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        raise ToolchainError(f"{what}:\n" + "\n".join(errors or [done.stderr])[:2000])
    return done.stdout


def _digest(*parts: object) -> str:
    """Short name for a cache entry."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


@functools.cache
def _fingerprint() -> str:
    """A hash of the compiler, its flags and the shim headers."""
    headers = (path.read_text() for path in sorted(_SHIM_DIRECTORY.iterdir()))
    return _digest(compiler_version(), LANGUAGE_FLAGS, *headers)
