"""Compare caches of other methods, which are simulated, with ours.

    python examples/studies/other_methods.py evaluate --model MODEL --kv-bits 4 mse:4 qjl+mse:3

runs ``mlx_turboquant``. A name before the bits is one of ``ALL_METHODS``, or one for keys and one
for values.
"""

import mlx.core as mx
from channel_split import qjl_with_outliers, turboquant_split
from methods import METHODS
from polar_quant import PolarQuant
from simulated import simulated_preset

from mlx_turboquant import cli
from mlx_turboquant.cli import evaluate


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
    evaluate.preset = simulated_preset
    cli.main()
