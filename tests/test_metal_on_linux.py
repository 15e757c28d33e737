"""The tool that checks and runs Metal kernels on Linux accepts and computes what Metal does."""

import ctypes
import itertools
import os
import shutil
import sys
import tempfile

import mlx.core as mx
import numpy as np
import pytest
from executor_stamp import stamp
from metal_on_linux import IS_SUPPORTED, KernelReport, check, metal_kernel

pytestmark = [
    pytest.mark.skipif(
        not IS_SUPPORTED, reason="metal_on_linux runs kernels on x86-64 Linux with AVX2 only"
    ),
    pytest.mark.skipif(
        IS_SUPPORTED and stamp().exists(),
        reason="metal_on_linux has not changed since these tests passed: "
        "METAL_ON_LINUX_CACHE=$(mktemp -d) runs them all the same",
    ),
]

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
ORDERS = ["forward", "reverse", "random"]
# Rounding of results in the dtype; the arithmetic in between is float32.
PRECISION = {mx.float32: 2e-6, mx.float16: 5e-4, mx.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def fixed_seed():
    mx.random.seed(0)


def max_error(array, reference):
    """Largest absolute difference; NaN when either side has one."""
    return mx.abs(array.astype(mx.float32) - reference.astype(mx.float32)).max().item()


def run(source, inputs, grid, threadgroup, shape, dtype, memory_check=True, header="", **options):
    """The output of a kernel with inputs a, b, ...; the memory checker must have no report."""
    names = ["a", "b", "c"][: len(inputs)]
    kernel = metal_kernel("sample", names, ["out"], source, header, **options)
    kernel.memory_check = memory_check
    call = dict(grid=grid, threadgroup=threadgroup, output_shapes=[shape], output_dtypes=[dtype])
    return kernel(inputs=inputs, **call)[0]


# ---------------------------------------------------------------- the generated text
SIGNATURE_KERNEL = dict(
    name="sample",
    input_names=["x", "y", "z", "s"],
    output_names=["out", "out2"],
    source="uint e = thread_position_in_grid.x; uint l = thread_index_in_simdgroup;\n"
    "  int q = x_shape[0] + int(y_strides[0]) + z_ndim; out[e] = x[e] + y[e] + z[e];",
    header="inline float helper(float a) { return a; }\n",
)
SIGNATURE_OUTPUTS = [mx.float32, mx.uint32]


def text_by_mlx(inputs, template):
    """Without a GPU MLX still writes the text when a call is traced, and ``verbose`` prints it."""
    kernel = mx.fast.metal_kernel(**SIGNATURE_KERNEL)

    def call(*arrays):
        return kernel(
            inputs=list(arrays),
            template=template,
            grid=(64, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(64,), (3,)],
            output_dtypes=SIGNATURE_OUTPUTS,
            verbose=True,
        )

    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "traced.mlxfn")
        printed = printed_by(lambda: mx.export_function(path, call, *inputs))
    return printed.split("```\n", 1)[1].rsplit("\n```", 1)[0]


def printed_by(action):
    """What C++ code prints, caught at the file descriptor."""
    with tempfile.TemporaryFile() as capture:
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(capture.fileno(), 1)
        try:
            action()
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(stdout, 1)
            os.close(stdout)
        capture.seek(0)
        return capture.read().decode()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint8, mx.int64], ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 4)], ids=str)
@pytest.mark.parametrize(
    "template",
    [None, [("T", mx.bfloat16), ("N", 7), ("B", False)], [("K", -3)]],
    ids=["plain", "T-N-B", "K"],
)
def test_the_text_is_the_one_that_mlx_writes(dtype, shape, template):
    inputs = [mx.zeros(shape, dtype), mx.zeros((5,)), mx.zeros((16, 2), dtype), mx.array(1.0)]
    ours = metal_kernel(**SIGNATURE_KERNEL).signature(inputs, SIGNATURE_OUTPUTS, template)
    assert ours.text.strip() == text_by_mlx(inputs, template).strip()


# ---------------------------------------------------------------- results
# 3-bit dequantisation: a thread unpacks the 8 values of a 3-byte pack.
DEQUANTIZE_HEADER = """
METAL_FUNC uint unpack(const device uint8_t* p, uint i) {
  uint word = uint(p[0]) | (uint(p[1]) << 8) | (uint(p[2]) << 16);
  return extract_bits(word, i * 3, 3);
}
"""
DEQUANTIZE = """
  uint pack = thread_position_in_grid.x;
  if (pack >= uint(PACKS)) return;
  float s = float(scales[pack / 8]), b = float(biases[pack / 8]);
  for (uint i = 0; i < 8; i++) out[pack * 8 + i] = T(float(unpack(w + pack * 3, i)) * s + b);
"""

# Fused decode attention: a threadgroup per head, NS SIMD groups, online softmax.
ATTENTION = """
  constexpr int E = D / 32;  // elements of a row that a lane holds
  threadgroup float part[NS * D];
  threadgroup float pm[NS];
  threadgroup float ps[NS];
  uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
  uint h = threadgroup_position_in_grid.x;
  int S = k_shape[2];
  const device T* kp = k + (size_t(h) * S + sg) * D + lane * E;
  const device T* vp = v + (size_t(h) * S + sg) * D + lane * E;
  float qr[E], acc[E];
  for (int i = 0; i < E; i++) { qr[i] = float(q[h * D + lane * E + i]) * scale[0]; acc[i] = 0; }
  float m = -INFINITY, sum = 0;
  for (int t = sg; t < S; t += NS) {
    float x = 0;
    for (int i = 0; i < E; i++) x += qr[i] * float(kp[i]);
    x = simd_sum(x);
    float mn = max(m, x), f = fast::exp(m - mn), p = fast::exp(x - mn);
    sum = sum * f + p;
    for (int i = 0; i < E; i++) acc[i] = acc[i] * f + p * float(vp[i]);
    m = mn; kp += NS * D; vp += NS * D;
  }
  if (lane == 0) { pm[sg] = m; ps[sg] = sum; }
  for (int i = 0; i < E; i++) part[sg * D + lane * E + i] = acc[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float M = -INFINITY, Z = 0;
  for (int j = 0; j < NS; j++) M = max(M, pm[j]);
  for (int j = 0; j < NS; j++) Z += ps[j] * fast::exp(pm[j] - M);
  for (int d = thread_index_in_threadgroup; d < D; d += NS * 32) {
    float r = 0;
    for (int j = 0; j < NS; j++) r += part[j * D + d] * fast::exp(pm[j] - M);
    out[h * D + d] = T(r / Z);
  }
"""


def dequantize(dtype, rows=16, columns=512):
    """(kernel, call, reference) for a random 3-bit quantised matrix."""
    weights = mx.random.normal((rows, columns)).astype(dtype)
    packed, scales, biases = mx.quantize(weights, group_size=64, bits=3)
    packs = weights.size // 8
    call = dict(
        inputs=[packed.view(mx.uint8), scales, biases],
        template=[("T", dtype), ("PACKS", packs)],
        grid=(packs, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[weights.shape],
        output_dtypes=[dtype],
    )
    names = ["w", "scales", "biases"]
    kernel = metal_kernel("dequantize", names, ["out"], DEQUANTIZE, DEQUANTIZE_HEADER)
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return kernel, call, mx.dequantize(packed, scales, biases, group_size=64, bits=3)


def attention(dtype, heads=2, tokens=37, dim=64, simdgroups=4, source=ATTENTION, header=""):
    """(kernel, call, reference) for one decode step."""
    q = mx.random.normal((1, heads, 1, dim)).astype(dtype)
    k, v = mx.random.normal((2, 1, heads, tokens, dim)).astype(dtype)
    threads = 32 * simdgroups
    call = dict(
        inputs=[q, k, v, mx.array([dim**-0.5])],
        template=[("T", dtype), ("D", dim), ("NS", simdgroups)],
        grid=(heads * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[dtype],
    )
    kernel = metal_kernel("attention", ["q", "k", "v", "scale"], ["out"], source, header)
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    return kernel, call, mx.fast.scaled_dot_product_attention(q, k, v, scale=dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [dequantize, attention])
def test_results_are_right_and_the_same_in_every_order(make, dtype):
    kernel, call, reference = make(dtype)
    assert check(kernel, **call) == []
    (expected,) = kernel(**call)
    assert max_error(expected, reference) <= PRECISION[dtype] * max(1, mx.abs(reference).max())
    kernel.workers = 3
    assert mx.array_equal(kernel(**call)[0], expected)
    for memory_check, order in itertools.product((False, True), ORDERS):
        kernel.memory_check, kernel.order = memory_check, order
        (out,) = kernel(**call)
        assert max_error(out, expected) <= PRECISION[dtype]


def test_simd_functions():
    source = """
      uint i = thread_position_in_grid.x, lane = thread_index_in_simdgroup;
      float x = a[i];
      ulong votes = ulong(simd_ballot(x > 0.0f));
      float results[COLUMNS] = {
        simd_sum(x), simd_max(x), simd_min(x), simd_shuffle(x, ushort((lane + 3) & 31)),
        simd_shuffle_xor(x, 5), simd_broadcast(x, 7), simd_broadcast_first(x),
        simd_prefix_inclusive_sum(x), float(popcount(votes)), simd_any(x > 2.0f) ? 1.0f : 0.0f,
        simd_all(x > -9.0f) ? 1.0f : 0.0f,
      };
      float down = simd_shuffle_down(x, 4), up = simd_shuffle_up(x, 2);
      for (int j = 0; j < COLUMNS; j++) out[i * (COLUMNS + 2) + j] = results[j];
      out[i * (COLUMNS + 2) + COLUMNS] = lane < 28 ? down : 0.0f;
      out[i * (COLUMNS + 2) + COLUMNS + 1] = lane >= 2 ? up : 0.0f;
    """.replace("COLUMNS", "11")
    x = mx.random.normal((128,))
    out = np.array(run(source, [x], (128, 1, 1), (64, 1, 1), (128, 13), mx.float32))
    groups, lane = np.array(x).reshape(4, 32), np.arange(32)
    columns = [
        *(np.repeat(f(groups, axis=1), 32) for f in (np.sum, np.max, np.min)),
        *(groups[:, index] for index in ((lane + 3) & 31, lane ^ 5, lane * 0 + 7, lane * 0)),
        np.cumsum(groups, axis=1),
        *(np.repeat(f(axis=1), 32) for f in ((groups > 0).sum, (groups > 2).any)),
        np.ones((4, 32)),
        np.where(lane < 28, groups[:, (lane + 4) & 31], 0),
        np.where(lane >= 2, groups[:, (lane - 2) & 31], 0),
    ]
    for i, column in enumerate(columns):
        np.testing.assert_allclose(out[:, i], column.ravel(), atol=1e-5, err_msg=f"column {i}")


def test_bfloat_simd_functions_go_through_the_headers_of_mlx():
    source = (
        "uint i = thread_position_in_grid.x; out[i] = simd_max(a[i]) + simd_shuffle_xor(a[i], 1);"
    )
    x = mx.random.normal((32,)).astype(mx.bfloat16)
    out = run(source, [x], (32, 1, 1), (32, 1, 1), (32,), mx.bfloat16)
    assert mx.array_equal(out, x.max() + x[mx.arange(32) ^ 1])


def test_math_functions():
    source = """
      uint i = thread_position_in_grid.x;
      float x = a[i];
      float results[12] = {
        exp(x), fast::exp(x), exp2(x), rsqrt(fabs(x)), sqrt(abs(x)), fma(x, x, 1.0f), min(x, 0.5f),
        max(x, 0.5f), clamp(x, -1.0f, 1.0f), float(half(x)), as_type<float>(as_type<uint>(x) ^ 1u),
        float(popcount(as_type<uint>(x))),
      };
      for (int j = 0; j < 12; j++) out[i * 12 + j] = results[j];
    """
    x = mx.random.normal((64,))
    out = np.array(run(source, [x], (64, 1, 1), (64, 1, 1), (64, 12), mx.float32))
    x = np.array(x)
    bits, magnitude = x.view(np.uint32), np.abs(x)
    columns = [
        *(np.exp(x), np.exp(x), np.exp2(x), 1 / np.sqrt(magnitude), np.sqrt(magnitude)),
        *(x * x + 1, np.minimum(x, 0.5), np.maximum(x, 0.5), np.clip(x, -1, 1)),
        *(x.astype(np.float16), (bits ^ 1).view(np.float32), np.bitwise_count(bits)),
    ]
    np.testing.assert_allclose(out, np.stack(columns, axis=1), rtol=1e-6)


def test_vectors():
    """Constructors, components, operators, conversions, aliases, arrays in threadgroup memory."""
    source = """
      using pair = vec<float, 2>;
      const device float4* rows = (const device float4*)a;
      threadgroup float2 shared[2], other;
      float4 v = float4(a[0], a[1], float2(a[2], a[3]));
      pair p = pair(v.x, v.y);
      half4 h = half4(v);
      half2 low = half2(h.x, h.y) * half2(2.0h);
      uint4 u = uint4(v) << 1;
      uint2 w = uint2(u.z, u.w) & uint2(7u);
      if (thread_index_in_threadgroup == 0) { shared[0] = p; shared[1] = v.zw; other = float2(1); }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      out[thread_position_in_grid.x] = dot(v, rows[1]) + shared[1].y + shared[0].x + other.x
          + float(low.y) + float(w.x) + float(w.y) + v[2];
    """
    x = mx.arange(8).astype(mx.float32)
    out = run(source, [x], (2, 1, 1), (2, 1, 1), (2,), mx.float32)
    dot = 0 * 4 + 1 * 5 + 2 * 6 + 3 * 7
    assert out.tolist() == [dot + 3 + 0 + 1 + 2 + 4 + 6 + 2] * 2


def test_simdgroup_barrier_orders_an_exchange_inside_a_simd_group():
    source = """
      threadgroup float buffer[64];
      uint t = thread_index_in_threadgroup;
      buffer[t] = a[t];
      BARRIER
      out[t] = buffer[t ^ 1];
    """
    x = mx.random.normal((64,))
    barrier = "simdgroup_barrier(mem_flags::mem_threadgroup);"
    arguments = [x], (64, 1, 1), (64, 1, 1), (64,), mx.float32
    out = run(source.replace("BARRIER", barrier), *arguments)
    assert mx.array_equal(out, x[mx.arange(64) ^ 1])
    with pytest.raises(KernelReport, match="uninit-threadgroup|race-threadgroup"):
        run(source.replace("BARRIER", ""), *arguments)


@pytest.mark.parametrize("order", ORDERS)
def test_three_dimensional_grids_are_clipped(order):
    source = """
      uint3 p = thread_position_in_grid, n = threads_per_grid;
      uint3 g = threadgroup_position_in_grid, s = threads_per_threadgroup;
      out[(p.z * n.y + p.y) * n.x + p.x] = g.x + 10 * g.y + 100 * g.z + 1000 * (s.x * s.y * s.z);
    """
    kernel = metal_kernel("sample", [], ["out"], source)
    kernel.memory_check, kernel.order = True, order
    call = dict(grid=(5, 4, 3), threadgroup=(4, 2, 2), output_shapes=[(3, 4, 5)])
    (out,) = kernel(inputs=[], output_dtypes=[mx.uint32], **call)
    z, y, x = np.indices((3, 4, 5))
    sizes = np.where(x < 4, 4, 1) * 2 * np.where(z < 2, 2, 1)
    np.testing.assert_array_equal(out, x // 4 + 10 * (y // 2) + 100 * (z // 2) + 1000 * sizes)


def test_inputs_may_keep_their_strides():
    source = (
        "uint i = thread_position_in_grid.x, j = thread_position_in_grid.y;"
        "out[i * a_shape[1] + j] = a[i * a_strides[0] + j * a_strides[1]];"
    )
    x = mx.arange(24).reshape(3, 8)[:, ::2].T
    out = run(source, [x], (4, 3, 1), (4, 3, 1), (4, 3), x.dtype, ensure_row_contiguous=False)
    assert mx.array_equal(out, x)


@pytest.mark.parametrize("dtype", [mx.bool_, mx.uint8, mx.int16, mx.int64, mx.bfloat16], ids=str)
def test_buffers_of_other_dtypes(dtype):
    x = (mx.arange(40) % 2).astype(dtype)
    source = "uint i = thread_position_in_grid.x; out[i] = a[i];"
    out = run(source, [x], (40, 1, 1), (40, 1, 1), (40,), dtype, memory_check=False)
    assert out.dtype == dtype and mx.array_equal(out, x)


def test_outputs_may_have_an_initial_value():
    """Only then may a kernel read an output first, or leave a part of it unwritten."""
    source = "uint i = thread_position_in_grid.x; if (i < 8) out[i] = out[i] + 1;"
    kernel = metal_kernel("sample", [], ["out"], source)
    kernel.memory_check, kernel.raise_on_report = True, False
    call = dict(grid=(16, 1, 1), threadgroup=(16, 1, 1), output_shapes=[(16,)])
    call |= dict(inputs=[], output_dtypes=[mx.bfloat16])
    (out,) = kernel(**call, init_value=2)
    assert kernel.reports == [] and out.tolist() == [3] * 8 + [2] * 8
    kernel(**call)
    assert {report.split(":")[0] for report in kernel.reports} == {
        "uninit-output",
        "unwritten-output",
    }


# ---------------------------------------------------------------- what must be found
# One bug at a time, planted in the attention kernel by replacing a text:
# (name, part of the finding, text, replacement).
LENGTH = "int S = k_shape[2];"
START = "float m = -INFINITY"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
STORE = "  for (int i = 0; i < E; i++) part"

MEMORY_BUGS = [
    ("no barrier", "uninit-threadgroup", BARRIER, ""),
    (
        "barrier with mem_none",
        "race-threadgroup",
        "mem_flags::mem_threadgroup",
        "mem_flags::mem_none",
    ),
    ("barrier in one lane", "divergent-barrier", BARRIER, "if (lane == 0) " + BARRIER),
    ("return before barrier", "divergent-barrier", STORE, "  if (sg == 3) return;\n" + STORE),
    ("one token too far", "oob-device: read", "t < S;", "t <= S;"),
    ("before the buffer", "-128 bytes from buffer 'k'", "S + sg) * D + ", "S + sg - 1) * D + "),
    ("write past the output", "oob-device: write", "out[h * D + d]", "out[h * D + d + 1]"),
    ("output half unwritten", "unwritten-output", "d < D;", "d < D / 2;"),
    ("threads share an output", "race-device", "out[h * D + d]", "out[h * D + d / 2]"),
    ("threadgroups share an output", "race-device", "out[h * D + d]", "out[d]"),
    ("uninitialised threadgroup", "uninit-threadgroup", "(lane == 0)", "(lane == 0 && sg > 0)"),
    ("threadgroup index", "ub-array-index", "part[sg * D + ", "part[(sg + 1) * D + "),
    ("threadgroup array too short", "ub-array-index", "pm[NS]", "pm[NS - 1]"),
    ("private array too short", "ub-array-index", "qr[E], acc[E]", "qr[E], acc[E - 1]"),
    ("divergent simd_sum", "divergent-simd", "x = simd_sum", "if (lane < 16) x = simd_sum"),
    ("divergent loop", "divergent-simd", "t < S;", "t < S - int(lane == 5);"),
    ("shuffle from lane 40", "simd-inactive-lane", "simd_sum(x)", "simd_shuffle(x, 40)"),
    ("wrong stride", "oob-device", "kp += NS * D;", "kp += NS * D + 1;"),
    ("division by zero", "ub-division", LENGTH, "int S = k_shape[2] / int(k_shape[0] - 1);"),
    (
        "misaligned read",
        "ub-alignment",
        LENGTH,
        LENGTH + " if (*(const device float*)((const device char*)k + 2) == 12345.f) return;",
    ),
]
TYPE_BUGS = [
    ("lambda", "lambda", START, "auto f = [](float z) { return z; }; " + START + " + 0 * f(1.0f)"),
    ("long long", "long long", START, "long long q = 0; " + START),
    (
        "40 KB of threadgroup memory",
        "bytes of threadgroup memory",
        "threadgroup float ps[NS];",
        "threadgroup float ps[NS], big[10000]; big[thread_index_in_threadgroup] = 0;",
    ),
    ("device for threadgroup", "no matching function", START, "float bad = tsum(k); " + START),
    (
        "const dropped",
        "cannot initialize",
        LENGTH,
        LENGTH + " constant int* p = k_shape; p[0] = 1;",
    ),
    ("write to input", "not assignable", LENGTH, LENGTH + " k[0] = T(0);"),
    ("no address space", "without an address space", "const device T* kp", "const T* kp"),
    ("double", "double", START, "double m = -INFINITY"),
    ("max(float, int)", "ambiguous", "max(m, x)", "max(x, 0)"),
    ("max(uint, int)", "ambiguous", LENGTH, LENGTH + " uint mm = max(lane, 3); (void)mm;"),
    ("half to bfloat", "cannot initialize", START, "half hh = 1.0h; bfloat bb = hh; " + START),
    ("recursion", "recursion", START, START + " + 0 * rec(2)"),
    ("static variable", "static local variable", START, "static int count = 0; " + START),
    ("goto", "goto", START, "loop: if (lane > 99) goto loop;\n  " + START),
    (
        "misspelt attribute",
        "undeclared identifier",
        "thread_index_in_simdgroup",
        "thread_index_in_simdgroop",
    ),
    (
        "implicit bfloat, literal",
        "implicit float -> bfloat",
        "float r = 0;",
        "T zero = 0.0f; float r = float(zero);",
    ),
    (
        "implicit bfloat, variable",
        "implicit float -> bfloat",
        "float r = 0;",
        "T copy = m; float r = 0 * float(copy);",
    ),
    ("threadgroup in a helper", "outside a kernel", START, START + " + 0 * shared_in_helper()"),
]
# Functions that the planted texts call.
HELPERS = {
    "tsum(": "float tsum(threadgroup float* p) { return p[0]; }\n",
    "rec(": "float rec(int n) { return n < 1 ? 0.0f : rec(n - 1) + 1; }\n",
    "in_helper(": "float shared_in_helper() { threadgroup float z[2]; return z[0]; }\n",
}


def planted(old, new, dtype):
    """The attention kernel with its first ``old`` replaced: (kernel, call, reference)."""
    assert old in ATTENTION
    header = "".join(text for call, text in HELPERS.items() if call in new)
    return attention(dtype, source=ATTENTION.replace(old, new, 1), header=header)


@pytest.mark.parametrize(
    "finding, old, new", [b[1:] for b in TYPE_BUGS], ids=[b[0] for b in TYPE_BUGS]
)
def test_the_type_checker_finds(finding, old, new):
    dtype = mx.bfloat16 if "bfloat" in finding else mx.float16
    kernel, call, _ = planted(old, new, dtype)
    assert any(finding in text for text in check(kernel, **call))


@pytest.mark.parametrize(
    "finding, old, new", [b[1:] for b in MEMORY_BUGS], ids=[b[0] for b in MEMORY_BUGS]
)
def test_the_memory_checker_finds(finding, old, new):
    kernel, call, _ = planted(old, new, mx.float16)
    kernel.memory_check, kernel.raise_on_report = True, False
    kernel(**call)
    assert any(finding in text for text in kernel.reports)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_bug_nothing_is_found(dtype):
    kernel, call, _ = planted(START, START, dtype)
    kernel.memory_check = True
    assert check(kernel, **call) == []
    kernel(**call)
    assert kernel.reports == []


def test_a_wrong_formula_shows_in_the_result_only():
    kernel, call, reference = planted("p = fast::exp(x - mn)", "p = fast::exp(x)", mx.float16)
    kernel.memory_check = True
    assert check(kernel, **call) == []
    assert not max_error(kernel(**call)[0], reference) < 2e-3


def test_small_inputs_change_their_address_space():
    """MLX passes fewer than 8 elements as `constant`: a helper for `device` no longer compiles."""
    header = "float first(const device float* p) { return p[0]; }\n"
    source = "out[thread_position_in_grid.x] = first(a);"
    kernel = metal_kernel("sample", ["a"], ["out"], source, header)
    call = dict(grid=(1, 1, 1), threadgroup=(1, 1, 1), output_dtypes=[mx.float32])
    assert check(kernel, inputs=[mx.zeros(8)], **call) == []
    assert "no matching function" in check(kernel, inputs=[mx.zeros(7)], **call)[0]


def test_a_report_has_a_line_number():
    source = "\n\n  out[thread_position_in_grid.x + 1] = a[0];"
    place = r"sample\.metal:\d+" if shutil.which("addr2line") else r"\+0x"
    with pytest.raises(KernelReport, match=rf"oob-device: write .* buffer 'out'.* at {place}"):
        run(source, [mx.zeros(64)], (64, 1, 1), (64, 1, 1), (64,), mx.float32)


def test_a_fault_ends_the_launch_but_not_the_process():
    source = "out[thread_position_in_grid.x] = 100 / a[0];"
    zeros = mx.zeros(64, mx.int32)
    with pytest.raises(KernelReport, match="fault: integer division by zero"):
        run(source, [zeros], (64, 1, 1), (64, 1, 1), (64,), mx.int32, memory_check=False)


def test_too_many_threads():
    kernel, call, _ = attention(mx.float16)
    call |= dict(threadgroup=(1025, 1, 1), grid=(1025, 1, 1))
    assert any("1025 threads" in finding for finding in check(kernel, **call))
    with pytest.raises(KernelReport, match="limit-threads"):
        kernel(**call)


def test_atomic_outputs_are_refused():
    with pytest.raises(NotImplementedError):
        metal_kernel("sample", [], ["out"], "", atomic_outputs=True)
