"""LoRA adapters for models of the tests, as mlx-lm trains and loads them."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers

PARAMETERS = {"rank": 2, "scale": 4.0, "dropout": 0.0}


def adapter_folder(folder: Path, model: nn.Module, seed: int | None = 0) -> Path:
    """Write adapters for all layers of a model, without changing the model.

    Without a ``seed`` they have no effect, as before training.
    """
    count = len(model.layers)
    linear_to_lora_layers(model, count, PARAMETERS)
    weights = {}
    for name, x in tree_flatten(model.parameters()):
        if name.endswith(("lora_a", "lora_b")):
            key = mx.random.key(len(weights) + 100 * (seed or 0))
            is_zero = seed is None and name.endswith("lora_b")
            weights[name] = mx.zeros_like(x) if is_zero else mx.random.normal(x.shape, key=key) / 9
    remove_lora_layers(model)
    folder.mkdir(parents=True)
    config = {"fine_tune_type": "lora", "num_layers": count, "lora_parameters": PARAMETERS}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    return folder
