"""Servers that tests start as processes and query with the openai client."""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager, suppress

import openai
import pytest
from conftest import REPOSITORY
from hidden_codes import answer, code_line, question, random_code

from mlx_turboquant.measure.passages import random_names

TINY_LM = str(REPOSITORY / "examples" / "tiny-lm")
START_SECONDS = 60


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def started(command: list[str], port: int, prepare: Callable[[], None] | None = None):
    """A server on ``port``; it and the processes that it starts are killed at the end.

    ``prepare`` is called in its process before it begins.
    """
    # A pipe would be full after a thousand requests and block the server.
    with (
        tempfile.TemporaryFile("w+") as messages,
        subprocess.Popen(
            command, stderr=messages, start_new_session=True, preexec_fn=prepare
        ) as process,
    ):
        process.stderr = messages
        try:
            wait_for(port, process)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def server(port: int, *options: str, prepare: Callable[[], None] | None = None):
    """A running server of the bundled model; see :func:`started`."""
    command = [sys.executable, "-m", "mlx_turboquant", "server", "--model", TINY_LM]
    return started([*command, "--port", str(port), *options], port, prepare)


def messages_of(process: subprocess.Popen) -> str:
    process.stderr.seek(0)
    return process.stderr.read()


def wait_for_message(process: subprocess.Popen, text: str, count: int = 1) -> None:
    """Wait until a server has logged a text ``count`` times; it logs after it has answered."""
    for _ in range(100):
        if messages_of(process).count(text) >= count:
            return
        time.sleep(0.1)
    pytest.fail(f"{text!r} is not {count} times in: {messages_of(process)}")


def wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(10 * START_SECONDS):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, messages_of(process)
            time.sleep(0.1)
    pytest.fail(f"The server does not answer after {START_SECONDS} seconds.")


def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)


def complete(api: openai.OpenAI, prompt: str, count: int = 8) -> str:
    response = api.completions.create(
        model="default_model", prompt=prompt, max_tokens=count, temperature=0
    )
    return response.choices[0].text


def resident_bytes(process: subprocess.Popen) -> int:
    output = subprocess.check_output(["ps", "-o", "rss=", "-p", str(process.pid)])
    return 1024 * int(output)


def prompts_with_codes(count: int, shared: int = 4) -> tuple[list[str], list[str]]:
    """Questions about one of four codes, after long shared texts, and their answers."""
    rng = random.Random(0)
    texts = []
    for _ in range(shared):
        names, codes = random_names(4, rng), [random_code(rng) for _ in range(4)]
        lines = [f"value_{number} = {rng.randrange(1000)}" for number in range(40)]
        for place, pair in enumerate(zip(names, codes)):
            lines.insert(10 * place, code_line(*pair))
        texts.append(("\n".join(lines), names, codes))
    prompts, answers = [], []
    for index in range(count):
        text, names, codes = texts[index % shared]
        which = index // shared % 4
        # Prompts of different lengths with a common prefix.
        filler = "\n".join(["import os"] * (index % 7))
        prompts.append(f"{text}\n{filler}\n{question(names[which])}")
        answers.append(answer(codes[which]))
    return prompts, answers
