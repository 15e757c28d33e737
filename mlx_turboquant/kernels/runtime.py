"""Builds the kernels of ``metal/`` for this machine, and replaces those that are wrong.

The same text runs on Metal and, behind ``metal_on_cuda.h``, on CUDA. Every configuration of a
kernel is compared with plain MLX on small data before its first use; one that does not compile
or disagrees is replaced by plain MLX for the rest of the process, with a warning.
"""

import logging
import os
import re
from collections.abc import Callable, Hashable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import mlx.core as mx

# Lanes of a SIMD group; the text of all kernels knows it by this name.
LANES = 32
# SIMD groups in a threadgroup, where a kernel says nothing else.
SIMDS = 4
THREADGROUP_BYTES = 32768
BACKEND_VARIABLE = "MLX_TURBOQUANT_BACKEND"

# Headers of the functions that a kernel uses, where it has none of its own name.
_FUNCTIONS = {"combine": "rotation.h", "inner_product": "levels.h"}
# What a kernel's text calls the types that it is compiled for.
_TYPES = {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.float32: "float"}

Constant = int | mx.Dtype
Launch = Callable[..., list[mx.array]]

_log = logging.getLogger("mlx_turboquant")
_forced_backend: str | None = None


class Agreement(NamedTuple):
    """How far a kernel is from plain MLX on small data, and how far rounding alone may take it."""

    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the kernel may be used; an error that is not a number does not hold."""
        return self.error <= self.allowed


class Kernel(Protocol):
    """One kernel of ``metal/`` in one configuration, which are the arguments of its class."""

    def check(self) -> Agreement:
        """Compare it with plain MLX on small data."""


AnyKernel = TypeVar("AnyKernel", bound=Kernel)


def backend() -> str:
    """Where kernels run: "metal", "cuda", or "reference" for plain MLX operations.

    What :func:`force_backend` was given comes first, then the environment variable
    ``MLX_TURBOQUANT_BACKEND``, which is read once, then what the machine has.

    Raises:
        ValueError: the variable names a backend that this machine does not have.
    """
    return _forced_backend or _machine_backend()


@cache
def _machine_backend() -> str:
    return _checked_backend(os.environ.get(BACKEND_VARIABLE), BACKEND_VARIABLE)


def force_backend(name: str | None) -> None:
    """Use the backend ``name`` in this process; None goes back to the choice of the machine.

    Raises:
        ValueError: a backend that this machine does not have.
    """
    global _forced_backend
    _forced_backend = None if name is None else _checked_backend(name, "backend")


@cache
def _checked_backend(name: str | None, origin: str) -> str:
    available = ["reference"]
    if mx.default_device().type == mx.DeviceType.gpu:
        available.insert(0, "metal" if mx.metal.is_available() else "cuda")
    if name is not None and name not in available:
        raise ValueError(f"{origin} is {name!r}: use {' or '.join(available)} on this machine.")
    _log.info("Kernels run on: %s", name or available[0])
    return name or available[0]


def checked(kernel: type[AnyKernel], *configuration: Hashable) -> AnyKernel | None:
    """The kernel of a configuration; None where plain MLX takes its place."""
    target = backend()
    return None if target == "reference" else _checked(target, kernel, *configuration)


@cache
def _checked(target: str, kernel: type[AnyKernel], *configuration: Hashable) -> AnyKernel | None:
    try:
        built = kernel(*configuration)
        agreement = built.check()
        if agreement.holds:
            return built
        wrong = f"relative error {agreement.error:.1e}, allowed {agreement.allowed:.1e}"
    except (RuntimeError, ValueError) as error:
        wrong = f"{type(error).__name__}: {error}"
    device = mx.device_info().get("device_name", target)
    _log.warning("Kernel %s is replaced by plain MLX on %s: %s", kernel.name, device, wrong)
    return None


@cache
def supports(kernel: str, dim: int, most: int) -> bool:
    """Whether a kernel takes vectors of ``dim`` values; if not, the log says so once."""
    if dim > most:
        _log.warning(
            "Kernel %s takes up to %d values a vector: plain MLX is used for %d.", kernel, most, dim
        )
    return dim <= most


def compare(
    output: mx.array, expected: mx.array, dtype: mx.Dtype, arithmetic: float | None = None
) -> Agreement:
    """Allows two roundings to the output's dtype, and ``arithmetic`` on the way there.

    The default is for float32 sums in another order, in which MLX's own products on CUDA round the
    factors to TF32.
    """
    if arithmetic is None:
        tf32 = backend() == "cuda" and os.environ.get("MLX_ENABLE_TF32") != "0"
        arithmetic = 1e-3 if tf32 else 2e-5
    expected = expected.astype(mx.float32)
    difference = mx.abs(output.astype(mx.float32) - expected).max() / mx.abs(expected).max()
    return Agreement(difference.item(), 2 * mx.finfo(dtype).eps + arithmetic)


def worst(agreements: list[Agreement]) -> Agreement:
    """One that does not hold, or the one with the largest error."""
    # Not max() of the errors: one that is not a number must stay one.
    return next((each for each in agreements if not each.holds), max(agreements))


def build(
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    constants: dict[str, Constant],
    cuda_blocks: int = 2,
) -> Launch:
    """The kernel of metal/NAME.metal with these constants, called as ``mx.fast`` describes.

    So many threadgroups of 256 threads fit the registers of a CUDA multiprocessor: 1 leaves a
    thread 255 registers, 2 leave it 128, 3 leave it 80.
    """
    # Constants are part of the text: as template arguments they would cost the host time at each
    # launch. All types are among them: MLX tells compiled kernels apart by their names alone.
    definitions = [_definition(*pair) for pair in (("LANES", LANES), *constants.items())]
    label = "_".join(_TYPES.get(value, str(value)) for value in constants.values())
    names = {"input_names": inputs, "output_names": outputs}
    names |= {"name": f"turboquant_{name}_{label}"}
    file, functions = _file(f"{name}.metal"), _FUNCTIONS.get(name, f"{name}.h")
    body = file.read_text(encoding="ascii")
    # What functions are made for comes before them.
    header = "\n".join(definitions) + "\n"
    on_metal = backend() == "metal"
    if on_metal and not _metal_reads_files():
        header += _joined(functions, set())
        source = _without_comments(body)
        return _built(mx.fast.metal_kernel, **names, header=header, source=source)
    # MLX copies the text at each launch, a microsecond a kilobyte: the compiler gets the files'
    # names, and a comment has what MLX looks for in the text.
    used = " ".join(sorted(set(re.findall(r"\w+_shape\b|thread\w*_in_\w+|simd\w+_in_\w+", body))))
    source = f'// {used}\n#include "{file}"\n'
    if on_metal:
        header += _including(functions)
        return _built(mx.fast.metal_kernel, **names, header=header, source=source)
    macros = [each for each in definitions if each.startswith("#")]
    values = [each for each in definitions if not each.startswith("#")]
    lines = [
        f"#define TURBOQUANT_BLOCKS {cuda_blocks}",
        f'#define TURBOQUANT_FUNCTIONS "{_file(functions)}"',
        f"#define TURBOQUANT_CONSTANTS {' '.join(values)}",
        *macros,
        _including("metal_on_cuda.h"),
    ]
    source = f"TURBOQUANT_USING_DECLARATIONS\n{source}"
    return _built(mx.fast.cuda_kernel, **names, header="\n".join(lines), source=source)


@cache
def _built(make: Callable[..., Launch], **text: str | tuple[str, ...]) -> Launch:
    """The same kernel for all configurations that have the same text."""
    return make(**text)


@cache
def _metal_reads_files() -> bool:
    """Whether Metal's compiler takes the name of a file in place of its text: tried once."""
    kernel = mx.fast.metal_kernel(
        name="turboquant_include",
        input_names=["x"],
        output_names=["out"],
        header=_including("levels.h"),
        source="out[0] = x[0] + float(vector_words<128, 4>());",
    )
    try:
        (out,) = kernel(
            inputs=[mx.ones(1)],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
        )
        return out.item() == 17
    except RuntimeError:
        return False


def _file(name: str) -> Path:
    return Path(str(files("mlx_turboquant.metal").joinpath(name)))


def _including(name: str) -> str:
    return f'#include "{_file(name)}"\n'


def _definition(name: str, value: Constant) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {_TYPES[value]};"
    if isinstance(value, bool):  # which decides whether arguments exist
        return f"#define {name} {int(value)}"
    return f"constant constexpr int {name} = {value};"


def _joined(name: str, seen: set[str]) -> str:
    """The text of a header, with those that it includes in their places, each once."""
    if name in seen:
        return ""
    seen.add(name)
    text = _file(name).read_text(encoding="ascii").replace("#pragma once\n", "")
    text = re.sub(r'#include "(.*)"', lambda match: _joined(match[1], seen), text)
    return _without_comments(text)


def _without_comments(text: str) -> str:
    return re.sub(r"\n\s*", "\n", re.sub(r"//.*", "", text))
