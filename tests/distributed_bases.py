"""Print tokens and bases of each part of a model; mlx.launch runs it on a folder and a profile."""

import json
import sys

import mlx.core as mx
from distributed_tokens import tokens
from mlx_lm.utils import sharded_load

from mlx_turboquant import enable, make_prompt_cache

if __name__ == "__main__":
    group = mx.distributed.init(strict=True)
    folder, profile = sys.argv[1:]
    model, _ = sharded_load(folder, tensor_group=group)
    enable(model, 8, profile=profile)
    digests = [layer.settings.basis.digest for layer in make_prompt_cache(model, 8)]
    print(json.dumps([group.rank(), digests, tokens(model)]), flush=True)
