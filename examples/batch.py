"""Answer prompts of different length in a compressed batch: ``python examples/batch.py``."""

from pathlib import Path

import mlx_lm

from mlx_turboquant import cache_size, enable
from mlx_turboquant.lm.loading import prepare_for_device

model, tokenizer = mlx_lm.load(str(Path(__file__).parent / "tiny-lm"))
prepare_for_device(model)  # float32 on a CPU, which multiplies other types slowly
enable(model, bits=4)
lines = "import os\n\n\ndef size(path):\n    return os.path.getsize(path)\n\n\n"
prompts = [tokenizer.encode(count * lines + "def ") for count in (8, 10, 12)]
answer = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=16, return_prompt_caches=True)
for text, cache in zip(answer.texts, answer.caches):
    print(f"{text!r}: {cache_size(cache)}")
