"""Models that mlx-lm splits over two processes on this machine, with compressed caches."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, profile_of
from distributed_tokens import tokens
from mlx_lm import load
from mlx_lm.utils import save_config, save_model
from servers import client, complete, free_port, started
from tiny_families import tiny_model

from mlx_turboquant import disable, enable
from mlx_turboquant.codec.basis import Basis
from mlx_turboquant.lm.profile import save_profile

LAUNCH = [
    str(Path(sys.executable).with_name("mlx.launch")),
    *("-n", "2", "--backend", "ring", "--python", sys.executable, "--"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Models on disk, as mlx-lm loads them, with the tokenizer of the bundled model."""
    made = []
    for family in ("qwen2", "deepseek_v3", "llama"):
        folder = tmp_path_factory.mktemp(family)
        model = tiny_model(family, vocab_size=4096)
        save_model(folder, model)
        save_config({**vars(model.args), "eos_token_id": 0}, folder / "config.json")
        for file in (REPOSITORY / "examples" / "tiny-lm").glob("tokenizer*"):
            shutil.copy(file, folder)
        made.append(folder)
    return made


def test_two_processes_say_what_one_says(folders):
    """Tensor parallel, with half of the heads each, and pipelines, with half of the layers each."""
    script = str(REPOSITORY / "tests" / "distributed_tokens.py")
    run = subprocess.run([*LAUNCH, script, *map(str, folders[:2])], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in re.findall(r"^\[2, .*\]$", run.stdout, re.MULTILINE)]
    assert len(lines) == 4, run.stdout
    for folder, line, layers in zip(
        (folder for folder in folders[:2] for _ in range(2)), lines, (4, 2, 4, 2)
    ):
        model, _ = load(str(folder))
        assert line == [2, layers, tokens(model)]
        disable(model)


def test_each_process_codes_the_keys_of_its_heads_in_their_bases(folders, tmp_path):
    """The profile has those of all heads, and the fingerprint of the parts too without biases."""
    model, _ = load(str(folders[2]))
    profile = profile_of(model, *[0.1] * len(model.layers), seed=0)
    file = save_profile(profile, tmp_path / "profile.json")
    script = str(REPOSITORY / "tests" / "distributed_bases.py")
    arguments = [*LAUNCH, script, str(folders[2]), str(file)]
    run = subprocess.run(arguments, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in re.findall(r"^\[[01], .*\]$", run.stdout, re.MULTILINE)]
    said = tokens(enable(model, 8, profile=profile))
    disable(model)
    for rank, (number, digests, found) in enumerate(sorted(lines)):
        half = len(profile.bases[0].axes) // 2
        heads = slice(half * rank, half * (rank + 1))
        own = [Basis(basis.axes[heads], basis.weights[heads]) for basis in profile.bases]
        assert (number, digests) == (rank, [basis.digest for basis in own])
        assert found[:16] == said[:16]  # later ones may depend on the order of sums
    assert len(lines) == 2


def test_a_server_of_two_processes_says_what_one_process_says(folders):
    port = free_port()
    arguments = ["--model", str(folders[0]), "--port", str(port), "--kv-bits", "8"]
    answers = []
    for command in ([sys.executable, "-m"], [*LAUNCH, "-m"]):
        with started([*command, "mlx_turboquant", "server", *arguments], port):
            prompts = ("a = ", 90 * "import os")
            answers.append([complete(client(port), prompt, 12) for prompt in prompts])
    assert answers[0] == answers[1]
