"""What the commands do with a model between loading and use."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import dequantize_model


@contextmanager
def model_errors(name: str) -> Iterator[None]:
    """Turn what loading a model raises for a wrong name into one ValueError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"Model {name!r} cannot be loaded ({reason}): give the folder of a model of mlx-lm, "
            "or its name on the Hugging Face hub."
        ) from error


def prepare_for_device(model: nn.Module) -> nn.Module:
    """On a CPU, turn the weights into float32, in place; elsewhere leave them as they are.

    MLX's CPU backend multiplies quantized and 16-bit matrices many times slower than float32 ones.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        dequantize_model(model)
        model.set_dtype(mx.float32)
    return model
