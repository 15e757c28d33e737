"""Kernels keep their arrays in registers, however reluctantly a compiler unrolls loops.

An array whose index is known only at run time lies in memory, which is slow on Apple's GPUs. So a
loop over registers must be unrolled, and ``#pragma unroll`` says so. How much Apple's compiler
unrolls by itself is not known. clang compiles each kernel with its own limits and unrolling
nothing but what a pragma names.
"""

import re
import tempfile
from pathlib import Path

import metal_on_linux
import mlx.core as mx
import pytest
from metal_on_linux import toolchain
from metal_on_linux.translate import translate
from tokens import basis_of

from mlx_turboquant.codec.quantizer import TurboQuantizer
from mlx_turboquant.kernels import arguments, runtime
from mlx_turboquant.kernels.attention import Configuration, DecodeAttention
from mlx_turboquant.kernels.quantize import Dequantize, InnerProduct, Quantize
from mlx_turboquant.kernels.storage import shared_quantizer

try:
    toolchain.clang()
except toolchain.ToolchainError as error:
    pytest.skip(str(error), allow_module_level=True)

ONLY_PRAGMAS = "-fno-unroll-loops"
# A vectorizer of CPUs would make arrays of its own.
FLAGS = ["-w", "-O2", "-fno-vectorize", "-fno-slp-vectorize", "-fno-discard-value-names"]


@pytest.fixture
def programs(monkeypatch):
    """The text of every kernel that is called, by name; calls return zeros."""
    texts = {}

    def make(**arguments):
        kernel = metal_on_linux.metal_kernel(**arguments)

        def launch(*, inputs, output_shapes, output_dtypes, **_):
            texts[kernel.name] = kernel.program(kernel.signature(inputs, output_dtypes, None))
            return [mx.zeros(*each) for each in zip(output_shapes, output_dtypes)]

        return launch

    monkeypatch.setattr(mx.fast, "metal_kernel", make)
    monkeypatch.setattr(runtime, "backend", lambda: "metal")
    monkeypatch.setattr(runtime, "_metal_reads_files", lambda: False)
    return texts


def arrays_in_memory(program: str, *flags: str) -> list[str]:
    """Names and types of the private arrays that are left in the compiled program."""

    def compiled() -> list[str]:
        with tempfile.NamedTemporaryFile("w", suffix=".metal") as file:
            file.write(translate(program, toolchain.mlx_include_directory()))
            file.flush()
            command = [*toolchain.clang(), *toolchain.LANGUAGE_FLAGS, *FLAGS, *flags]
            done = toolchain.start([*command, "-emit-llvm", "-S", "-o", "-", file.name])
        assert done.returncode == 0, done.stderr
        # Single values are in memory where a SIMD function of the executor takes their address.
        return re.findall(r"%([\w.]+ = alloca [%<{\[].*), align", done.stdout)

    return toolchain.remember(compiled, program, *flags, Path(__file__).read_text())


def keys_with_pattern(dim, bits, spread, codec="scalar"):
    """A quantizer of keys whose bits differ within a run, the more the larger the ``spread``."""
    quantizer = TurboQuantizer(dim, bits, basis=basis_of(dim, 2, spread), codec=codec)
    assert isinstance(quantizer.pattern, tuple)
    return arguments.example(quantizer)


def attention(
    dim,
    key_bits,
    value_bits,
    query_rows,
    mask,
    dtype=mx.bfloat16,
    is_latent=False,
    spread=0,
    codec="scalar",
):
    keys = shared_quantizer(dim, key_bits, 0, None, codec)
    if spread:
        keys = keys_with_pattern(dim, key_bits, spread, codec)
    values = keys if is_latent else shared_quantizer(dim, value_bits, 0, None, codec)
    dtypes = (dtype, dtype, dtype)
    return Configuration(keys, values, *dtypes, query_rows, 1, mask, mask == "causal", is_latent)


@pytest.mark.parametrize(
    "configuration",
    [
        attention(128, 4, 4, 1, "none"),
        attention(80, 3, 5, 4, "boolean", mx.float16),
        attention(96, 6, 3, 3, "additive", mx.float32),
        attention(256, 2, 8, 6, "none"),
        attention(128, 7, 7, 8, "causal"),
        attention(512, 4, 4, 4, "none", is_latent=True),
        attention(128, 3, 4, 4, "none", spread=2),  # 5, 3, 2, 2 bits
        attention(256, 4, 4, 8, "causal", spread=3),  # 7, 4, 3, 2 bits
        attention(64, 2, 2, 1, "additive", mx.float16, spread=3),  # 5, 2, 1, 0 bits
        attention(128, 4, 4, 4, "none", codec="trellis"),
        attention(80, 3, 2, 8, "causal", mx.float16, codec="trellis"),
        attention(512, 3, 3, 4, "none", is_latent=True, codec="trellis"),
        attention(256, 4, 1, 8, "none", spread=3, codec="trellis"),  # 7, 4, 3, 2 bits
    ],
)
@pytest.mark.parametrize("pair_table", [0, 1])
def test_attention_keeps_its_arrays_in_registers(programs, configuration, pair_table):
    [(least, tuning)] = DecodeAttention(configuration).tunings
    programs.clear()
    DecodeAttention(configuration, ((least, tuning._replace(pair_table=pair_table)),)).check()
    assert len(programs) == 2
    for program in programs.values():
        assert arrays_in_memory(program) == arrays_in_memory(program, ONLY_PRAGMAS) == []


@pytest.mark.parametrize(
    "dim, bits, dtype, codec",
    [
        (128, 4, mx.bfloat16, "scalar"),
        (80, 3, mx.float16, "scalar"),
        (512, 8, mx.float32, "scalar"),
        (128, 4, mx.bfloat16, "trellis"),
        (80, 3, mx.float16, "trellis"),
        (256, 1, mx.float32, "trellis"),
    ],
)
def test_other_kernels_keep_their_arrays_in_registers(programs, dim, bits, dtype, codec):
    quantizer = shared_quantizer(dim, bits, 0, None, codec)
    Quantize((dtype,), (quantizer,)).check()
    Dequantize((dtype,), (quantizer,)).check()
    InnerProduct(quantizer).check()
    assert len(programs) == 3
    for program in programs.values():
        assert arrays_in_memory(program) == arrays_in_memory(program, ONLY_PRAGMAS) == []


@pytest.mark.parametrize(
    "dim, bits, spread, dtype",
    [
        (128, 3, 2, mx.bfloat16),  # 5, 3, 2, 2 bits
        (64, 2, 3, mx.float16),  # 5, 2, 1, 0 bits
        (96, 7, 2, mx.float32),  # 8, 7, 7, 6 bits
    ],
)
def test_kernels_of_a_pattern_keep_their_arrays_in_registers(programs, dim, bits, spread, dtype):
    quantizer = keys_with_pattern(dim, bits, spread)
    Quantize((dtype,), (quantizer,)).check()
    Dequantize((dtype,), (quantizer,)).check()
    assert len(programs) == 2
    for program in programs.values():
        assert arrays_in_memory(program) == arrays_in_memory(program, ONLY_PRAGMAS) == []


@pytest.mark.parametrize(
    "loop, array",
    [
        ("for (int r = 0; r < ROWS; r++) {\nfloat score = scores[0][r];", "running"),
        ("for (int t = 0; t < TOKENS; t++) {\nsums[t][r] = add_product(", "scores"),
        ("for (int b = 0; b < BATCH; b++) {\nconst uint token =", "values"),
    ],
)
def test_a_loop_without_its_pragma_is_found(programs, loop, array):
    DecodeAttention(attention(128, 4, 4, 4, "none")).check()
    program = next(text for name, text in programs.items() if "decode_attention" in name)
    assert f"#pragma unroll\n{loop}" in program
    found = arrays_in_memory(program.replace(f"#pragma unroll\n{loop}", loop), ONLY_PRAGMAS)
    assert any(name.startswith(array) for name in found)
