"""Every kernel against plain MLX: on Metal or CUDA, or on the CPU executor of metal_on_linux.

On the executor each launch goes through the memory checker in a random order of threads, and a
finding fails the test. If the product of all settings is too large, all pairs are covered.
"""

import copy
import itertools
import platform
import random
import re
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import mlx.core as mx
import pytest
from tokens import basis_of, normal, visible_tokens

from mlx_turboquant import VectorIndex, enable, make_prompt_cache
from mlx_turboquant.cache import base
from mlx_turboquant.cli import doctor
from mlx_turboquant.codec.packing import unpack
from mlx_turboquant.codec.quantizer import QuantizedVectors, TurboQuantizer
from mlx_turboquant.kernels import arguments, attention, reference, runtime, tuning
from mlx_turboquant.kernels.attention import DecodeAttention
from mlx_turboquant.kernels.quantize import (
    Dequantize,
    InnerProduct,
    Quantize,
    dense,
    inner_product,
    quantize,
)
from mlx_turboquant.kernels.storage import shared_quantizer
from mlx_turboquant.kernels.tokens import Span
from mlx_turboquant.kernels.tuning import (
    TARGETS,
    Tuning,
    kernel_version,
    reset_tunings,
    saved_tunings,
    tunings,
)
from mlx_turboquant.lm.heads import Heads
from mlx_turboquant.measure import tune as measure_tune

ON_EXECUTOR = platform.system() == "Linux" and runtime.backend() == "reference"
if ON_EXECUTOR:
    import metal_on_linux

    if not metal_on_linux.IS_SUPPORTED:
        pytest.skip("the CPU executor needs x86-64 with AVX2", allow_module_level=True)

KERNELS = ("quantize", "dequantize", "decode_attention", "combine", "inner_product")
DIMS = (64, 80, 96, 112, 128, 192, 256, 512)
BITS = (1, 2, 3, 4, 5, 6, 8)
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
FOUR_ROWS = Tuning(4, accumulators=32, tokens=2, batch=4, simds=4, threadgroups=40)
EIGHT_ROWS = FOUR_ROWS._replace(rows=8)
MASKS = ("none", "causal", "boolean", "boolean per head", "additive", "left padding")


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """Run kernels on the GPU or on the executor; the value is the list of launches."""
    launches = []

    def recording(make_kernel):
        def make(name, **arguments):
            kernel = make_kernel(name=name, **arguments)
            if ON_EXECUTOR:
                kernel.memory_check, kernel.order = True, "random"

            def launch(**call):
                launches.append((kernel, call))
                return kernel(**call)

            return launch

        return make

    if ON_EXECUTOR:
        monkeypatch.setattr(mx.fast, "metal_kernel", recording(metal_on_linux.metal_kernel))
        monkeypatch.setattr(runtime, "_checked_backend", lambda name, origin: name or "metal")
    else:
        for maker in ("metal_kernel", "cuda_kernel"):
            monkeypatch.setattr(mx.fast, maker, recording(getattr(mx.fast, maker)))
    forget_kernels()
    yield launches
    forget_kernels()


def forget_kernels() -> None:
    runtime.force_backend(None)
    for remembered in (runtime._checked, runtime._built, runtime._machine_backend):
        remembered.cache_clear()


def names_of(launches) -> list[str]:
    found = [
        [name for name in KERNELS if kernel.name.startswith(f"turboquant_{name}_")]
        for kernel, _ in launches
    ]
    return [name for names in found for name in names]


def pairwise(*factors):
    """A few combinations of the factors' values that contain every pair of values."""
    generator = random.Random(0)
    columns = range(len(factors))
    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(columns, 2)
        for a, b in itertools.product(range(len(factors[i])), range(len(factors[j])))
    }
    rows = []
    while missing:
        candidates = []
        for _ in range(50):
            row = [generator.randrange(len(factor)) for factor in factors]
            i, a, j, b = min(missing)
            row[i], row[j] = a, b
            pairs = {(i, row[i], j, row[j]) for i, j in itertools.combinations(columns, 2)}
            candidates.append((len(pairs & missing), row, pairs))
        _, row, pairs = max(candidates, key=lambda candidate: candidate[0])
        missing -= pairs
        rows.append(tuple(factor[i] for factor, i in zip(factors, row)))
    return rows


def quantized(x, mean, quantizer) -> QuantizedVectors:
    """Quantize by the kernel, whatever the result of its check."""
    return Quantize((x.dtype,), (quantizer,))([x], [mean], [quantizer])[0]


def squared_errors(quantizer, packed, x) -> mx.array:
    return ((quantizer.dequantize(packed) - x) ** 2).sum(axis=-1)


@pytest.mark.parametrize("dim, bits, dtype", pairwise((*DIMS, 72), BITS, DTYPES))
def test_quantize_finds_the_codes_of_the_reference(dim, bits, dtype):
    quantizer = TurboQuantizer(dim, bits)
    x, mean = normal((2, 1, 37, dim), 1, dtype), normal((2, 1, 1, dim), 2)
    packed = quantized(x, mean, quantizer)
    expected = reference.quantize(x, mean, quantizer)
    different = (packed.codes != expected.codes).any(axis=-1)
    # Of 74 vectors; test_few_codes_differ says why, and how many.
    assert different.sum() <= {6: 2, 7: 8, 8: 25}.get(bits, 1)
    residual = x.astype(mx.float32) - mean
    errors = [squared_errors(quantizer, p, residual) for p in (packed, expected)]
    # The chosen cosines agree within rounding: one millionth for each of some tens of terms.
    assert (mx.abs(errors[0] - errors[1]) / (residual**2).sum(axis=-1)).max() < 1e-4
    scales = mx.where(different, 1, packed.scales / expected.scales)
    assert mx.abs(scales - 1).max() <= 1 / 128  # one step of bfloat16


@pytest.mark.parametrize("bits, fraction", [(2, 0.001), (4, 0.002), (6, 0.01), (8, 0.12)])
def test_few_codes_differ(kernels_run, bits, fraction):
    """Of 2,000 vectors, few have other codes than in the reference.

    A value may lie within rounding of a threshold, or two gains may have the same cosine within
    rounding: at 8 bits cosines are 1 - 1.5e-5, and float32 keeps two digits of the difference.
    """
    quantizer = shared_quantizer(128, bits, 0)
    x, mean = normal((1, 2, 1000, 128), 1), mx.zeros((1, 2, 1, 128))
    packed = quantized(x, mean, quantizer)
    expected = reference.quantize(x, mean, quantizer)
    assert (packed.codes != expected.codes).any(axis=-1).mean() <= fraction
    errors = [squared_errors(quantizer, p, x).mean().item() for p in (packed, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


TRELLIS_DIMS = (8, 20, 80, 128, 512)
TRELLIS_BITS = (1, 2, 3, 4)


@pytest.mark.parametrize("dim, bits, dtype", pairwise(TRELLIS_DIMS, TRELLIS_BITS, DTYPES))
def test_quantize_finds_the_streams_of_the_reference(dim, bits, dtype):
    quantizer = TurboQuantizer(dim, bits, codec="trellis")
    x, mean = normal((2, 1, 9, dim), 1, dtype), normal((2, 1, 1, dim), 2)
    check_streams(quantizer, x, mean)


@pytest.mark.parametrize(
    "dim, bits, spread, is_even",
    [
        (64, 4, 3, False),
        (32, 3, 3, False),
        (128, 2, 2, False),
        (64, 2, 4, False),  # 5, 2, 1, 0 bits
        (128, 3, 0.4, True),
    ],
)
def test_quantize_finds_streams_on_axes(dim, bits, spread, is_even):
    quantizer = TurboQuantizer(dim, bits, codec="trellis", basis=basis_of(dim, 2, spread))
    assert isinstance(quantizer.pattern, int) == is_even
    check_streams(quantizer, normal((1, 2, 20, dim), 1), normal((1, 2, 1, dim), 2))


@pytest.mark.parametrize("dims, bits", [((192, 128), (4, 5)), ((256, 256), (6, 4))])
def test_quantize_takes_streams_beside_scalar_codes(dims, bits):
    quantizers = [TurboQuantizer(*each, codec="trellis") for each in zip(dims, bits)]
    assert Quantize((mx.float16,) * 2, tuple(quantizers)).check().holds


def check_streams(quantizer, x, mean) -> None:
    """Few streams differ: costs that agree within a thousandth of a per cent are equal."""
    packed, expected = quantized(x, mean, quantizer), reference.quantize(x, mean, quantizer)
    residual = x.astype(mx.float32) - mean
    errors = [squared_errors(quantizer, p, residual).mean().item() for p in (packed, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    same = (packed.codes == expected.codes).all(axis=-1)
    assert same.mean() >= 0.85
    scales = mx.where(same, packed.scales / expected.scales, 1)
    assert mx.abs(scales - 1).max() <= 1 / 128  # one step of bfloat16


LEVELS_AT_BOTH_PLACES = """
half2 coefficients[4];
load_coefficients(4, levels, coefficients);
threadgroup half table[1];
const uint i = thread_position_in_grid.x;
const uint codes = i | ((15u - i) << 16);
const half2 low = level_pair(4, coefficients, table, codes, 0);
const half2 high = level_pair(4, coefficients, table, codes << 4, 4);
out[4 * i] = float(low.x);
out[4 * i + 1] = float(low.y);
out[4 * i + 2] = float(high.x);
out[4 * i + 3] = float(high.y);
"""


@pytest.mark.skipif(runtime.backend() == "cuda", reason="on CUDA codes have one place")
def test_a_code_of_4_bits_has_the_same_level_at_both_places():
    kernel = mx.fast.metal_kernel(
        name="levels",
        input_names=["levels"],
        output_names=["out"],
        header=runtime._joined("levels.h", set()),
        source=LEVELS_AT_BOTH_PLACES,
    )
    [out] = kernel(
        inputs=[arguments.levels(TurboQuantizer(128, 4))],
        grid=(16, 1, 1),
        threadgroup=(16, 1, 1),
        output_shapes=[(16, 4)],
        output_dtypes=[mx.float32],
    )
    assert mx.array_equal(out[:, :2], out[:, 2:])
    assert len(set(out[:, 0].tolist())) == 16


def test_quantize_packs_every_code_where_the_layout_says():
    """With the identity as a dense rotation, the test chooses the codes."""
    for bits in BITS:
        quantizer = TurboQuantizer(72, bits, rotation="haar", gain_search=False)
        x = normal((1, 1, 9, 72), bits)
        packed = quantized(x, mx.zeros((1, 1, 1, 72)), quantizer)
        expected = quantizer.quantize(x)
        codes = unpack(packed.codes, bits, 72), unpack(expected.codes, bits, 72)
        assert (codes[0] != codes[1]).mean() < 0.01  # ties with a threshold, within rounding


def test_quantize_keeps_zeros_and_large_values_and_isolates_nan():
    quantizer = shared_quantizer(128, 4, 0)
    x = normal((1, 1, 4, 128), 1)
    x = mx.concatenate([x, mx.zeros((1, 1, 1, 128)), x[:, :, :1] * 1e30], axis=2)
    x[0, 0, 1, 5] = mx.nan
    x[0, 0, 2, 5] = mx.inf
    packed = quantized(x, mx.zeros((1, 1, 1, 128)), quantizer)
    restored = quantizer.dequantize(packed)[0, 0]
    assert not mx.isfinite(restored[1:3]).any()
    assert mx.array_equal(restored[4], mx.zeros(128))
    # 4 bits leave 9 % of the length on average.
    assert mx.linalg.norm(restored[5] / 1e30 - x[0, 0, 0]) < 0.12 * mx.linalg.norm(x[0, 0, 0])


def keys_and_values(rows):
    """Pair the rows of keys with those of values; each row has dimension, bits, side and dtype."""
    keys, values = ([row for row in rows if row[2] == side] for side in ("keys", "values"))
    longer = max(keys, values, key=len)
    pairs = [(keys[i % len(keys)], values[i % len(values)]) for i in range(len(longer))]
    return [(dim, other, bits, more, dtype) for (dim, bits, _, dtype), (other, more, *_) in pairs]


@pytest.mark.parametrize(
    "dim, value_dim, key_bits, value_bits, dtype",
    keys_and_values(pairwise((*DIMS, 72), BITS, ("keys", "values"), DTYPES)),
)
def test_dequantize_restores_the_tokens_of_the_reference(
    dim, value_dim, key_bits, value_bits, dtype
):
    quantizers = shared_quantizer(dim, key_bits, 0), shared_quantizer(value_dim, value_bits, 0)
    assert Dequantize((dtype, dtype), quantizers).check().holds


@pytest.mark.parametrize("dim, bits, dtype", pairwise(TRELLIS_DIMS, TRELLIS_BITS, DTYPES))
def test_dequantize_restores_streams(dim, bits, dtype):
    quantizers = [TurboQuantizer(dim, each, codec="trellis") for each in (bits, 5 - bits)]
    assert Dequantize((dtype, dtype), tuple(quantizers)).check().holds


def test_dequantize_restores_keys_that_are_the_values(kernels_run):
    assert Dequantize((mx.float16,), (shared_quantizer(512, 4, 0),)).check().holds


def test_dense_tokens_are_one_launch_and_skip_what_lies_between(kernels_run):
    tokens = replace(visible_tokens(mean=5.0), recent_start=7)
    tokens.exact_keys[:, :, 4:7] = mx.nan
    restored = dense(tokens)
    if ON_EXECUTOR:
        assert names_of(kernels_run).count("dequantize") == 2  # one of them is the check
    for pair in zip(restored, reference.dense(tokens)):
        assert runtime.compare(*pair, mx.float32).holds


@pytest.mark.parametrize("dim, bits, query_count", pairwise((*DIMS, 72, 1536), BITS, (1, 5, 8, 9)))
def test_inner_products_are_those_of_the_reference(dim, bits, query_count):
    quantizer = shared_quantizer(dim, bits, 0)
    packed = quantizer.quantize(normal((2, 150, dim), 1))
    queries = normal((2, query_count, dim), 2)
    output = InnerProduct(quantizer)(queries, packed)
    expected = quantizer.inner_product(queries, packed)
    assert runtime.compare(output, expected, mx.float32).holds


def test_inner_products_need_the_same_leading_axes():
    quantizer = shared_quantizer(64, 4, 0)
    packed = quantizer.quantize(normal((2, 150, 64), 1))
    queries = normal((2, 3, 64), 2)
    assert mx.allclose(
        inner_product(queries, packed, quantizer),
        quantizer.inner_product(queries, packed),
        atol=1e-4,  # products of 64 values of size 1
    )
    with pytest.raises(ValueError, match="different leading axes"):
        inner_product(queries[0], packed, quantizer)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_an_index_is_searched_by_the_kernel(kernels_run, monkeypatch, metric):
    monkeypatch.setattr(VectorIndex, "_tile", 64)
    index = VectorIndex(96, 3, metric)
    index.add(normal((150, 96), 1))
    queries = normal((3, 96), 2)
    found = index.search(queries, 20)
    # Three tiles, after the check against plain MLX.
    assert len(kernels_run) == 4
    runtime.force_backend("reference")
    expected = index.search(queries, 20)
    assert len(kernels_run) == 4
    assert runtime.compare(found.scores, expected.scores, mx.float32).holds
    assert mx.array_equal(found.ids, expected.ids)


CASES = pairwise(DIMS, BITS, BITS, DTYPES, MASKS, (1, 2, 5, 8), (1, 3, 4, 8), (False, True))


@pytest.mark.parametrize("dim, key_bits, value_bits, dtype, mask, rows, group, sinks", CASES)
def test_attention_is_that_of_the_reference(
    dim, key_bits, value_bits, dtype, mask, rows, group, sinks
):
    tokens = visible_tokens(dim, dim, key_bits, value_bits, dtype)
    assert_attention_agrees(*attention_arguments(tokens, group, rows, dtype, mask, sinks))


def attention_arguments(tokens, group, rows, dtype, mask="none", sinks=False):
    count, query_heads = tokens.count, tokens.exact_keys.shape[1] * group
    random_mask = normal((2, query_heads, rows, count), 7)
    padding = mx.array([0, 9])[:, None, None, None] <= mx.arange(count)
    masks = {
        "none": None,
        "causal": "causal",
        "boolean": random_mask[0, 0] > -1,
        "boolean per head": random_mask > -1,
        "additive": random_mask,
        "left padding": mx.broadcast_to(padding, (2, 1, rows, count)),
    }
    queries = normal((2, query_heads, rows, tokens.exact_keys.shape[-1]), 5, dtype)
    logits = normal((query_heads,), 6) if sinks else None
    return queries, tokens, queries.shape[-1] ** -0.5, masks[mask], logits


def tune(monkeypatch, *chosen: tuple[int, Tuning]) -> None:
    """Give new kernels these tunings, each with the number of packed tokens it starts from."""
    monkeypatch.setattr(attention, "tunings", lambda *heads: chosen)


def attention_kernel(queries, tokens, scale, mask, sinks) -> DecodeAttention:
    """The kernel, whatever the result of its check."""
    return DecodeAttention(DecodeAttention.configuration(queries, tokens, mask, sinks))


def launched_attention(*arguments) -> mx.array:
    return attention_kernel(*arguments)(*arguments)


def assert_attention_agrees(*arguments) -> None:
    assert_is_attention(launched_attention(*arguments), *arguments)


def assert_is_attention(output, *arguments) -> None:
    expected = reference.decode_attention(*arguments)
    agreement = runtime.compare(output, expected, arguments[0].dtype, attention.HALF_ARITHMETIC)
    assert agreement.holds, agreement


@pytest.mark.parametrize("dim, value_dim", [(192, 128), (96, 64), (72, 72)])
def test_attention_takes_keys_and_values_of_different_width(dim, value_dim):
    tokens = visible_tokens(dim, value_dim)
    assert_attention_agrees(*attention_arguments(tokens, 2, 1, mx.float32))


@pytest.mark.parametrize(
    "dim, key_bits, value_bits, dtype, group, rows, mask",
    [
        (128, 4, 4, mx.bfloat16, 8, 1, "none"),
        (128, 3, 2, mx.float16, 7, 1, "additive"),
        (64, 5, 5, mx.float32, 4, 2, "causal"),
        (96, 8, 4, mx.float32, 16, 1, "boolean per head"),
    ],
)
def test_attention_takes_eight_query_rows_at_once(
    monkeypatch, dim, key_bits, value_bits, dtype, group, rows, mask
):
    tokens = visible_tokens(dim, dim, key_bits, value_bits, dtype, packed=300)
    arguments = attention_arguments(tokens, group, rows, dtype, mask)
    for least in (0, 2 * 2 * 300):
        tune(monkeypatch, (0, FOUR_ROWS), (least + 1, EIGHT_ROWS))
        kernel = attention_kernel(*arguments)
        assert kernel.check().holds
        assert_is_attention(kernel(*arguments), *arguments)


def test_many_packed_tokens_in_all_heads_take_eight_query_rows(kernels_run, monkeypatch):
    """They use the kernel that was compiled for the check before its first use."""
    tune(monkeypatch, (0, FOUR_ROWS), (2 * 2 * 300, EIGHT_ROWS))
    threadgroups, checks = [], []
    for packed in (299, 300):
        arguments = attention_arguments(visible_tokens(packed=packed), 8, 1, mx.float32)
        output = attention.decode_attention(*arguments)
        threadgroups.append(kernels_run[-2][1]["grid"][2])
        checks.append(runtime._checked.cache_info().misses)
        assert_is_attention(output, *arguments)
    assert threadgroups == [2, 1]  # for eight query heads
    assert checks[0] == checks[1]


@pytest.mark.parametrize("group, passes", [(3, 1), (6, 1), (7, 1), (12, 2), (16, 2), (17, 3)])
def test_a_group_of_query_heads_is_divided_evenly(kernels_run, monkeypatch, group, passes):
    """So that a code is unpacked as few times as possible."""
    tune(monkeypatch, (0, EIGHT_ROWS))
    assert_attention_agrees(*attention_arguments(visible_tokens(), group, 1, mx.float32))
    assert kernels_run[0][1]["grid"][2] == passes


TUNINGS = [
    FOUR_ROWS,
    EIGHT_ROWS._replace(accumulators=64),
    FOUR_ROWS._replace(tokens=1, batch=2),
    EIGHT_ROWS._replace(tokens=1, simds=8),
    FOUR_ROWS._replace(batch=8, simds=2),
    FOUR_ROWS._replace(threadgroups=1, simds=1),
]


@pytest.mark.parametrize("chosen", TUNINGS)
@pytest.mark.parametrize("dim, key_bits, value_bits", [(64, 5, 1), (96, 7, 3), (256, 4, 6)])
def test_a_tuning_does_not_change_the_result(monkeypatch, chosen, dim, key_bits, value_bits):
    tune(monkeypatch, (0, chosen))
    tokens = visible_tokens(dim, dim, key_bits, value_bits, packed=300)
    assert_attention_agrees(*attention_arguments(tokens, 6, 1, mx.float32, "boolean"))


def both_ways_to_levels(monkeypatch, arguments, accumulators=32) -> list[mx.array]:
    """Outputs with levels that are computed, and with a table of pairs."""
    outputs, ways = [], []
    build = runtime.build
    monkeypatch.setattr(
        runtime, "build", lambda *each: ways.append(each[3].get("PAIR_TABLE")) or build(*each)
    )
    for pair_table in (0, 1):
        chosen = EIGHT_ROWS._replace(pair_table=pair_table, accumulators=accumulators)
        tune(monkeypatch, (0, chosen))
        outputs.append(launched_attention(*arguments))
    assert ways == [False, None, True, None]  # combine has no levels
    return outputs


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "dim, key_bits, value_bits, spread, coordinates",
    [
        (128, 4, 4, 0, 8),
        (64, 3, 2, 0, 8),
        (80, 2, 3, 0, 8),
        (96, 7, 1, 0, 4),
        (128, 3, 4, 2, 4),
        (64, 2, 3, 3, 4),
    ],
)
def test_a_table_of_pairs_changes_no_bit(
    monkeypatch, target, dim, key_bits, value_bits, spread, coordinates
):
    """Of up to 4 bits; others, and those of patterns that have more, are as without it.

    A lane takes 4 or 8 ``coordinates`` of a value.
    """
    monkeypatch.setitem(attention.TARGETS, "metal", TARGETS[target])
    basis = basis_of(dim, 2, spread) if spread else None
    tokens = visible_tokens(dim, dim, key_bits, value_bits, packed=300, basis=basis)
    arguments = attention_arguments(tokens, 4, 2, mx.float32, "causal")
    outputs = both_ways_to_levels(monkeypatch, arguments, accumulators=8 * coordinates)
    assert mx.array_equal(*outputs)
    assert_is_attention(outputs[1], *arguments)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim, value_dim, bits", [(128, 128, 4), (80, 96, 3), (512, 512, 6)])
def test_the_text_is_right_as_each_gpu_gets_it(monkeypatch, target, dim, value_dim, bits):
    """Including sums in half precision and prefetched words, which only CUDA gets."""
    monkeypatch.setitem(attention.TARGETS, "metal", TARGETS[target])
    tokens = visible_tokens(dim, value_dim, bits, bits, packed=300)
    if dim == 512:
        tokens = replace(tokens, values=tokens.keys, exact_values=tokens.exact_keys)
    assert_attention_agrees(*attention_arguments(tokens, 4, 2, mx.float32, "causal"))


@pytest.mark.parametrize("packed", [1, 31, 32, 33, 700])
def test_attention_takes_any_number_of_packed_tokens(packed):
    """700 tokens make several splits of several blocks."""
    tokens = visible_tokens(packed=packed)
    assert_attention_agrees(*attention_arguments(tokens, 4, 2, mx.float32, "causal"))


@pytest.mark.parametrize("mask", ["none", "causal", "boolean per head", "additive"])
def test_attention_reads_sequences_of_different_length(mask):
    """Keys between the tokens of a sequence are NaN here."""
    spans = (Span(300, 4, 7), Span(33, 0, 12))
    tokens = replace(visible_tokens(packed=300), recent_start=7, spans=spans)
    tokens.exact_keys[:, :, 4:7] = mx.nan
    tokens.exact_keys[1, :, :12] = mx.nan
    if mask == "none":
        tokens.keys.scales[1, :, 33:] = mx.nan
    rows = 1 if mask == "none" else 3
    assert_attention_agrees(*attention_arguments(tokens, 2, rows, mx.float32, mask))


def test_a_table_of_pairs_changes_no_bit_of_latent_attention(monkeypatch):
    tokens = visible_tokens(128, 128, 3, 3)
    tokens = replace(tokens, values=tokens.keys, exact_values=tokens.exact_keys)
    arguments = attention_arguments(tokens, 4, 1, mx.float32, "additive")
    outputs = both_ways_to_levels(monkeypatch, arguments)
    assert mx.array_equal(*outputs)
    assert_is_attention(outputs[1], *arguments)


@pytest.mark.parametrize("dim, bits", [(512, 4), (512, 3), (128, 6), (256, 8)])
def test_attention_reads_one_latent_vector_as_key_and_value(dim, bits):
    tokens = visible_tokens(dim, dim, bits, bits)
    tokens = replace(tokens, values=tokens.keys, exact_values=tokens.exact_keys)
    assert_attention_agrees(*attention_arguments(tokens, 4, 1, mx.float32, "additive"))


@pytest.mark.parametrize("half_sums", [False, True])
@pytest.mark.parametrize(
    "dim, value_dim, key_bits, value_bits, rows, dtype",
    pairwise(
        (40, 128, 256),
        (36, 80, 128, 512),
        TRELLIS_BITS,
        (1, 2, 3, 4, 6),
        (1, 3, 8),
        DTYPES,
    ),
)
def test_attention_reads_streams(
    dim, value_dim, key_bits, value_bits, rows, dtype, half_sums, monkeypatch
):
    pair_bytes = 20480 if half_sums else 0
    target = TARGETS["metal"]._replace(half_sums=half_sums, ahead=half_sums, pair_bytes=pair_bytes)
    monkeypatch.setitem(TARGETS, "metal", target)
    tokens = visible_tokens(dim, value_dim, key_bits, value_bits, dtype, codec="trellis")
    assert_attention_agrees(*attention_arguments(tokens, 1, rows, dtype, "none"))


@pytest.mark.parametrize("dim, bits", [(64, 4), (512, 3)])
def test_attention_reads_a_latent_stream_as_key_and_value(dim, bits):
    tokens = visible_tokens(dim, dim, bits, bits, codec="trellis")
    tokens = replace(tokens, values=tokens.keys, exact_values=tokens.exact_keys)
    assert_attention_agrees(*attention_arguments(tokens, 4, 1, mx.float32, "additive"))


def test_attention_adds_the_means_back():
    tokens = visible_tokens(mean=5.0)
    assert tokens.keys.mean.any()
    assert_attention_agrees(*attention_arguments(tokens, 2, 2, mx.float32))


def test_attention_reads_queries_and_exact_tokens_of_different_types():
    tokens = visible_tokens(dtype=mx.bfloat16)
    assert_attention_agrees(*attention_arguments(tokens, 2, 1, mx.float32))


def test_attention_is_two_launches_with_whole_buffers(kernels_run):
    tokens = visible_tokens()
    launched_attention(*attention_arguments(tokens, 2, 1, mx.float32))
    if ON_EXECUTOR:
        assert names_of(kernels_run) == ["decode_attention", "combine"]
        inputs = kernels_run[0][1]["inputs"]
        assert any(array is tokens.keys.codes for array in inputs)
        assert any(array is tokens.values.codes for array in inputs)
        # The number of tokens is data: the kernels are the same.
        tokens = replace(tokens, exact_count=16)
        launched_attention(*attention_arguments(tokens, 2, 1, mx.float32))
        assert [kernel for kernel, _ in kernels_run[2:]] == [
            kernel for kernel, _ in kernels_run[:2]
        ]


@pytest.mark.skipif(not ON_EXECUTOR, reason="the type checker is part of the executor")
@pytest.mark.parametrize(
    "dim, bits, dtype, mask",
    [
        (64, 1, mx.float16, "additive"),
        (80, 3, mx.bfloat16, "none"),
        (128, 4, mx.float32, "boolean"),
        (72, 8, mx.bfloat16, "causal"),
    ],
)
def test_the_text_is_what_metal_accepts(kernels_run, dim, bits, dtype, mask):
    quantizer = shared_quantizer(dim, bits, 0)
    Quantize((dtype,), (quantizer,)).check()
    Dequantize((dtype, dtype), (quantizer, quantizer)).check()
    InnerProduct(quantizer).check()
    tokens = visible_tokens(dim, dim, bits, bits, dtype)
    launched_attention(*attention_arguments(tokens, 2, 1, dtype, mask, mask == "none"))
    for kernel, call in kernels_run:
        assert metal_on_linux.check(kernel, **call) == []


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.skipif(not ON_EXECUTOR, reason="a GPU chooses the order of threads")
def test_results_do_not_depend_on_the_order_of_threads(kernels_run, order):
    tokens = visible_tokens(128, 128, packed=300)
    arguments = attention_arguments(tokens, 4, 2, mx.float32)
    expected = launched_attention(*arguments)
    for kernel, _ in list(kernels_run):
        kernel.order = order
    assert mx.array_equal(launched_attention(*arguments), expected)


def test_a_cache_uses_the_kernels_it_has_checked(kernels_run):
    tokens = visible_tokens()
    arguments = attention_arguments(tokens, 2, 1, mx.float32)
    output = attention.decode_attention(*arguments)
    assert kernels_run
    assert_is_attention(output, *arguments)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_cache_that_has_been_read_can_be_copied(kernels_run, random_model, backend):
    cache = make_prompt_cache(random_model, 4, window=0, sink_tokens=0, backend=backend)
    random_model(mx.ones((1, 40), mx.int32), cache=cache)
    random_model(mx.ones((1, 1), mx.int32), cache=cache)
    copied = copy.deepcopy(cache)
    assert (kernels_run == []) == (backend is not None)
    following = [random_model(mx.ones((1, 1), mx.int32), cache=each) for each in (cache, copied)]
    assert mx.array_equal(*following)


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_step_evaluates_only_what_the_host_has_made(random_model, monkeypatch, sequences):
    """What a GPU computes comes after the step before, and the host would wait for it.

    Steps in which packed buffers grow are not among these.
    """
    cache = make_prompt_cache(random_model, 4, window=0, sink_tokens=0)
    tokens = mx.ones((sequences, 80), mx.int32)
    for count in (70, 1):
        mx.eval(random_model(tokens[:, :count], cache=cache))
    for remembered in (base._column, attention._divided, arguments.sizes):
        remembered.cache_clear()
    evaluate, graphs = mx.eval, []

    def observed(*arrays):
        if sys._getframe(1).f_globals["__name__"].startswith("mlx_turboquant."):
            graph = StringIO()
            mx.export_to_dot(graph, *arrays)
            graphs.append(graph.getvalue())
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", observed)
    for _ in range(3):
        random_model(tokens[:, :1], cache=cache)
    assert len(graphs) >= 6  # for each step a mask of its token and the sizes
    assert not any("shape=rectangle" in graph for graph in graphs)  # an operation


@pytest.mark.skipif(not ON_EXECUTOR, reason="a GPU has one kind of compiler")
def test_a_compiler_that_reads_no_files_gets_the_text(kernels_run, monkeypatch):
    arguments = attention_arguments(visible_tokens(), 2, 1, mx.float32)
    expected = launched_attention(*arguments)
    monkeypatch.setattr(runtime, "_metal_reads_files", lambda: False)
    forget_kernels()
    assert mx.array_equal(launched_attention(*arguments), expected)
    named, whole = (kernel for kernel, _ in kernels_run if "decode" in kernel.name)
    assert len(named.source) < 1000 < len(whole.source)


def test_enabling_a_model_runs_the_kernels_that_it_needs(kernels_run, random_model, caplog):
    enable(random_model, 3)
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    if ON_EXECUTOR:
        assert set(names_of(kernels_run)) == {
            "quantize",
            "dequantize",
            "decode_attention",
            "combine",
        }
    checked = runtime._checked.cache_info().misses
    cache = random_model.make_cache()
    for count in (200, 1, 9):
        random_model(mx.ones((1, count), mx.int32), cache=cache)
    assert runtime._checked.cache_info().misses == checked


def test_dimensions_that_no_kernel_takes_are_logged_once(kernels_run, caplog):
    runtime.supports.cache_clear()
    quantizer = TurboQuantizer(1100, 2, rotation="haar")
    x = normal((1, 1, 3, 1100), 1)
    for _ in range(2):
        [packed] = quantize([x], [mx.zeros((1, 1, 1, 1100))], [quantizer])
    assert not kernels_run
    assert mx.array_equal(packed.codes, quantizer.quantize(x).codes)
    messages = [record.message for record in caplog.records]
    assert messages == [
        "Kernel quantize takes up to 1024 values a vector: plain MLX is used for 1100."
    ]


def test_keys_and_values_are_quantized_in_one_launch(kernels_run):
    quantizers = TurboQuantizer(128, 4), TurboQuantizer(320, 3)
    vectors = [normal((1, 2, 33, q.dim), q.dim) for q in quantizers]
    means = [normal((1, 2, 1, q.dim), 1) for q in quantizers]
    both = Quantize((mx.float32,) * 2, quantizers)(vectors, means, quantizers)
    if ON_EXECUTOR:
        assert len(kernels_run) == 1
    for packed, *each in zip(both, vectors, means, quantizers):
        alone = quantized(*each)
        assert mx.array_equal(packed.codes, alone.codes)
        assert mx.array_equal(packed.scales, alone.scales)


def plant(monkeypatch, folder, **replacements):
    """Build kernels from a text with some strings replaced, by kernel or header."""
    right = runtime._file
    for name, (old, new) in replacements.items():
        file = name if name.endswith(".h") else f"{name}.metal"
        text = right(file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))

    def planted(name):
        return folder / name if (folder / name).exists() else right(name)

    monkeypatch.setattr(runtime, "_file", planted)


def test_a_wrong_kernel_is_replaced_with_a_warning(monkeypatch, caplog, tmp_path):
    plant(
        monkeypatch,
        tmp_path,
        dequantize=("key_mean + row * DIM", "key_mean"),
        quantize=("const int count", "const int count +"),
    )
    quantizer = shared_quantizer(64, 4, 0)
    x, mean = normal((1, 1, 40, 64), 1), mx.ones((1, 1, 1, 64))
    [packed] = quantize([x], [mean], [quantizer])  # does not compile
    expected = reference.quantize(x, mean, quantizer)
    assert mx.array_equal(packed.codes, expected.codes)
    tokens = visible_tokens()
    for restored, expected in zip(dense(tokens), reference.dense(tokens)):  # runs, and is wrong
        assert mx.array_equal(restored, expected)
    messages = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == 2
    assert "Kernel quantize is replaced by plain MLX on" in messages[0]
    assert "Kernel dequantize is replaced by plain MLX on" in messages[1]
    assert "relative error" in messages[1]


def test_shapes_and_counts_that_do_not_fit_are_refused():
    tokens = visible_tokens()
    queries, *rest = attention_arguments(tokens, 2, 1, mx.float32)
    with pytest.raises(ValueError, match="do not fit 2 heads of 64 values"):
        attention.decode_attention(queries[..., :32], *rest)
    with pytest.raises(ValueError, match="do not fit 2 heads"):
        attention.decode_attention(queries[:, :3], *rest)
    tokens, *rest = rest
    with pytest.raises(ValueError, match="25 exact and 70 packed tokens"):
        attention.decode_attention(queries, replace(tokens, exact_count=25), *rest)
    keys = tokens.keys
    keys = keys._replace(codes=keys.codes[:, :, :3], scales=keys.scales[..., :96])
    with pytest.raises(ValueError, match="96 packed tokens .* use a multiple of 64"):
        attention.decode_attention(queries, replace(tokens, keys=keys), *rest)


def test_a_mask_that_does_not_fit_is_refused():
    tokens = visible_tokens()
    queries, _, scale, _, _ = attention_arguments(tokens, 2, 1, mx.float32)
    with pytest.raises(ValueError, match="does not fit scores"):
        launched_attention(queries, tokens, scale, mx.zeros((1, 1, 1, 7)), None)


@pytest.mark.skipif(not ON_EXECUTOR, reason="for a machine without a GPU")
def test_a_backend_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="backend is 'metal': use reference on this machine"):
        runtime.force_backend("metal")
    monkeypatch.setenv(runtime.BACKEND_VARIABLE, "cuda")
    runtime._machine_backend.cache_clear()
    with pytest.raises(ValueError, match="MLX_TURBOQUANT_BACKEND is 'cuda'"):
        runtime.backend()
    runtime._machine_backend.cache_clear()
    monkeypatch.setenv(runtime.BACKEND_VARIABLE, "reference")
    assert runtime.backend() == "reference"


@pytest.fixture
def few_checks(monkeypatch):
    """The doctor with two checks, so that it takes a second."""
    quantizer = shared_quantizer(64, 4, 0)
    checks = [
        (Quantize, ((mx.float16,), (quantizer,)), "64 values"),
        (Dequantize, ((mx.float16,), (quantizer,)), "64 values"),
    ]
    monkeypatch.setattr(doctor, "_configurations", lambda: iter(checks))


def test_the_doctor_checks_every_kernel_with_what_it_takes():
    configurations = reversed(list(doctor._configurations()))
    first = {kernel: configuration for kernel, configuration, _ in configurations}
    assert len(first) == 4
    assert all(kernel(*configuration).check().holds for kernel, configuration in first.items())


def test_doctor_prints_a_verdict_for_every_check(few_checks, capsys):
    with pytest.raises(SystemExit) as leaving:
        doctor.main([])
    output = capsys.readouterr().out
    assert leaving.value.code == 0
    assert "quantize" in output and "dequantize" in output
    assert output.splitlines()[-1] == "All is well: 2 of 2 configurations are right."


def test_a_report_has_checks_speed_and_settings(few_checks, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_TIMED", [Heads(2, 4, 64, 64, False)])
    monkeypatch.setattr(doctor, "LENGTHS", [64])
    with pytest.raises(SystemExit):
        doctor.main(["--report", str(tmp_path / "report.md")])
    text = (tmp_path / "report.md").read_text()
    assert "All is well: 2 of 2 configurations are right." in text
    assert "Default settings, from 0 packed tokens on: rows" in text
    heads, tokens, *times = text.splitlines()[-1].strip("| ").split(" | ")
    assert (heads, tokens) == ("64 values, 4 query rows, 2 key heads", "64")
    assert [re.fullmatch(r"\d+\.\d\dx", time) is not None for time in times] == [True, True]
    assert kernel_version() in text
    assert str(Path.home()) not in text and platform.node() not in text


def test_a_report_names_what_is_wrong_and_stays_a_page(few_checks, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, dequantize=("key_mean + row * DIM", "key_mean"))
    timed = [f"{heads}" for heads in doctor._TIMED for _ in doctor.LENGTHS]
    monkeypatch.setattr(doctor, "_times", lambda: iter(timed))
    with pytest.raises(SystemExit):
        doctor.main(["--report", str(tmp_path / "report.md")])
    lines = (tmp_path / "report.md").read_text().splitlines()
    [wrong] = [line for line in lines if line.startswith("- dequantize, 64 values: WRONG (error ")]
    assert wrong.endswith(")")
    many = [doctor.Checked("k", "c", None, None, 0.0, "not built")] * 300
    page = doctor._report(many)
    assert "- and 280 more" in page and len(page.splitlines()) < 60


def test_the_doctor_finds_a_wrong_table_of_pairs(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "_metal_reads_files", lambda: False)  # reads headers by itself
    changed = ("moved(words[0], from,", "moved(words[0], from ^ 1,")
    plant(monkeypatch, tmp_path, **{"pair_table.h": changed})
    checks = [
        each
        for each in doctor._configurations()
        if each[0] is DecodeAttention and each[2] == "64 values, K4 V4"
    ]
    assert [doctor._check(*each).verdict for each in checks] == ["WRONG"]


def test_tune_keeps_what_is_fastest(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "user_cache_path", lambda name: tmp_path)
    heads = Heads(1, 6, 64, 64, False)
    monkeypatch.setattr(measure_tune, "LENGTHS", [64, 192])
    monkeypatch.setattr(measure_tune, "_ROUNDS", 1)
    measured = list(measure_tune.tune(heads))
    assert [each.tokens for each in measured] == [64, 192]
    assert all(each.best <= each.table for each in measured)
    kept = tunings(runtime.backend(), 64, 64, 6)
    assert kept[0] == (0, measured[0].tuning)
    assert kept[-1][1] == measured[1].tuning
    assert saved_tunings()
    reset_tunings()


def test_doctor_fails_if_a_kernel_does(few_checks, monkeypatch, capsys, tmp_path):
    plant(monkeypatch, tmp_path, dequantize=("key_mean + row * DIM", "key_mean"))
    with pytest.raises(SystemExit) as leaving:
        doctor.main([])
    assert leaving.value.code == 1
    output = capsys.readouterr().out
    assert "WRONG" in output
    assert output.splitlines()[-1] == "Not all is well: 1 of 2 configurations are right."


@pytest.mark.parametrize(
    "dim, bits, spread, rows, mask, codec",
    [
        (64, 3, 2, 1, "none", "scalar"),
        (128, 4, 1.5, 4, "causal", "scalar"),
        (128, 2, 3, 2, "none", "scalar"),
        (128, 6, 3, 1, "boolean", "scalar"),
        (96, 1, 2, 3, "none", "scalar"),
        (256, 5, 2, 8, "none", "scalar"),
        (128, 8, 2, 1, "none", "scalar"),
        (128, 3, 0, 1, "none", "scalar"),
        (64, 4, 4, 1, "none", "trellis"),
        (128, 3, 3, 4, "causal", "trellis"),
        (96, 2, 2, 2, "none", "trellis"),
    ],
)
@pytest.mark.parametrize("half_sums", [False, True])
def test_keys_in_a_basis(dim, bits, spread, rows, mask, codec, half_sums, monkeypatch):
    """Kernels are built for an example, and then given the bases of layers."""
    pair_bytes = 20480 if half_sums else 0
    target = TARGETS["metal"]._replace(half_sums=half_sums, ahead=half_sums, pair_bytes=pair_bytes)
    monkeypatch.setitem(TARGETS, "metal", target)
    values, dtypes = shared_quantizer(dim, 3, 0, None, codec), (mx.float16, mx.float16)
    own = TurboQuantizer(dim, bits, basis=basis_of(dim, 3, spread), codec=codec)
    like = arguments.example(own)
    assert like.pattern == own.pattern
    assert Quantize(dtypes, (like, values)).check().holds
    restore = Dequantize(dtypes, (like, values))
    assert restore.check().holds
    tokens = visible_tokens(dim, dim, bits, 3, mx.float16, heads=3, basis=own.basis, codec=codec)
    assert_attention_agrees(*attention_arguments(tokens, 2, rows, mx.float16, mask))
    for restored, expected in zip(restore(tokens), reference.dense(tokens)):
        assert runtime.compare(restored, expected, mx.float16).holds
