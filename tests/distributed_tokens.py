"""Print the tokens of models split over all processes; mlx.launch runs this on model folders."""

import json
import sys

import mlx.core as mx
from mlx_lm.utils import sharded_load
from tokens import continuation, random_tokens

from mlx_turboquant import cache_report, enable, make_prompt_cache


def tokens(model) -> list[int]:
    """24 tokens after a prompt of 90, with 8 bits and a small window."""
    cache = make_prompt_cache(model, 8, window=16)
    prompt = random_tokens(90, seed=5, vocabulary=512)
    said = continuation(model, prompt, cache, 24, prefill_step_size=40)
    assert cache_report(cache).size.tokens >= 90
    assert all(layer.packed_tokens >= 64 for layer in cache)
    return said


if __name__ == "__main__":
    group = mx.distributed.init(strict=True)
    for folder in sys.argv[1:]:
        for split in ("tensor_group", "pipeline_group"):
            model, _ = sharded_load(folder, **{split: group})
            said = tokens(enable(model, 8))
            if group.rank() == 0:
                print(json.dumps([group.size(), len(model.layers), said]), flush=True)
