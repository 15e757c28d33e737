"""The server as its users see it: a separate process and the openai client."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import openai
import pytest
from commands import run, wait_for_a_measured_layer
from servers import (
    TINY_LM,
    client,
    complete,
    free_port,
    messages_of,
    prompts_with_codes,
    resident_bytes,
    server,
    wait_for_message,
)


class Running(NamedTuple):
    api: openai.OpenAI
    process: subprocess.Popen


@pytest.fixture(scope="module")
def running():
    """A server with 8-bit caches, a window small enough for packed tokens, and little room."""
    port = free_port()
    options = ("--kv-bits", "8", "--kv-window", "32", "--log-level", "ERROR")
    with server(port, *options, "--prompt-cache-bytes", "20M") as process:
        yield Running(client(port), process)


def test_chat_completions_and_streams_answer(running):
    assert complete(running.api, "def add(a, b):\n    return", 5).strip().startswith("a + b")
    messages = [{"role": "user", "content": "def add(a, b):"}]
    settings = {"model": "default_model", "max_tokens": 8, "temperature": 0}
    chat = running.api.chat.completions.create(messages=messages, **settings)
    assert chat.choices[0].message.content
    assert chat.usage.completion_tokens == 8
    stream = running.api.chat.completions.create(messages=messages, stream=True, **settings)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == chat.choices[0].message.content


def test_64_clients_may_connect_at_once(running):
    with ExitStack() as waiting:
        host, port = running.api.base_url.host, running.api.base_url.port
        os.kill(running.process.pid, signal.SIGSTOP)  # it accepts nothing
        waiting.callback(os.kill, running.process.pid, signal.SIGCONT)
        for _ in range(64):
            waiting.enter_context(socket.create_connection((host, port), timeout=0.5))


@pytest.mark.parametrize("requests", [64, pytest.param(200, marks=pytest.mark.slow)])
def test_requests_of_16_clients_get_the_answers_of_one_at_a_time(running, requests):
    prompts, answers = prompts_with_codes(requests)
    alone = {prompt: complete(running.api, prompt) for prompt in sorted(set(prompts))}
    together, resident = [], []
    with ThreadPoolExecutor(16) as clients:
        for start in range(0, requests, 50):
            some = prompts[start : start + 50]
            together += clients.map(lambda prompt: complete(running.api, prompt), some)
            resident.append(resident_bytes(running.process))
    assert together == [alone[prompt] for prompt in prompts]
    # The model finds nearly all codes, so answers differ from each other.
    right = [text.strip().startswith(code.strip()) for text, code in zip(together, answers)]
    assert sum(right) > 0.9 * requests
    # Only 20 MB of caches are kept. Fifty leaked requests would add 50 to 100 MB at every step,
    # while the allocator's memory goes up and down.
    assert min(after - before for before, after in pairwise(resident)) < 30e6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_server_that_is_asked_to_end_answers_what_it_has_begun(number):
    port = free_port()
    with server(port, "--log-level", "ERROR") as process:
        stream = client(port).completions.create(
            model="default_model", prompt="def add(a, b):", max_tokens=200, stream=True
        )
        next(iter(stream))
        process.send_signal(number)
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
        assert process.wait(timeout=60) == 0
        assert messages_of(process) == ""
    socket.create_server(("127.0.0.1", port)).close()


def test_a_hang_up_that_nohup_ignores_does_not_end_a_server():
    port = free_port()
    ignore = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    with server(port, "--log-level", "ERROR", prepare=ignore) as process:
        process.send_signal(signal.SIGHUP)
        assert complete(client(port), "def add(a, b):", 3)
        process.terminate()
        assert process.wait(timeout=60) == 0


def test_a_server_that_calibrates_ends_when_it_is_asked_to_and_keeps_what_it_has(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with server(free_port()) as process:
        wait_for_a_measured_layer(tmp_path)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        said = messages_of(process)
    assert "Ctrl-C ends the server and keeps what is measured" in said
    assert said.splitlines()[-1].startswith("The server ends before its model is loaded")
    [file] = (tmp_path / "mlx_turboquant" / "profiles").glob("*.unfinished")


def test_a_server_that_was_killed_while_it_answered_starts_again_on_its_port():
    port = free_port()
    with server(port, "--log-level", "ERROR") as process:
        stream = client(port).completions.create(
            model="default_model", prompt="def add(a, b):", max_tokens=400, stream=True
        )
        next(iter(stream))
        process.kill()
        process.wait()
    with server(port, "--log-level", "ERROR"):
        assert complete(client(port), "def add(a, b):\n    return", 5).strip()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--kv-bits", "9"], "9.0 bits are not supported"),
        (
            ["--model", "no/such/folder"],
            "no/such/folder is not a folder, and not a name on the hub: give",
        ),
        (["--kv-window", "-3"], "A window of -3 is not possible"),
        (["--memory-limit", "1MB"], "use a larger --memory-limit"),
        (["--memory-limit", "20 bananas"], "is not a size"),
        (["--port", "99999"], "--port is 99999: use 0 to 65535"),
        (["--host", "no.host.invalid"], "cannot listen on no.host.invalid at port 8080 ("),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(options, message):
    result = run("server", "--model", TINY_LM, *options)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_server_logs_that_it_is_ready_and_one_line_a_request():
    port = free_port()
    with server(port, "--uniform", "--memory-limit", "4") as process:
        api = client(port)
        prompt, words = "def add(a, b):\n    return", {"model": "default_model", "max_tokens": 5}
        api.completions.create(prompt=prompt, **words)
        for _ in api.completions.create(prompt=prompt, stream=True, **words):
            pass
        with pytest.raises(openai.BadRequestError):
            api.completions.create(prompt=prompt, model="default_model", max_tokens=-1)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"BREW /\x1b[31m HTTP/1.1\r\n\r\n")
            assert b"501" in b"".join(iter(lambda: connection.recv(1000), b""))
        process.terminate()
        process.wait(60)
        lines = messages_of(process).splitlines()
    seen = [re.sub(r"^[\d-]+ [\d:,]+ ", "", line) for line in lines]
    seen = [line for line in seen if "/health" not in line and "Kernels run on" not in line]
    ready = rf"INFO Ready at http://127.0.0.1:{port}: tiny-lm, K5V3, 4.00 GB of memory, of which "
    post = r"POST /v1/completions"
    expected = [
        ready + r"weights take 0.0\d GB",
        rf"INFO {post} 200, (\d+) prompt tokens, 0 cached, 5 new, \d+\.\d\d s",
        rf"INFO {post} 200, (\d+) prompt tokens, [1-9]\d* cached, 5 new, \d+\.\d\d s",
        rf"WARNING {post} 400, \d+\.\d\d s: max_tokens is -1: use an integer from 1 .*",
        r"WARNING Bad request: code 501, message Unsupported method \('BREW'\)",
    ]
    assert len(seen) == len(expected), seen
    assert all(re.fullmatch(*pair) for pair in zip(expected, seen)), seen


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("server", "--model", TINY_LM, "--port", port)
    assert result.returncode == 2
    message = f"cannot listen on 127.0.0.1 at port {port} (Address already in use): use another"
    assert message in result.stderr


def test_a_server_says_which_free_port_it_has_taken():
    command = [sys.executable, "-m", "mlx_turboquant", "server", "--model", TINY_LM]
    options = ("--host", "::1", "--port", "0")
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        try:
            ready = next(line for line in process.stderr if "Ready" in line)
            address = re.search(r"Ready at (http://\[::1\]:[1-9]\d*): ", ready)[1]
            assert urllib.request.urlopen(f"{address}/health", timeout=60).status == 200
        finally:
            process.kill()


def test_limited_caches_are_served_in_batches():
    """Prompts within the limit are answered as without a batch; longer ones are answered too."""
    port = free_port()
    options = ("--kv-bits", "8", "--kv-window", "32", "--max-kv-size", "400")
    with server(port, *options, "--log-level", "ERROR"):
        api = client(port)
        short = [f"def add_{name}(a, b):\n    return" for name in "abcdef"]
        long = ["import os\n" * 300 + "def f(x):"] * 2
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda prompt: complete(api, prompt, 24), short + long))
        assert all(answers)
        assert answers[:6] == [complete(api, prompt, 24) for prompt in short]


def test_a_known_prompt_is_answered_as_before_with_a_draft_model():
    """mlx-lm's own server loses a token of the model's cache with each such request."""
    port, prompt = free_port(), "import os\nimport " * 40
    with server(port, "--draft-model", TINY_LM, "--kv-bits", "8", "--no-calibrate") as process:
        answers = [complete(client(port), prompt, 6) for _ in range(5)]
        assert len(set(answers)) == 1
        wait_for_message(process, " 160 cached", 4)
