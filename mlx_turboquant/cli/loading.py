"""What the commands do with a model between loading and use."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import dequantize_model


def prepare_for_device(model: nn.Module) -> nn.Module:
    """On a CPU, turn the weights into float32, in place; elsewhere leave them as they are.

    MLX's CPU backend multiplies quantized and 16-bit matrices many times slower than float32 ones.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        dequantize_model(model)
        model.set_dtype(mx.float32)
    return model
