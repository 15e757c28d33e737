"""Read a prompt once and keep its cache in a file: ``python examples/save_and_load.py``."""

import tempfile
from pathlib import Path

import mlx_lm

from mlx_turboquant import cache_size, load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_turboquant.lm.loading import prepare_for_device

model, tokenizer = mlx_lm.load(str(Path(__file__).parent / "tiny-lm"))
prepare_for_device(model)  # float32 on a CPU, which multiplies other types slowly
prompt = "import os\n\n\ndef size(path):\n    return os.path.getsize(path)\n\n\n" * 12
cache = make_prompt_cache(model, bits=4)
mlx_lm.generate(model, tokenizer, prompt, max_tokens=1, prompt_cache=cache)
with tempfile.TemporaryDirectory() as folder:
    file = save_prompt_cache(Path(folder) / "prompt", cache, model)
    print(f"{cache_size(cache)}; the file has {file.stat().st_size:,} bytes.")
    cache = load_prompt_cache(file, model)
print(mlx_lm.generate(model, tokenizer, "def name(", max_tokens=16, prompt_cache=cache))
