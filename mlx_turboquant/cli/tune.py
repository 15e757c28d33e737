"""This command finds the fastest settings of the attention kernel on this GPU and saves them."""

import argparse

from ..kernels.runtime import backend
from ..kernels.tuning import Tuning, device_name, reset_tunings, tuning_path
from ..lm.heads import attention_heads
from ..measure.tune import tune
from .benchmark import add_model_options
from .plan import model_without_weights
from .results import print_rows


def main(arguments: list[str]) -> None:
    """Tune for the heads of a model or shape, or delete the saved settings."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.reset:
        existed = reset_tunings()
        print("The saved settings are deleted." if existed else "There are no saved settings.")
        return
    if args.model is None and args.shape is None:
        parser.error("--model, --shape or --reset is needed")
    if backend() == "reference":
        raise ValueError("The kernels do not run without a GPU: tune on a Mac or with CUDA.")
    rows = []
    print(f"Device: {device_name()}. Time of attention relative to MLX's own in bfloat16:")
    for heads in attention_heads(model_without_weights(args)[0]):
        for measured in tune(heads):
            dims = f"{heads.dim}"
            if heads.value_dim != heads.dim:
                dims += f", {heads.value_dim}"
            label = f"{heads.key_heads * heads.group} on {heads.key_heads} of {dims}"
            row = {"heads": label, "tokens": f"{measured.tokens:,}"}
            for name, seconds in ("default", measured.table), ("best", measured.best):
                row[name] = f"{seconds / measured.exact:.2f}x"
            setting = "default" if measured.is_table else described(measured.tuning)
            rows.append({**row, "settings": setting})
    print_rows(rows, keys=2)
    print(f"The best settings are saved in {tuning_path()}; later runs use them.")


def described(tuning: Tuning) -> str:
    """Return the numbers of a tuning as text."""
    return ", ".join(f"{name} {value}" for name, value in tuning._asdict().items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_turboquant tune", description=__doc__)
    add_model_options(parser, required=False)
    text = "Delete the saved settings of this machine"
    parser.add_argument("--reset", action="store_true", help=text)
    return parser
