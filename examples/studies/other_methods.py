"""Run commands with methods that are only compared: PolarQuant and splits of outlier channels.

    python examples/studies/other_methods.py evaluate --model MODEL --kv-bits polar:4 split:2

runs ``mlx_turboquant`` with these names in addition to those of ``mlx_turboquant.methods``.
"""

import mlx.core as mx
from channel_split import qjl_with_outliers, turboquant_split
from polar_quant import PolarQuant

from mlx_turboquant import cli
from mlx_turboquant.methods import METHODS


def _polar(x: mx.array, bits: int, seed: int) -> PolarQuant:
    if bits != 4:
        raise ValueError(f"PolarQuant with {bits} bits is not defined: use 4 (it takes 3.875).")
    return PolarQuant(x.shape[-1], seed=seed)


# As in METHODS: functions by name that make a method for vectors like x (..., n, dim).
ALL_METHODS = {
    **METHODS,
    "polar": _polar,
    "qjl-outliers": lambda x, bits, seed: qjl_with_outliers(x, bits, seed=seed),
    "split": lambda x, bits, seed: turboquant_split(x, bits, seed=seed),
}

if __name__ == "__main__":
    METHODS.update(ALL_METHODS)
    cli.main()
