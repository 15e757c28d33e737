"""Rebuild the Metal function text that MLX generates around a kernel body.

``mx.fast.metal_kernel`` takes only the body of a kernel. MLX writes the function head itself:
template parameters, buffers, shapes and strides, thread attributes. This module writes the same
text, byte for byte.
"""

import math
import re
from dataclasses import dataclass

import mlx.core as mx

# MLX dtype name -> Metal type name, as MLX spells it.
METAL_TYPES = {
    "bool": "bool",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
    "uint64": "uint64_t",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    "float32": "float",
}

# Attributes that MLX adds when their name occurs in the body, in MLX's order:
# name -> (Metal type, field of the executor's ThreadPosition, or None when it is always 0).
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": ("uint", "quadgroups"),
    "dispatch_simdgroups_per_threadgroup": ("uint", "simdgroups"),
    "dispatch_threads_per_threadgroup": ("uint3", "full_group_size"),
    "grid_origin": ("uint3", None),
    "grid_size": ("uint3", "grid_size"),
    "quadgroup_index_in_threadgroup": ("uint", "quadgroup"),
    "quadgroups_per_threadgroup": ("uint", "quadgroups"),
    "simdgroup_index_in_threadgroup": ("uint", "simdgroup"),
    "simdgroups_per_threadgroup": ("uint", "simdgroups"),
    "thread_execution_width": ("uint", "simd_width"),
    "thread_index_in_quadgroup": ("uint", "quad_lane"),
    "thread_index_in_simdgroup": ("uint", "lane"),
    "thread_index_in_threadgroup": ("uint", "index"),
    "thread_position_in_grid": ("uint3", "in_grid"),
    "thread_position_in_threadgroup": ("uint3", "in_threadgroup"),
    "threadgroup_position_in_grid": ("uint3", "group_position"),
    "threadgroups_per_grid": ("uint3", "group_count"),
    "threads_per_grid": ("uint3", "grid_size"),
    "threads_per_simdgroup": ("uint", "simd_width"),
    "threads_per_threadgroup": ("uint3", "group_size"),
}

# Metadata of an input that MLX passes if the body uses it: suffix -> (Metal type, * or &).
METADATA = {
    "shape": ("const constant int", "*"),
    "strides": ("const constant int64_t", "*"),
    "ndim": ("const constant int", "&"),
}

# MLX passes inputs with fewer elements than this in the `constant` address space.
CONSTANT_LIMIT = 8


@dataclass(frozen=True)
class Argument:
    """One array: its name in the kernel, its dtype's name, its shape (outputs have none)."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None = None

    @property
    def is_constant(self) -> bool:
        """Whether MLX passes this input in the `constant` address space."""
        return math.prod(self.shape) < CONSTANT_LIMIT


@dataclass(frozen=True)
class Parameter:
    """One parameter of the generated function: a buffer, or a thread attribute.

    The type of a buffer stands without its final * or &.
    """

    text: str
    type: str
    is_pointer: bool = False
    attribute: str | None = None


@dataclass(frozen=True)
class Signature:
    """Generated Metal text, the expression that names the instantiated function, its parameters."""

    text: str
    function: str
    parameters: tuple[Parameter, ...]


def dtype_name(dtype: mx.Dtype) -> str:
    """``mx.float16`` -> ``"float16"``."""
    return str(dtype).split(".")[-1]


def metadata_names(name: str, source: str) -> list[str]:
    """The METADATA of an input that the body uses: MLX looks for the substring."""
    return [suffix for suffix in METADATA if f"{name}_{suffix}" in source]


def write_signature(
    name: str,
    header: str,
    source: str,
    inputs: list[Argument],
    outputs: list[Argument],
    template: list[tuple[str, object]] | None = None,
) -> Signature:
    """The Signature of one kernel call."""
    template = template or []
    values = ", ".join(_template_value(value) for _, value in template)
    template_arguments = f"<{values}>" if template else ""
    function = _mangled_name(name, inputs, outputs, template_arguments)
    parameters = _buffer_parameters(source, inputs, outputs) + _attribute_parameters(source)

    text = header
    if template:
        kinds = ", ".join(f"{_template_kind(value)} {name}" for name, value in template)
        text += f"template <{kinds}>\n"
    text += f"[[kernel]] void {function}(\n"
    text += ",\n".join(parameter.text for parameter in parameters)
    text += ") {\n" + source + "\n}\n"
    instance = function + template_arguments
    if template:
        text += f'\ntemplate [[host_name("{function}")]] [[kernel]] '
        text += f"decltype({instance}) {instance};\n"
    return Signature(text, instance, tuple(parameters))


def _template_value(value: object) -> str:
    return str(int(value)) if isinstance(value, int) else METAL_TYPES[dtype_name(value)]


def _template_kind(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    return "int" if isinstance(value, int) else "typename"


def _mangled_name(
    name: str, inputs: list[Argument], outputs: list[Argument], template_arguments: str
) -> str:
    """MLX's unique kernel name: template values, then a type (and kind) for every array."""
    mangled = "custom_kernel_" + name
    if template_arguments:
        mangled += "_" + re.sub(r"[<>-]", "_", template_arguments).replace(", ", "_")[:-1]
    for argument in inputs:
        kind = "s" if argument.shape == () else "c" if argument.is_constant else ""
        mangled += f"_{METAL_TYPES[argument.dtype]}{kind}"
    for argument in outputs:
        mangled += "_" + METAL_TYPES[argument.dtype]
    return mangled


def _buffer_parameters(
    source: str, inputs: list[Argument], outputs: list[Argument]
) -> list[Parameter]:
    declarations = []  # (type, pointer or reference, name)
    for argument in inputs:
        space = "constant" if argument.is_constant else "device"
        type_ = f"const {space} {METAL_TYPES[argument.dtype]}"
        declarations.append((type_, "*" if argument.shape else "&", argument.name))
        if argument.shape:
            for suffix in metadata_names(argument.name, source):
                declarations.append((*METADATA[suffix], f"{argument.name}_{suffix}"))
    for argument in outputs:
        declarations.append((f"device {METAL_TYPES[argument.dtype]}", "*", argument.name))
    return [
        Parameter(f"  {type_}{reference} {name} [[buffer({i})]]", type_, reference == "*")
        for i, (type_, reference, name) in enumerate(declarations)
    ]


def _attribute_parameters(source: str) -> list[Parameter]:
    return [
        Parameter(f"  {type_} {attribute} [[{attribute}]]", type_, attribute=attribute)
        for attribute, (type_, _) in ATTRIBUTES.items()
        if attribute in source
    ]
