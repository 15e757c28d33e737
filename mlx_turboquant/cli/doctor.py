"""``mlx_turboquant doctor``: every kernel on this machine, compared with plain MLX."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm import __version__ as mlx_lm_version
from rich.console import Console
from rich.table import Table

from .. import __version__, kernels
from ..attention import check_decode_attention, check_dequantize
from ..storage import shared_quantizer

_DIMS = (64, 80, 96, 112, 128, 192, 256, 512)
_SPLITS = ((4, 4), (4, 2), (3, 2), (3, 1), (5, 4), (6, 6), (8, 8))
_FAILURES = (RuntimeError, ValueError)


def main(arguments: list[str]) -> None:
    """Run the checks and print a table; exit status 1 if a kernel failed."""
    parser = argparse.ArgumentParser(prog="mlx_turboquant doctor", description=__doc__)
    parser.parse_args(arguments)
    backend = kernels.backend()
    device = mx.device_info().get("device_name", "CPU")
    print(f"mlx_turboquant {__version__}, mlx {mx.__version__}, mlx-lm {mlx_lm_version}")
    print(f"Device: {device}. Kernels run on: {backend}.")
    if backend == "reference":
        print(
            "Without a GPU, plain MLX operations take the place of the kernels: nothing to check."
        )
        return
    table = Table("kernel", "configuration", "worst error", "allowed", "seconds", "verdict")
    failed = 0
    for check, configuration, label in _configurations():
        begin = time.perf_counter()
        try:
            agreement = check(*configuration)
            error, allowed = f"{agreement.error:.1e}", f"{agreement.allowed:.1e}"
            verdict = "ok" if agreement.holds else "WRONG"
        except _FAILURES as failure:
            error, allowed, verdict = "", "", str(failure).strip().splitlines()[0]
        failed += verdict != "ok"
        seconds = f"{time.perf_counter() - begin:.2f}"
        table.add_row(check.__name__[6:], label, error, allowed, seconds, verdict)
    Console().print(table)
    print(f"{table.row_count - failed} of {table.row_count} configurations are right.")
    sys.exit(1 if failed else 0)


def _configurations() -> Iterator[tuple[Callable[..., kernels.Agreement], tuple[Any, ...], str]]:
    """Checks, their arguments and labels, with every dimension, number of bits and mask."""
    for dim in _DIMS:
        for bits in range(1, 9):
            quantizer = shared_quantizer(dim, bits, 0)
            label = f"{dim} values, {bits} bits"
            yield kernels.check_quantize, (mx.float16, quantizer, quantizer), label
            yield kernels.check_inner_product, (quantizer,), label
            yield check_dequantize, (mx.bfloat16, mx.bfloat16, quantizer, quantizer), label
        for key_bits, value_bits in _SPLITS:
            quantizers = [shared_quantizer(dim, bits, 0) for bits in (key_bits, value_bits)]
            options = (*[mx.float16] * 3, 4, 1, "none", False, False, True)
            label = f"{dim} values, K{key_bits} V{value_bits}"
            yield check_decode_attention, (*quantizers, *options), label
    quantizers = [shared_quantizer(128, 4, 0)] * 2
    for dtype in (mx.float32, mx.bfloat16):
        for group, rows, mask, sinks in (
            (1, 1, "none", True),
            (8, 1, "additive", False),
            (4, 4, "causal", False),
            (2, 8, "boolean", True),
        ):
            label = f"{str(dtype)[9:]}, {group} query heads, {rows} rows, mask {mask}"
            yield (
                check_decode_attention,
                (*quantizers, *[dtype] * 3, group, rows, mask, sinks, False, False),
                label,
            )
    latents = [shared_quantizer(512, 4, 0)] * 2
    options = (*[mx.bfloat16] * 3, 16, 1, "additive", False, True, False)
    yield check_decode_attention, (*latents, *options), "512 values, K4, latent vectors"
