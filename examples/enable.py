"""Compress every cache that mlx-lm makes for a model: ``python examples/enable.py``."""

from pathlib import Path

import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

from mlx_turboquant import cache_report, enable
from mlx_turboquant.lm.loading import prepare_for_device

model, tokenizer = mlx_lm.load(str(Path(__file__).parent / "tiny-lm"))
prepare_for_device(model)  # float32 on a CPU, which multiplies other types slowly
# With tokenizer=tokenizer a model without a profile is calibrated first, which is worth it.
enable(model, bits=4)
cache = make_prompt_cache(model)
prompt = "import os\n\n\ndef size(path):\n    return os.path.getsize(path)\n\n\n" * 12
print(mlx_lm.generate(model, tokenizer, prompt, max_tokens=16, prompt_cache=cache))
print(cache_report(cache))
