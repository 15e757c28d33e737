"""``mlx_turboquant doctor``: every kernel on this machine, compared with plain MLX."""

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm import __version__ as mlx_lm_version
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..kernels.attention import Configuration, DecodeAttention
from ..kernels.quantize import Dequantize, InnerProduct, Quantize
from ..kernels.runtime import Kernel, backend
from ..kernels.storage import shared_quantizer

_DIMS = (64, 80, 96, 112, 128, 192, 256, 512)
_SPLITS = ((4, 4), (4, 2), (3, 2), (3, 1), (5, 4), (6, 6), (8, 8))
_FAILURES = (RuntimeError, ValueError)


def main(arguments: list[str]) -> None:
    """Run the checks and print a table; exit status 1 if a kernel failed."""
    parser = argparse.ArgumentParser(prog="mlx_turboquant doctor", description=__doc__)
    parser.parse_args(arguments)
    target = backend()
    device = mx.device_info().get("device_name", "CPU")
    print(f"mlx_turboquant {__version__}, mlx {mx.__version__}, mlx-lm {mlx_lm_version}")
    print(f"Device: {device}. Kernels run on: {target}.")
    if target == "reference":
        print(
            "Without a GPU, plain MLX operations take the place of the kernels: nothing to check."
        )
        return
    table = Table("kernel", "configuration", "worst error", "allowed", "seconds", "verdict")
    failed = 0
    for kernel, configuration, label in _configurations():
        begin = time.perf_counter()
        try:
            agreement = kernel(*configuration).check()
            error, allowed = f"{agreement.error:.1e}", f"{agreement.allowed:.1e}"
            verdict = "ok" if agreement.holds else "WRONG"
        except _FAILURES as failure:
            error, allowed, verdict = "", "", str(failure).strip().splitlines()[0]
        failed += verdict != "ok"
        seconds = f"{time.perf_counter() - begin:.2f}"
        table.add_row(kernel.name, label, error, allowed, seconds, verdict)
    Console().print(table)
    print(f"{table.row_count - failed} of {table.row_count} configurations are right.")
    sys.exit(1 if failed else 0)


def _configurations() -> Iterator[tuple[type[Kernel], tuple[Any, ...], str]]:
    """Kernels, configurations and labels, with every dimension, number of bits and mask."""
    for dim in _DIMS:
        for bits in range(1, 9):
            quantizers = (shared_quantizer(dim, bits, 0),) * 2
            label = f"{dim} values, {bits} bits"
            yield Quantize, ((mx.float16,) * 2, quantizers), label
            yield InnerProduct, quantizers[:1], label
            yield Dequantize, ((mx.bfloat16,) * 2, quantizers), label
        for key_bits, value_bits in _SPLITS:
            pair = (shared_quantizer(dim, key_bits, 0), shared_quantizer(dim, value_bits, 0))
            configuration = Configuration(*pair, *[mx.float16] * 3, group=4, rows=1)
            yield DecodeAttention, (configuration,), f"{dim} values, K{key_bits} V{value_bits}"
    quantizers = (shared_quantizer(128, 4, 0),) * 2
    for dtype in (mx.float32, mx.bfloat16):
        for group, rows, mask, has_sinks in (
            (1, 1, "none", True),
            (8, 1, "additive", False),
            (4, 4, "causal", False),
            (2, 8, "boolean", True),
        ):
            label = f"{str(dtype)[9:]}, {group} query heads, {rows} rows, mask {mask}"
            yield (
                DecodeAttention,
                (Configuration(*quantizers, *[dtype] * 3, group, rows, mask, has_sinks),),
                label,
            )
    latents = (shared_quantizer(512, 4, 0),) * 2
    configuration = Configuration(*latents, *[mx.bfloat16] * 3, 16, 1, "additive", is_latent=True)
    yield DecodeAttention, (configuration,), "512 values, K4, latent vectors"
