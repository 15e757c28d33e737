"""Build a program for the CPU and launch it: the Python side of runtime/executor.cpp."""

import ctypes
import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import toolchain
from .translate import translate

# Numbered as in runtime/executor.h.
_THREAD_ORDERS = {"forward": 0, "reverse": 1, "random": 2}
INPUT, OUTPUT, INITIALISED_OUTPUT = 0, 1, 2

# Mirrored by runtime/executor.h.
_POSITION_STRUCT = """struct _mol_position {
  uint3 in_grid, in_threadgroup, group_position, group_count;
  uint3 grid_size, group_size, full_group_size;
  uint index, lane, simdgroup, simdgroups, simd_width, quadgroup, quadgroups, quad_lane;
};
"""

_COMMON_FLAGS = ["-ffp-contract=on", "-fno-math-errno"]
_RELEASE_FLAGS = ["-O2", *_COMMON_FLAGS]
# clang inserts a call before every memory access; the calls land in runtime/memory_checker.cpp.
_CHECKED_FLAGS = [
    *("-O1", *_COMMON_FLAGS, "-fno-vectorize", "-fno-slp-vectorize"),
    *("-fsanitize=thread", "-mllvm", "-tsan-instrument-read-before-write=1"),
    *("-mllvm", "-tsan-instrument-func-entry-exit=0"),
    "-fsanitize=array-bounds,shift,integer-divide-by-zero,bool,float-cast-overflow,alignment,return",
]


class KernelReport(RuntimeError):
    """The executor or the memory checker found something wrong with a kernel."""


@dataclass(frozen=True)
class Buffer:
    """An argument of a kernel: its name, its memory, and INPUT, OUTPUT or INITIALISED_OUTPUT."""

    name: str
    array: np.ndarray
    kind: int

    def describe(self) -> "_BufferDescription":
        """The same for the runtime library. A strided view spans more bytes than it has."""
        array = self.array
        steps = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides))
        span = steps + array.itemsize if array.size else 0
        name = self.name.encode()
        return _BufferDescription(array.ctypes.data, span, self.kind, array.itemsize, name)


@dataclass(frozen=True)
class Options:
    """How to run: the order of threads, its seed, OS threads (0: one per CPU), the checker."""

    workers: int
    order: str
    seed: int
    memory_check: bool


class _BufferDescription(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("kind", ctypes.c_uint32),
        ("item_size", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
    ]


class _Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("workers", "order", "seed", "memory_check")]


def entry_point(call: str, arguments: list[str]) -> str:
    """The C function that the executor calls once per thread: it unpacks arguments and calls."""
    return (
        _POSITION_STRUCT + 'extern "C" __attribute__((no_sanitize("thread"))) void mol_entry('
        "__private const ulong* _args, __private const _mol_position* _position) {\n"
        f"  {call}({', '.join(arguments)});\n}}\n"
    )


@functools.cache
def build(text: str, memory_check: bool) -> Path:
    """Metal text that ends with an ``entry_point``, as a shared library."""
    translated = translate(text, toolchain.mlx_include_directory())
    return toolchain.compile_kernel(translated, _CHECKED_FLAGS if memory_check else _RELEASE_FLAGS)


def launch(
    library: Path,
    buffers: list[Buffer],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    options: Options,
) -> list[str]:
    """Run a built kernel; returns the reports."""
    runtime = _load_runtime()
    count = len(buffers)
    pointers = (ctypes.c_uint64 * count)(*(buffer.array.ctypes.data for buffer in buffers))
    table = (_BufferDescription * count)(*(buffer.describe() for buffer in buffers))
    sizes = [(ctypes.c_uint32 * 3)(*size) for size in (grid, threadgroup)]
    order = _THREAD_ORDERS[options.order]
    native = _Options(options.workers, order, options.seed, options.memory_check)
    entry = ctypes.cast(_load_kernel(library).mol_entry, ctypes.c_void_p)

    runtime.mol_launch(entry, pointers, table, count, *sizes, ctypes.byref(native))
    reports = [runtime.mol_report_text(i).decode() for i in range(runtime.mol_report_count())]
    return [_with_line_number(report, library) for report in reports]


@functools.cache
def _load_runtime() -> ctypes.CDLL:
    # RTLD_GLOBAL: kernels find the runtime's functions, and libm, in the process.
    runtime = ctypes.CDLL(str(toolchain.runtime_library()), mode=ctypes.RTLD_GLOBAL)
    runtime.mol_launch.restype = None
    runtime.mol_report_text.restype = ctypes.c_char_p
    return runtime


@functools.cache
def _load_kernel(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def _with_line_number(report: str, library: Path) -> str:
    """Replace the code address in a report by file:line, when addr2line (binutils) is there."""
    address = re.search(r"\+0x([0-9a-f]+)", report)
    if not address or not shutil.which("addr2line"):
        return report
    command = ["addr2line", "-e", str(library), "-i", "0x" + address[1]]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    lines = [line for line in lines if "shim_" not in line and "?" not in line]
    return report.replace(address[0], os.path.basename(lines[0])) if lines else report
