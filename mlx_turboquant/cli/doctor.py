"""This command compares every kernel on this machine with plain MLX."""

import argparse
import datetime
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from tqdm import tqdm

from ..codec.basis import PATTERNS
from ..codec.packing import RUN
from ..codec.quantizer import CODECS, TurboQuantizer
from ..codec.trellis import MOST_BITS
from ..files import make_way, write_text
from ..kernels.arguments import patterned
from ..kernels.attention import MAX_DECODE_ROWS, Configuration, DecodeAttention
from ..kernels.quantize import Dequantize, InnerProduct, Quantize
from ..kernels.runtime import Kernel, backend
from ..kernels.storage import shared_quantizer
from ..kernels.tuning import (
    Tunings,
    default_tunings,
    device_name,
    heads_key,
    kernel_version,
    saved_tunings,
    tunings,
)
from ..lm.heads import Heads
from ..lm.loading import memory_nbytes, reason_of
from ..measure.tune import LENGTHS, ratios
from .results import machine, print_rows
from .tune import described

_DIMS = (64, 80, 96, 112, 128, 192, 256, 512)
_SPLITS = ((4, 4), (4, 2), (3, 2), (3, 1), (5, 4), (6, 6), (8, 8))
# Heads that a report times: those of Llama-3.1-8B, Qwen3-30B-A3B and Qwen3.8-27B.
_TIMED = (Heads(8, 4, 128, 128, False), Heads(4, 8, 128, 128, False), Heads(4, 6, 256, 256, False))
_DEFAULT_REPORT = Path("mlx_turboquant-report.md")
_TITLE = "# Report of mlx_turboquant doctor"
# Configurations that are not right and that a report names; others are counted.
_NAMED = 20


class Checked(NamedTuple):
    """The result of one configuration of a kernel; ``verdict`` is "ok" or names the fault."""

    kernel: str
    configuration: str
    error: float | None
    allowed: float | None
    seconds: float
    verdict: str


def main(arguments: list[str]) -> None:
    """Run the checks and print a table; exit status 1 if a kernel failed."""
    args = _parser().parse_args(arguments)
    if args.report is not None:
        make_way(args.report, _TITLE, "report")
    configurations = [] if backend() == "reference" else list(_configurations())
    if configurations:
        print("This compares all kernels with plain MLX, which takes minutes, most to compile.")
    print(*_about(), sep="\n")
    results = [
        _check(*each) for each in tqdm(configurations, leave=False, disable=not configurations)
    ]
    try:
        if args.report is not None:
            write_text(args.report, _report(results))
    finally:  # results are printed even if the disk is full
        if configurations:
            print(*_settings(), sep="\n")
            _print_results(results)
    if args.report is not None:
        print(f"The report is in {args.report}: one page for an issue, with nothing about you.")
    print(_verdict(results))
    sys.exit(0 if all(each.verdict == "ok" for each in results) else 1)


def _check(kernel: type[Kernel], configuration: tuple[Any, ...], label: str) -> Checked:
    begin = time.perf_counter()
    error = allowed = None
    try:
        agreement = kernel(*configuration).check()
        error, allowed = agreement
        verdict = "ok" if agreement.holds else "WRONG"
    except (RuntimeError, ValueError) as failure:
        # Without the names of the user's folders.
        verdict = reason_of(failure).replace(str(Path(__file__).parents[2]), "...")
        verdict = verdict.replace(str(Path.home()), "~")
    return Checked(kernel.name, label, error, allowed, time.perf_counter() - begin, verdict)


def _about() -> list[str]:
    return [
        "mlx_turboquant {version}, mlx {mlx}, mlx-lm {mlx_lm}".format(**machine()),
        f"Device: {device_name()}. Kernels run on: {backend()}.",
    ]


def _verdict(results: list[Checked]) -> str:
    if not results:
        return "Nothing was compared: without a GPU, plain MLX replaces the kernels."
    right = sum(each.verdict == "ok" for each in results)
    verdict = "All is well" if right == len(results) else "Not all is well"
    return f"{verdict}: {right} of {len(results)} configurations are right."


def _settings() -> list[str]:
    found = {"Default settings": default_tunings(backend(), MAX_DECODE_ROWS)}
    found |= {f"Tuned for {heads}": each for heads, each in saved_tunings().items()}
    return [
        f"{name}, from {least:,} packed tokens on: {described(tuning)}."
        for name, each in found.items()
        for least, tuning in each
    ]


def _print_results(results: list[Checked]) -> None:
    rows = []
    for each in results:
        row = {"kernel": each.kernel, "configuration": each.configuration}
        for name, number in ("error", each.error), ("allowed", each.allowed):
            row[name] = "" if number is None else f"{number:.1e}"
        rows.append({**row, "verdict": each.verdict})
    print_rows(rows, keys=2)


def _report(results: list[Checked]) -> str:
    """Return what the authors need to know about a machine, and nothing about its user."""
    architecture = mx.device_info().get("architecture", "architecture unknown")
    lines = [
        _TITLE,
        "",
        *_about(),
        "{system}, Python {python}, ".format(**machine())
        + f"{architecture}, {memory_nbytes() / 2**30:.0f} GiB of memory for MLX.",
        f"{datetime.date.today().isoformat()}, kernels {kernel_version()}.",
        "",
        f"{_verdict(results)} This took {sum(each.seconds for each in results):.0f} s.",
    ]
    wrong = [each for each in results if each.verdict != "ok"]
    for each in wrong[:_NAMED]:
        errors = "" if each.error is None else f" (error {each.error:.1e} of {each.allowed:.1e})"
        lines.append(f"- {each.kernel}, {each.configuration}: {each.verdict}{errors}")
    if len(wrong) > _NAMED:
        lines.append(f"- and {len(wrong) - _NAMED} more")
    if backend() != "reference":
        lines += ["", *(f"- {line}" for line in _settings()), "", *_times()]
    return "\n".join(lines) + "\n"


def _times() -> Iterator[str]:
    """Yield a table of the speed of attention."""
    yield "Time of attention for one token at K4V4, relative to MLX's own in bfloat16:"
    yield ""
    yield "| heads | packed tokens | levels computed | levels in a table |"
    yield "|---|---|---|---|"
    for heads in _TIMED:
        name = heads_key(heads.dim, heads.value_dim, heads.group)
        for length in LENGTHS:
            cells = ("does not run" if x is None else f"{x:.2f}x" for x in ratios(heads, length))
            yield f"| {name}, {heads.key_heads} key heads | {length:,} | {' | '.join(cells)} |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_turboquant doctor", description=__doc__)
    text = (
        "Write the results and the speed of attention to a page for an issue "
        f"(default: {_DEFAULT_REPORT})"
    )
    add = parser.add_argument
    add("--report", type=Path, nargs="?", const=_DEFAULT_REPORT, metavar="FILE", help=text)
    return parser


def _configurations() -> Iterator[tuple[type[Kernel], tuple[Any, ...], str]]:
    """Yield kernels, configurations and labels: all dimensions, bits, ways to levels and masks."""
    for dim in _DIMS:
        for bits in range(1, 9):
            quantizers = (shared_quantizer(dim, bits, 0),) * 2
            label = f"{dim} values, {bits} bits"
            yield Quantize, ((mx.float16,) * 2, quantizers), label
            yield InnerProduct, quantizers[:1], label
            yield Dequantize, ((mx.bfloat16,) * 2, quantizers), label
        for bits in range(1, MOST_BITS + 1):
            pair = tuple(shared_quantizer(dim, b, 0, None, "trellis") for b in (bits, 5 - bits))
            label = f"{dim} values, trellis codes, K{bits} V{5 - bits}"
            yield from _all_of(pair, label)
        for key_bits, value_bits in _SPLITS:
            pair = (shared_quantizer(dim, key_bits, 0), shared_quantizer(dim, value_bits, 0))
            configuration = Configuration(*pair, *[mx.float16] * 3, group=4, rows=1)
            label = f"{dim} values, K{key_bits} V{value_bits}"
            yield DecodeAttention, (configuration, _both_ways(dim)), label
        for offsets in PATTERNS[1:] if dim % RUN == 0 else ():
            pattern = tuple(3 + offset for offset in offsets)
            for codec in CODECS:
                values = shared_quantizer(dim, 3, 0, None, codec)
                pair = patterned(dim, 3, pattern, codec), values
                label = f"{dim} values, {pattern} bits, {codec}"
                yield from _all_of(pair, label, _both_ways(dim))
    quantizers = (shared_quantizer(128, 4, 0),) * 2
    for dtype in (mx.float32, mx.bfloat16):
        for group, rows, mask, has_logits in (
            (1, 1, "none", True),
            (8, 1, "additive", False),
            (4, 4, "causal", False),
            (2, 8, "boolean", True),
        ):
            label = f"{str(dtype)[9:]}, {group} heads, {rows} rows, {mask}"
            configuration = Configuration(*quantizers, *[dtype] * 3, group, rows, mask, has_logits)
            yield DecodeAttention, (configuration,), label
    latents = (shared_quantizer(512, 4, 0),) * 2
    configuration = Configuration(*latents, *[mx.bfloat16] * 3, 16, 1, "additive", is_latent=True)
    yield DecodeAttention, (configuration,), "512 values, K4, latent vectors"


def _all_of(
    pair: tuple[TurboQuantizer, ...], label: str, *ways: Tunings
) -> Iterator[tuple[type[Kernel], tuple[Any, ...], str]]:
    """Yield the kernels of a cache for keys and values of these quantizers."""
    yield Quantize, ((mx.float16,) * 2, pair), label
    yield Dequantize, ((mx.bfloat16,) * 2, pair), label
    configuration = Configuration(*pair, *[mx.float16] * 3, group=4, rows=1)
    yield DecodeAttention, (configuration, *ways), label


def _both_ways(dim: int) -> Tunings:
    """Return the settings in use for four query heads, with and without a table of pairs."""
    used = [tuning for _, tuning in tunings(backend(), dim, dim, 4)]
    both = [tuning._replace(pair_table=way) for tuning in used for way in (0, 1)]
    return tuple(enumerate(both))
