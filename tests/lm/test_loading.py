import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_turboquant.lm.loading import check_memory, device_nbytes


def test_the_weights_are_counted_as_the_device_holds_them():
    layer = nn.Linear(128, 64, bias=False)
    dense = device_nbytes(layer)
    assert dense == 128 * 64 * 4
    quantized = nn.QuantizedLinear.from_linear(layer, bits=4)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    assert device_nbytes(quantized) == (dense if on_cpu else 128 * 64 * (4 + 1) // 8)


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = [mx.zeros((2**20, 2**20), mx.float16) for _ in range(8)]  # never made

    with pytest.raises(ValueError, match=r"does not fit: it needs [\d,.]+ GB and this machine has"):
        check_memory(Large())
