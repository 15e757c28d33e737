"""The server as its users see it: a process of its own, and the openai client."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from typing import NamedTuple

import openai
import pytest
from conftest import REPOSITORY

from mlx_turboquant.measure.needle import answer, code_line, question, random_code, random_names

TINY_LM = str(REPOSITORY / "examples" / "tiny-lm")
START_SECONDS = 60


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def started(command: list[str], port: int):
    """A server on ``port``, with processes that it may start; they are killed if still there."""
    # Not a pipe, which would be full after a thousand requests and stop the server.
    with (
        tempfile.TemporaryFile("w+") as messages,
        subprocess.Popen(command, stderr=messages, start_new_session=True) as process,
    ):
        process.stderr = messages
        try:
            wait_for(port, process)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def server(port: int, *options: str):
    """A running server of the bundled model."""
    command = [sys.executable, "-m", "mlx_turboquant", "server", "--model", TINY_LM]
    return started([*command, "--port", str(port), *options], port)


def messages_of(process: subprocess.Popen) -> str:
    process.stderr.seek(0)
    return process.stderr.read()


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


class Running(NamedTuple):
    api: openai.OpenAI
    process: subprocess.Popen

    def resident_bytes(self) -> int:
        output = subprocess.check_output(["ps", "-o", "rss=", "-p", str(self.process.pid)])
        return 1024 * int(output)


@pytest.fixture(scope="module")
def running():
    """A server with 8-bit caches, so small a window that tokens are packed, and little room."""
    port = free_port()
    options = ("--kv-bits", "8", "--kv-window", "32", "--log-level", "ERROR")
    with server(port, *options, "--prompt-cache-bytes", "20M") as process:
        yield Running(client(port), process)


def prompts_with_codes(count: int, shared: int = 4) -> tuple[list[str], list[str]]:
    """Questions about one of four codes, after long texts that they share, and answers."""
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
        # Prompts of different length, which begin in the same way.
        filler = "\n".join(["import os"] * (index % 7))
        prompts.append(f"{text}\n{filler}\n{question(names[which])}")
        answers.append(answer(codes[which]))
    return prompts, answers


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
        os.kill(running.process.pid, signal.SIGSTOP)  # so that nothing is accepted
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
            resident.append(running.resident_bytes())
    assert together == [alone[prompt] for prompt in prompts]
    # The model finds nearly all codes, so that answers differ from each other.
    right = [text.strip().startswith(code.strip()) for text, code in zip(together, answers)]
    assert sum(right) > 0.9 * requests
    # All that is kept is 20 MB of caches. Fifty requests that were kept would be 50 to 100 MB at
    # every step, while what the allocator keeps goes up and down.
    assert min(after - before for before, after in pairwise(resident)) < 30e6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_ends_when_it_is_asked_to(number):
    port = free_port()
    with server(port, "--log-level", "ERROR") as process:
        complete(client(port), "def add(a, b):", 3)
        process.send_signal(number)
        assert process.wait(timeout=60) == 0
        assert "Traceback" not in messages_of(process)
    socket.create_server(("127.0.0.1", port)).close()


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
        (["--model", "no/such/folder"], "'no/such/folder' cannot be loaded"),
        (["--kv-window", "-3"], "A window of -3 is not possible"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(options, message):
    command = [sys.executable, "-m", "mlx_turboquant", "server", "--model", TINY_LM, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "mlx_turboquant", "server", "--model", TINY_LM]
        result = subprocess.run([*command, "--port", port], capture_output=True, text=True)
        assert result.returncode == 2
        assert "Address already in use" in result.stderr


def test_limited_caches_are_served_in_batches():
    """Answers to prompts that fit are those of one at a time; longer ones are answered too."""
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


def long_text(count: int = 1200) -> str:
    rng = random.Random(7)
    return " ".join(random_names(count // 4, rng))


def asked(port: int, prompt: str) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were known."""
    response = client(port).completions.create(
        model="default_model", prompt=prompt, max_tokens=8, temperature=0
    )
    details = response.usage.prompt_tokens_details
    return response.choices[0].text, details.cached_tokens


def statistics(port: int) -> dict[str, int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/prompt-store") as answer_:
        return json.load(answer_)


def wait_until_written(port: int) -> None:
    for _ in range(300):
        if statistics(port)["written"]:
            return
        time.sleep(0.1)
    pytest.fail("Nothing is written after 30 seconds.")


STORED = ("--kv-bits", "8", "--kv-window", "32", "--log-level", "INFO", "--prompt-store")


def test_a_prompt_is_known_after_a_restart(tmp_path):
    prompt, port = long_text(), free_port()
    with server(port, *STORED, str(tmp_path)) as process:
        first, known = asked(port, prompt)
        assert known == 0
        process.terminate()  # which writes what is pending
        process.wait(30)
    with server(port, *STORED, str(tmp_path)) as process:
        second, known = asked(port, prompt)
        assert second == first
        # All but the last one.
        assert f"Prompt of {known + 1} tokens: 0 from memory, {known} from disk, 1 to read" in (
            messages_of(process)
        )
        third, _ = asked(port, prompt + " and so on")
        assert statistics(port)["found_tokens"] >= known and statistics(port)["entries"] == 1
    with server(port, *STORED[:-1]):
        assert asked(port, prompt + " and so on")[0] == third


@pytest.mark.parametrize("is_written", [True, False])
def test_a_server_that_is_killed_loses_only_what_was_not_written(tmp_path, is_written):
    prompt, port = long_text(), free_port()
    with server(port, *STORED, str(tmp_path)) as process:
        first, _ = asked(port, prompt)
        if is_written:
            wait_until_written(port)
        os.killpg(process.pid, signal.SIGKILL)
    with server(port, *STORED, str(tmp_path)):
        second, known = asked(port, prompt)
        assert second == first and (known > 500) == is_written
        assert statistics(port)["entries"] == int(is_written)


def test_a_server_that_is_killed_in_the_middle_of_a_request_keeps_what_it_has_written(tmp_path):
    prompts, port = [f"{number} {long_text()}" for number in range(2)], free_port()
    with server(port, *STORED, str(tmp_path)) as process:
        first, _ = asked(port, prompts[0])
        wait_until_written(port)
        stream = client(port).completions.create(
            model="default_model", prompt=prompts[1], max_tokens=1000, stream=True
        )
        next(iter(stream))
        os.killpg(process.pid, signal.SIGKILL)
    with server(port, *STORED, str(tmp_path)):
        second, known = asked(port, prompts[0])
        assert second == first and known > 500
        assert asked(port, prompts[1])[0]


def test_two_servers_share_a_store_and_survive_that_one_is_killed_while_it_writes(tmp_path):
    ports = free_port(), free_port()
    with (
        server(ports[0], *STORED, str(tmp_path)) as first,
        server(ports[1], *STORED, str(tmp_path)),
    ):
        prompts = [f"{number} {long_text()}" for number in range(4)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda pair: asked(*pair), zip(ports * 2, prompts)))
        wait_until_written(ports[0])
        os.killpg(first.pid, signal.SIGKILL)
        wait_until_written(ports[1])
        answers = [asked(ports[1], prompt) for prompt in prompts]
    with server(ports[0], *STORED[:-1]):
        assert [asked(ports[0], prompt)[0] for prompt in prompts] == [text for text, _ in answers]


def test_a_prompt_that_cannot_be_cut_back_is_kept_at_checkpoints(tmp_path):
    """Two of four layers have a sliding window."""
    folder = tmp_path / "sliding"
    shutil.copytree(TINY_LM, folder)
    config = json.loads((folder / "config.json").read_text())
    kinds = ["sliding_attention", "full_attention"] * (config["num_hidden_layers"] // 2)
    config |= {"layer_types": kinds, "sliding_window": 64}
    (folder / "config.json").write_text(json.dumps(config))
    port, prompt = free_port(), "import os\nx = os.getcwd()\n" * 500
    with server(port, "--model", str(folder), *STORED, str(tmp_path / "store")) as process:
        _, known = asked(port, prompt)
        assert known == 0
        process.terminate()
        process.wait(30)
    with server(port, "--model", str(folder), *STORED, str(tmp_path / "store")):
        _, known = asked(port, prompt[:-100] + "print(x)")
        assert known == 4096


@pytest.mark.parametrize("kind", ["key", "user"])
def test_prompts_are_found_only_by_those_who_asked_them(tmp_path, kind):
    """In memory and on disk."""
    prompt, port = long_text(), free_port()

    def asked_by(name: str) -> int:
        api = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=name, max_retries=0)
        user = {"user": name} if kind == "user" else {}
        response = api.completions.create(
            model="default_model", prompt=prompt, max_tokens=2, temperature=0, **user
        )
        return response.usage.prompt_tokens_details.cached_tokens

    options = (*STORED, str(tmp_path), "--prompt-store-scope", kind)
    with server(port, *options) as process:
        assert asked_by("alice") == 0
        assert asked_by("bob") == 0
        assert asked_by("alice") > 500
        process.terminate()
        process.wait(30)
    with server(port, *options):
        assert asked_by("carol") == 0
        assert asked_by("bob") > 500
        assert statistics(port)["entries"] == 2


def test_without_a_folder_that_it_can_write_to_a_server_serves(tmp_path):
    port = free_port()
    with server(port, *STORED, "/proc/no/store") as process:
        assert asked(port, "Hello")[0]
        assert "There is no prompt store" in messages_of(process)


@pytest.mark.parametrize("prefixes, repeats", [(8, 4), pytest.param(60, 7, marks=pytest.mark.slow)])
def test_requests_wait_for_memory_and_get_their_answers(tmp_path, prefixes, repeats):
    """Sixteen clients where few fit, with a store behind little memory."""
    port = free_port()
    prompts, answers = prompts_with_codes(prefixes * repeats, prefixes)
    options = (*STORED, str(tmp_path), "--memory-limit", "80MB")
    with server(port, *options) as process:
        with ThreadPoolExecutor(16) as pool:
            completed = list(pool.map(lambda prompt: complete(client(port), prompt), prompts))
        right = [text.strip().startswith(code.strip()) for text, code in zip(completed, answers)]
        # Of which the model finds nearly all.
        assert sum(right) > 0.9 * len(prompts)
        # 340 MB of them before the first request.
        assert Running(client(port), process).resident_bytes() < 1e9
        with pytest.raises(openai.BadRequestError) as refused:
            client(port).completions.create(model="default_model", prompt="x", max_tokens=10**7)
        assert "more than is left beside the model" in refused.value.response.json()["error"]
    with server(port, *STORED[:-1]):
        alone = {prompt: complete(client(port), prompt) for prompt in set(prompts[: 2 * prefixes])}
    assert all(text == alone.get(prompt, text) for prompt, text in zip(prompts, completed))


@pytest.mark.parametrize(
    "options, message",
    [
        (("--memory-limit", "1MB"), "use a larger --memory-limit"),
        (("--memory-limit", "20 bananas"), "is not a size"),
        (("--prompt-store", __file__), "is not a folder"),
        (("--prompt-store", "store", "--prompt-store-size", "0"), "'0' is not a size"),
        (("--prompt-store", "store", "--prompt-store-size", "20 bananas"), "is not a size"),
        (("--prompt-store", "store", "--draft-model", TINY_LM), "caches of a --draft-model"),
    ],
)
def test_a_store_that_is_not_possible_is_one_sentence(tmp_path, options, message):
    command = [sys.executable, "-m", "mlx_turboquant", "server", "--model", TINY_LM, *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
