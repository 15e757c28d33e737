"""Checks and preparation of a model between loading and use."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import errors as hub
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def model_errors(name: str) -> Iterator[None]:
    """Turn the errors of loading a model from a wrong name into one ValueError."""
    try:
        yield
    except (OSError, ValueError) as error:
        problem = f"cannot be loaded ({reason_of(error)})"
        if isinstance(error, hub.LocalEntryNotFoundError):
            problem = "is not a folder, and the Hugging Face hub could not be reached"
        elif type(error) in (hub.HFValidationError, hub.RepositoryNotFoundError):
            problem = "is not a folder, and not a name on the hub"
        raise ValueError(
            f"{name} {problem}: give the folder of a model of mlx-lm, or its name on the Hugging "
            "Face hub."
        ) from error


def check_memory(model: nn.Module, more: int = 0) -> None:
    """Raise ValueError if the weights of a lazily loaded model and ``more`` bytes do not fit."""
    needed, memory = device_nbytes(model) + more, memory_nbytes()
    if needed > memory:
        raise ValueError(
            f"The model does not fit: it needs {needed / 1e9:,.1f} GB and this machine has "
            f"{memory / 1e9:,.1f} GB: use a smaller model or one with fewer bits."
        )


def weight_nbytes(model: nn.Module) -> int:
    """Bytes of the weights in their own dtypes."""
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def device_nbytes(model: nn.Module) -> int:
    """Bytes of the weights as :func:`prepare_for_device` leaves them."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return weight_nbytes(model)
    values = sum(array.size for _, array in tree_flatten(model.parameters()))
    for module in model.modules():
        if "scales" in module and hasattr(module, "bits"):
            stored = (
                module[name].size for name in ("weight", "scales", "biases") if name in module
            )
            values += module.weight.size * 32 // module.bits - sum(stored)
    return 4 * values


def memory_nbytes() -> int:
    """Bytes that MLX can use on its default device."""
    info = mx.device_info()
    for name in ("max_recommended_working_set_size", "total_memory"):
        if name in info:
            return info[name]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def prepare_for_device(model: nn.Module) -> nn.Module:
    """Convert the weights to float32 in place on a CPU; leave them unchanged elsewhere.

    MLX's CPU backend multiplies quantized and 16-bit matrices many times slower than float32 ones.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        dequantize_model(model)
        model.set_dtype(mx.float32)
    return model
