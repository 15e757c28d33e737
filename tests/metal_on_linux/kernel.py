"""The stand-in for ``mx.fast.metal_kernel``: same arguments, same call, run on the CPU."""

import math

import mlx.core as mx
import numpy as np

from .executor import (
    INITIALISED_OUTPUT,
    INPUT,
    OUTPUT,
    Buffer,
    KernelReport,
    Options,
    build,
    entry_point,
    launch,
)
from .signature import (
    ATTRIBUTES,
    Argument,
    Parameter,
    Signature,
    dtype_name,
    metadata_names,
    write_signature,
)

# MLX puts these in front of every kernel.
_PREAMBLE = '#include <metal_stdlib>\n#include "mlx/backend/metal/kernels/utils.h"\n'

# MLX dtypes that numpy lacks or stores in another way -> MLX dtype with the same bytes.
_STORED_AS = {mx.bfloat16: mx.uint16, mx.bool_: mx.uint8}

_ALIGNMENT = 64

Size = tuple[int, int, int]
Template = list[tuple[str, object]]


def metal_kernel(
    name: str,
    input_names: list[str],
    output_names: list[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: object | None = None,
) -> "Kernel":
    """A kernel from the arguments of ``mx.fast.metal_kernel``.

    ``compile_options`` (the math mode) have no effect here; atomic outputs are refused.
    """
    if atomic_outputs:
        raise NotImplementedError("metal_on_linux has no atomic outputs")
    return Kernel(name, input_names, output_names, source, header, ensure_row_contiguous)


class Kernel:
    """What ``metal_kernel`` returns; it is called as MLX's kernels are.

    Set before a call: ``memory_check`` (bool), ``order`` ("forward", "reverse" or "random"),
    ``seed`` of the random order, ``workers`` (OS threads, 0 for one per CPU; the memory checker and
    permuted orders use one), ``raise_on_report``. After a call ``reports`` lists the findings.
    """

    def __init__(
        self,
        name: str,
        input_names: list[str],
        output_names: list[str],
        source: str,
        header: str,
        ensure_row_contiguous: bool,
    ):
        self.name = name
        self.input_names = list(input_names)
        self.output_names = list(output_names)
        self.source = source
        self.header = header
        self.ensure_row_contiguous = ensure_row_contiguous
        self.memory_check = False
        self.order = "forward"
        self.seed = 0
        self.workers = 0
        self.raise_on_report = True
        self.reports: list[str] = []

    def __call__(
        self,
        *,
        inputs: list[object],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
        grid: Size,
        threadgroup: Size,
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: object | None = None,
    ) -> list[mx.array]:
        """Run the kernel; the arguments are those of a call on a Mac."""
        inputs = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        signature = self.signature(inputs, output_dtypes, template)
        if verbose:
            print(signature.text)
        library = build(self.program(signature), self.memory_check)
        outputs = self._output_buffers(output_shapes, output_dtypes, init_value)
        options = Options(self.workers, self.order, self.seed, self.memory_check)
        buffers = self._input_buffers(inputs) + outputs
        self.reports = launch(library, buffers, grid, threadgroup, options)
        if self.reports and self.raise_on_report:
            raise KernelReport("\n".join([f"{self.name}:", *self.reports]))
        return [_to_mlx(buffer.array, dtype) for buffer, dtype in zip(outputs, output_dtypes)]

    def signature(
        self, inputs: list[mx.array], output_dtypes: list[mx.Dtype], template: Template | None
    ) -> Signature:
        """The text that MLX would generate for a call with these arguments."""
        input_arguments = [
            Argument(name, dtype_name(array.dtype), array.shape)
            for name, array in zip(self.input_names, inputs, strict=True)
        ]
        output_arguments = [
            Argument(name, dtype_name(dtype))
            for name, dtype in zip(self.output_names, output_dtypes, strict=True)
        ]
        return write_signature(
            self.name, self.header, self.source, input_arguments, output_arguments, template
        )

    def program(self, signature: Signature) -> str:
        """Complete Metal text: MLX's preamble, the generated function, the executor's entry."""
        arguments = [_argument(i, one) for i, one in enumerate(signature.parameters)]
        marker = f'# 1 "{self.name}.metal"\n'
        return _PREAMBLE + marker + signature.text + entry_point(signature.function, arguments)

    def _input_buffers(self, inputs: list[mx.array]) -> list[Buffer]:
        buffers = []
        for name, array in zip(self.input_names, inputs):
            data = _to_numpy(array)
            if self.ensure_row_contiguous or data.flags.c_contiguous:
                data = _aligned_copy(data)
            buffers.append(Buffer(name, data, INPUT))
            if data.ndim:
                buffers += _metadata_buffers(name, data, self.source)
        return buffers

    def _output_buffers(
        self, shapes: list[tuple[int, ...]], dtypes: list[mx.Dtype], init_value: float | None
    ) -> list[Buffer]:
        buffers = []
        for name, shape, dtype in zip(self.output_names, shapes, dtypes, strict=True):
            value = _to_numpy(mx.array(init_value or 0).astype(dtype))
            array = _aligned_copy(np.broadcast_to(value, shape))
            if init_value is None:
                array.reshape(-1).view(np.uint8)[...] = 0xFF  # NaN or -1: easy to notice
            kind = OUTPUT if init_value is None else INITIALISED_OUTPUT
            buffers.append(Buffer(name, array, kind))
        return buffers


def _argument(index: int, parameter: Parameter) -> str:
    """The argument that the entry point passes for a parameter of the generated function."""
    if parameter.attribute:
        field = ATTRIBUTES[parameter.attribute][1]
        return f"_position->{field}" if field else "uint3{0, 0, 0}"
    return f"{'' if parameter.is_pointer else '*'}({parameter.type}*)_args[{index}]"


def _metadata_buffers(name: str, data: np.ndarray, source: str) -> list[Buffer]:
    strides = [stride // data.itemsize for stride in data.strides]
    arrays = {
        "shape": np.array(data.shape, np.int32),
        "strides": np.array(strides, np.int64),
        "ndim": np.array([data.ndim], np.int32),
    }
    used = metadata_names(name, source)
    return [Buffer(f"{name}_{suffix}", arrays[suffix], INPUT) for suffix in used]


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    """A contiguous copy that starts where any vector can be loaded, as buffers do on Metal."""
    size = math.prod(array.shape) * array.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + size].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _to_numpy(array: mx.array) -> np.ndarray:
    """The same bytes, with their strides; without a copy where possible."""
    array = array.view(_STORED_AS.get(array.dtype, array.dtype))
    return np.asarray(memoryview(array)) if array.size else np.array(array)


def _to_mlx(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(array).view(dtype)
