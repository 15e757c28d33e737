"""Build the kernels of ``metal/`` for this machine, check them and replace those that fail.

The same text runs on Metal and, with ``metal_on_cuda.h`` in front, on CUDA. Each configuration of
a kernel is compared with plain MLX on small data before its first use. If it does not compile or
disagrees, plain MLX replaces it for the rest of the process, with a warning.
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

# Lanes of a SIMD group; kernels know it by this name.
LANES = 32
# SIMD groups per threadgroup, unless a kernel chooses otherwise.
SIMDS = 4
THREADGROUP_BYTES = 32768
BACKEND_VARIABLE = "MLX_TURBOQUANT_BACKEND"

# Headers of kernels that have none of their own name.
_FUNCTIONS = {"combine": "rotation.h", "inner_product": "levels.h"}
# Names of dtypes in the text of kernels.
_TYPES = {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.float32: "float"}

Constant = int | mx.Dtype
Launch = Callable[..., list[mx.array]]

_log = logging.getLogger("mlx_turboquant")
_forced_backend: str | None = None


class Agreement(NamedTuple):
    """The error of a kernel against plain MLX on small data, and what rounding explains."""

    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the kernel may be used; not if its error is NaN."""
        return self.error <= self.allowed


class Kernel(Protocol):
    """A kernel of ``metal/`` in one configuration: the arguments of its class."""

    def check(self) -> Agreement:
        """Compare it with plain MLX on small data."""


AnyKernel = TypeVar("AnyKernel", bound=Kernel)


def backend() -> str:
    """Return where kernels run: "metal", "cuda", or "reference" for plain MLX operations.

    The choice of :func:`force_backend` comes first. The environment variable
    ``MLX_TURBOQUANT_BACKEND``, which is read once, comes second, and the machine's own GPU last.

    Raises:
        ValueError: the variable names a backend that this machine does not have.
    """
    return _forced_backend or _machine_backend()


@cache
def _machine_backend() -> str:
    return _checked_backend(os.environ.get(BACKEND_VARIABLE), BACKEND_VARIABLE)


def force_backend(name: str | None) -> None:
    """Use the backend ``name`` in this process; None restores the default.

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
    """Return the checked kernel of a configuration; None if plain MLX replaces it."""
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
    """Whether a kernel takes vectors of ``dim`` values; if not, a warning is logged once."""
    if dim > most:
        _log.warning(
            "Kernel %s takes up to %d values a vector: plain MLX is used for %d.", kernel, most, dim
        )
    return dim <= most


def compare(
    output: mx.array, expected: mx.array, dtype: mx.Dtype, arithmetic: float | None = None
) -> Agreement:
    """Compare arrays, allowing two roundings to ``dtype`` and a relative error of ``arithmetic``.

    The default allows float32 sums in another order. On CUDA it is larger, because MLX's own
    products round their factors to TF32 there, unless ``MLX_ENABLE_TF32`` is 0.
    """
    if arithmetic is None:
        tf32 = backend() == "cuda" and os.environ.get("MLX_ENABLE_TF32") != "0"
        arithmetic = 1e-3 if tf32 else 2e-5
    expected = expected.astype(mx.float32)
    difference = mx.abs(output.astype(mx.float32) - expected).max() / mx.abs(expected).max()
    return Agreement(difference.item(), 2 * mx.finfo(dtype).eps + arithmetic)


def worst(agreements: list[Agreement]) -> Agreement:
    """Return one that does not hold, or the one with the largest error."""
    # max() of the errors could lose a NaN.
    return next((each for each in agreements if not each.holds), max(agreements))


def build(
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    constants: dict[str, Constant],
    cuda_blocks: int = 2,
) -> Launch:
    """Build the kernel of metal/NAME.metal with these constants, to be called as in ``mx.fast``.

    On CUDA ``cuda_blocks`` threadgroups of 256 threads must fit the registers of a multiprocessor:
    1 leaves a thread 255 registers, 2 leave it 128, 3 leave it 80.
    """
    # Constants are part of the text, because template arguments cost the host time at each launch.
    # The label has all of them, because MLX tells compiled kernels apart by their names alone.
    definitions = [_definition(*pair) for pair in (("LANES", LANES), *constants.items())]
    label = "_".join(_TYPES.get(value, str(value)) for value in constants.values())
    names = {"input_names": inputs, "output_names": outputs}
    names |= {"name": f"turboquant_{name}_{label}"}
    file, functions = _file(f"{name}.metal"), _FUNCTIONS.get(name, f"{name}.h")
    body = file.read_text(encoding="ascii")
    # Constants come first: the functions use them.
    header = "\n".join(definitions) + "\n"
    on_metal = backend() == "metal"
    if on_metal and not _metal_reads_files():
        header += _joined(functions, set())
        source = _without_comments(body)
        return _built(mx.fast.metal_kernel, **names, header=header, source=source)
    # MLX copies the text at each launch, a microsecond a kilobyte. So the text only includes the
    # file, and a comment has the names that MLX searches the text for.
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
    """Make one kernel for all configurations that have the same text."""
    return make(**text)


@cache
def _metal_reads_files() -> bool:
    """Whether Metal's compiler can include files; tried once."""
    kernel = mx.fast.metal_kernel(
        name="turboquant_include",
        input_names=["x"],
        output_names=["out"],
        header=_including("levels.h"),
        source="out[0] = x[0] + float(vector_words<128, 0x4444>());",
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
    if isinstance(value, bool):  # for #if: it decides whether arguments exist
        return f"#define {name} {int(value)}"
    return f"constant constexpr int {name} = {value};"


def _joined(name: str, seen: set[str]) -> str:
    """Return the text of a header with its includes expanded, each once."""
    if name in seen:
        return ""
    seen.add(name)
    text = _file(name).read_text(encoding="ascii").replace("#pragma once\n", "")
    text = re.sub(r'#include "(.*)"', lambda match: _joined(match[1], seen), text)
    return _without_comments(text)


def _without_comments(text: str) -> str:
    return re.sub(r"\n\s*", "\n", re.sub(r"//.*", "", text))
