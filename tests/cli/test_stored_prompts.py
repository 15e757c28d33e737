"""A server with a prompt store, as its users see it, and its failures."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import openai
import pytest
from adapters import adapter_folder
from commands import not_above_permissions
from damage import claiming_terabytes, emptied, truncated, with_flipped_bits
from hypothesis import example, given, strategies
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
from tokens import random_tokens
from transformers import AutoTokenizer

from mlx_turboquant import enable, make_prompt_cache
from mlx_turboquant.cli.admission import Admission
from mlx_turboquant.cli.kept_prompts import KeptPrompts, ScopedTokens
from mlx_turboquant.lm.prompt_store import PromptStore
from mlx_turboquant.measure.passages import random_names


def long_text() -> str:
    """A text long enough for the store to keep it."""
    return " ".join(random_names(120, random.Random(7)))


def asked(port: int, prompt: str) -> tuple[str, int]:
    """The answer, and the number of prompt tokens that were cached."""
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
        stop(process)
    with server(port, *STORED, str(tmp_path)) as process:
        second, known = asked(port, prompt)
        assert second == first
        # All but the last one.
        line = f"{known + 1:,} prompt tokens, {known:,} cached ({known:,} from disk), "
        wait_for_message(process, line)
        third, _ = asked(port, prompt + " and so on")
        assert statistics(port)["found_tokens"] >= known and statistics(port)["entries"] == 1
    with server(port, *STORED[:-1]):
        assert asked(port, prompt + " and so on")[0] == third


def stop(process: subprocess.Popen) -> None:
    """Ask a server to end, after it has written pending prompts."""
    process.terminate()
    process.wait(30)


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
        assert second == first and known > 300
        assert asked(port, prompts[1])[0]


@pytest.mark.parametrize("numbers", [[signal.SIGINT] * 2, [signal.SIGTERM] * 3])
def test_a_second_signal_ends_a_server_at_once_and_loses_no_prompt(tmp_path, numbers):
    port = free_port()
    with server(port, *STORED, str(tmp_path)) as process:
        stream = client(port).completions.create(
            model="default_model", prompt="def add(a, b):", max_tokens=10_000, stream=True
        )
        next(iter(stream))
        asked(port, long_text())
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.2)
        assert process.wait(30) == 0
        *_, last = stream
        assert last.choices[0].finish_reason is None
        assert "The server ends after 1 more answers" in messages_of(process).splitlines()[-1]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def unfinished(folder: Path) -> list[str]:
    """Files that are being written, or were when the process was killed."""
    return [name for name in os.listdir(folder) if name.startswith(".") and "-" in name]


def kill_while_it_writes(process: subprocess.Popen, port: int, folder: Path) -> str:
    """Ask a server until it is killed during a write, and return the prompt being written."""
    for number in range(20):
        prompt = f"{number} {long_text()}"
        asked(port, prompt)
        written, end = os.listdir(folder), time.monotonic() + 30
        while not unfinished(folder) and written == os.listdir(folder) and time.monotonic() < end:
            pass
        os.kill(process.pid, signal.SIGSTOP)
        if unfinished(folder):
            os.killpg(process.pid, signal.SIGKILL)
            return prompt
        os.kill(process.pid, signal.SIGCONT)
    pytest.fail("No write was seen in 20 requests.")


def test_a_server_that_is_killed_while_it_writes_leaves_a_store_without_that_prompt(tmp_path):
    port = free_port()
    with server(port, *STORED, str(tmp_path)) as process:
        prompt = kill_while_it_writes(process, port, tmp_path)
    written = len(list(tmp_path.glob("*.safetensors")))
    with server(port, *STORED, str(tmp_path)) as process:
        assert statistics(port)["entries"] == written
        first, known = asked(port, prompt)
        assert known < 10  # a prefix shared with another prompt
        stop(process)
    assert unfinished(tmp_path) == []
    assert len(list(tmp_path.glob("*.safetensors"))) == written + 1
    with server(port, *STORED[:-1]):
        assert asked(port, prompt)[0] == first


def test_two_servers_share_a_store_and_one_is_killed_while_it_writes(tmp_path):
    ports = free_port(), free_port()
    with (
        server(ports[0], *STORED, str(tmp_path)) as first,
        server(ports[1], *STORED, str(tmp_path)) as second,
    ):
        prompts = [f"{number} {long_text()}" for number in "abcd"]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda pair: asked(*pair), zip(ports * 2, prompts)))
            killed = pool.submit(kill_while_it_writes, first, ports[0], tmp_path)
            while not killed.done():
                asked(ports[1], f"{time.time()} {long_text()}")
        wait_until_written(ports[1])
        answers = [asked(ports[1], prompt) for prompt in [*prompts, killed.result()]]
        stop(second)
    assert unfinished(tmp_path) == []
    with server(ports[0], *STORED[:-1]):
        alone = [asked(ports[0], prompt)[0] for prompt in [*prompts, killed.result()]]
    assert alone == [text for text, _ in answers]


def bundled_model_with(folder: Path, **arguments) -> str:
    """A copy of the bundled model with another configuration."""
    shutil.copytree(TINY_LM, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | arguments))
    return str(folder)


def test_a_prompt_that_cannot_be_cut_back_is_kept_at_checkpoints(tmp_path):
    """Two of four layers have a sliding window."""
    kinds = ["sliding_attention", "full_attention"] * 2
    model = bundled_model_with(tmp_path / "model", layer_types=kinds, sliding_window=64)
    port, prompt = free_port(), "import os\nx = os.getcwd()\n" * 500
    with server(port, "--model", model, *STORED, str(tmp_path / "store")) as process:
        _, known = asked(port, prompt)
        assert known == 0
        stop(process)
    with server(port, "--model", model, *STORED, str(tmp_path / "store")):
        _, known = asked(port, prompt[:-100] + "print(x)")
        assert known == 4096


def known_to(name: str, kind: str, port: int) -> int:
    """The number of cached prompt tokens when a key or a user sends the prompt."""
    api = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=name, max_retries=0)
    user = {"user": name} if kind == "user" else {}
    response = api.completions.create(
        model="default_model", prompt=long_text(), max_tokens=2, temperature=0, **user
    )
    return response.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("options", [("--host", "0.0.0.0"), ("--prompt-store-scope", "user")])
def test_prompts_in_memory_are_found_only_by_those_who_asked_them_without_a_store(options):
    kind, port = "user" if "user" in options else "key", free_port()
    with server(port, *options):
        assert known_to("alice", kind, port) == 0
        assert known_to("bob", kind, port) == 0
        assert known_to("alice", kind, port) > 300


@pytest.mark.parametrize("kind", ["key", "user"])
def test_prompts_are_found_only_by_those_who_asked_them(tmp_path, kind):
    """In memory and on disk."""
    port = free_port()

    def asked_by(name: str) -> int:
        return known_to(name, kind, port)

    options = (*STORED, str(tmp_path), "--prompt-store-scope", kind)
    with server(port, *options) as process:
        assert asked_by("alice") == 0
        assert asked_by("bob") == 0
        assert asked_by("alice") > 300
        stop(process)
    with server(port, *options):
        assert asked_by("carol") == 0
        assert asked_by("bob") > 300
        assert statistics(port)["entries"] == 2


def test_an_adapter_that_a_request_names_gets_no_prompt_of_its_base(tiny_lm, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", tiny_lm[0])
    prompt, port = long_text(), free_port()

    def known_tokens(**fields: str) -> int:
        response = client(port).completions.create(
            model=TINY_LM, prompt=prompt, max_tokens=2, temperature=0, extra_body=fields
        )
        return response.usage.prompt_tokens_details.cached_tokens

    with server(port, *STORED, str(tmp_path / "store")) as process:
        assert known_tokens() == 0
        stop(process)
    with server(port, *STORED, str(tmp_path / "store")) as process:
        assert known_tokens(adapters=str(adapter)) == 0
        assert known_tokens() > 300
        stop(process)
    with server(port, *STORED, str(tmp_path / "store")):
        assert known_tokens(adapters=str(adapter)) > 300


def test_an_adapter_that_was_trained_again_gets_no_prompt_of_the_one_before(tiny_lm, tmp_path):
    """Its folder has the same name, by which alone mlx-lm tells models apart in memory."""
    adapter = adapter_folder(tmp_path / "adapter", tiny_lm[0], 1)
    prompt, port = long_text(), free_port()

    def asked_of(**fields: str) -> tuple[str, int]:
        response = client(port).completions.create(
            model=TINY_LM, prompt=prompt, max_tokens=8, temperature=0, extra_body=fields
        )
        return response.choices[0].text, response.usage.prompt_tokens_details.cached_tokens

    with server(port, *STORED, str(tmp_path / "store")):
        assert asked_of(adapters=str(adapter))[1] == 0
        assert asked_of()[1] == 0
        shutil.rmtree(adapter)
        adapter_folder(adapter, tiny_lm[0], 2)
        answer, known = asked_of(adapters=str(adapter))
        assert known == 0
    with server(port, "--kv-bits", "8", "--kv-window", "32"):
        assert asked_of(adapters=str(adapter)) == (answer, 0)


def test_prompts_in_memory_are_found_only_with_the_settings_that_they_have(tiny_lm):
    """Otherwise requests with different bits would be in one batch, which is not possible."""
    model, tokenizer = tiny_lm
    prompts = KeptPrompts(Admission(10**9), 10)
    tokens = list(range(40))
    for bits, known in ((8, 0), (8, 40), (4, 0)):
        enable(model, bits, uniform=True)
        prompts.use(model, tokenizer, "tiny")
        found = prompts.fetch_nearest_cache("path", ScopedTokens([*tokens, 1], ""))
        assert 41 - len(found[1]) == known
        cache = make_prompt_cache(model, bits, uniform=True)
        model(mx.array([tokens]), cache=cache)
        prompts.insert_cache("path", ScopedTokens(tokens, ""), cache)


TOKENIZER = AutoTokenizer.from_pretrained(TINY_LM)


def first_tokens(length: int) -> str:
    """A text of ``length`` tokens; longer ones begin with it."""
    text = TOKENIZER.decode(TOKENIZER.encode(long_text())[:length])
    assert TOKENIZER.encode(text) == TOKENIZER.encode(long_text())[:length]
    return text


class Ask(NamedTuple):
    """A user's request, whose prompt begins with ``length`` tokens of a text that all users share.

    With a ``seed`` mlx-lm answers it alone, otherwise in a batch. In a ``chat`` half of the text is
    the system prompt, at whose end a cache is kept as well.
    """

    user: int
    length: int
    count: int = 1
    seed: int | None = None
    chat: bool = False

    def cached(self, port: int, users: str) -> int:
        """The number of cached prompt tokens; each set of ``users`` is new to the server."""
        api, text = client(port), first_tokens(self.length)
        settings = {"max_tokens": self.count, "temperature": 0, "seed": self.seed}
        settings |= {"model": "default_model", "user": f"{users} {self.user}"}
        if self.chat:
            half = first_tokens(self.length // 2)
            contents = {"system": half, "user": text.removeprefix(half)}
            messages = [{"role": role, "content": contents[role]} for role in contents]
            answer = api.chat.completions.create(messages=messages, **settings)
        else:
            answer = api.completions.create(prompt=text, **settings)
        assert answer.usage.prompt_tokens == self.length
        return answer.usage.prompt_tokens_details.cached_tokens

    def explains(self, other: "Ask") -> int:
        """The most tokens of another request that may be cached because of this one."""
        return min(self.length + self.count, other.length - 1) if other.user == self.user else 0


@pytest.fixture(scope="module")
def port_of_users(tmp_path_factory):
    """The port of a server with prompts of each user alone, in memory and on disk."""
    folder = tmp_path_factory.mktemp("users")
    shutil.copytree(TINY_LM, folder / "model")
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (folder / "model" / "chat_template.jinja").write_text(template)
    options = ("--model", str(folder / "model"), "--prompt-store-scope", "user")
    port = free_port()
    with server(port, *options, "--prompt-cache-size", "100000", *STORED, str(folder / "store")):
        yield port


ASKS = strategies.builds(
    Ask,
    strategies.integers(0, 2),
    strategies.sampled_from((2, 3, 20, 21, 50)),
    strategies.integers(1, 3),
    strategies.sampled_from((None, None, 1)),
    strategies.booleans(),
)
_examples = count()


@given(strategies.lists(ASKS, min_size=2, max_size=6))
@example([Ask(0, 50), Ask(1, 2)])
@example([Ask(0, 50, 3), Ask(1, 50), Ask(2, 21), Ask(2, 20, seed=1), Ask(1, 3, chat=True)])
def test_users_only_know_what_they_have_asked_themselves(port_of_users, asks):
    """While requests that share a prefix are answered together, and after that."""
    users = f"example {next(_examples)}, user"
    with ThreadPoolExecutor(len(asks)) as clients:
        known = list(clients.map(lambda ask: ask.cached(port_of_users, users), asks))
    for ask, tokens in zip(asks, known):
        assert tokens <= max(other.explains(ask) for other in asks)
    for user in {3, *(ask.user for ask in asks)}:
        probe = Ask(user, 60)
        own = [ask for ask in asks if ask.user == user]
        tokens = probe.cached(port_of_users, users)
        assert tokens <= max((ask.explains(probe) for ask in own), default=0)
        # A cache of one token is not looked up.
        assert tokens >= max((ask.length for ask in own), default=0)


def test_a_stranger_who_knows_how_a_prompt_begins_knows_no_more(port_of_users):
    """In memory and, because the prompt is long, on disk; during the answer and after it."""
    probe = Ask(2, 300)
    with ThreadPoolExecutor(2) as clients:
        owner = clients.submit(Ask(0, 350, 20).cached, port_of_users, "strangers")
        beginning = Ask(1, 1)
        assert beginning.cached(port_of_users, "strangers") == 0
        assert owner.result() == 0
    assert beginning.cached(port_of_users, "strangers") == 0
    assert beginning._replace(length=300).cached(port_of_users, "strangers") <= 1
    assert probe.cached(port_of_users, "strangers") == 0
    assert Ask(0, 351).cached(port_of_users, "strangers") >= 350


def test_a_prompt_with_a_picture_is_known_in_memory_alone(tmp_path, tiny_lm):
    """mlx-lm has negative numbers for parts of images, which are not valid tokens elsewhere."""
    model, tokenizer = tiny_lm
    store, cache = PromptStore(tmp_path), make_prompt_cache(enable(model, 4))
    model(random_tokens(300)[None], cache=cache)
    prompts = KeptPrompts(Admission(10**12), store=store)
    prompts.use(model, tokenizer, "tiny-lm")
    tokens = ScopedTokens([7, -(10**15), *range(298)], "")
    prompts.insert_cache("model", tokens[:], cache)
    known, rest = prompts.fetch_nearest_cache("model", ScopedTokens([*tokens, 5], ""))
    assert rest == [5] and known[0].offset == 300
    store.close()
    assert store.entries() == []


def test_a_disk_without_space_costs_a_warning_and_no_answer(tmp_path):
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    prompt, port = long_text(), free_port()
    with server(port, *STORED, str(tmp_path), prepare=small_files) as process:
        first, _ = asked(port, prompt)
        stop(process)
        assert "is not kept" in messages_of(process)
        assert "is there space for it?" in messages_of(process)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "store.json"]
    with server(port, *STORED, str(tmp_path)) as process:
        assert asked(port, prompt) == (first, 0)
        stop(process)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("is_there", [True, False])
def test_without_a_folder_that_it_can_write_to_a_server_serves(tmp_path, is_there):
    folder, port = tmp_path / "store", free_port()
    if is_there:
        folder.mkdir()
    else:
        folder /= "in the store"
        folder.parent.mkdir()
    (tmp_path / "store").chmod(0o500)
    with server(port, *STORED, str(folder), prepare=not_above_permissions) as process:
        assert asked(port, "Hello")[0]
        assert "There is no prompt store" in messages_of(process)
    (tmp_path / "store").chmod(0o700)
    assert list((tmp_path / "store").iterdir()) == []


def test_damaged_files_are_removed_and_their_prompts_are_read_again(tmp_path):
    prompts, port = [f"{number} {long_text()}" for number in "abcd"], free_port()
    with server(port, *STORED, str(tmp_path)) as process:
        answers = [asked(port, prompt)[0] for prompt in prompts]
        stop(process)
    files = sorted(tmp_path.glob("*.safetensors"))
    for file, damage in zip(files, (truncated, with_flipped_bits, claiming_terabytes, emptied)):
        file.write_bytes(damage(file.read_bytes()))
    with server(port, *STORED, str(tmp_path)) as process:
        assert [asked(port, prompt)[0] for prompt in prompts] == answers
        assert messages_of(process).count("is removed from the store") == len(files) == 4
        stop(process)
    assert not set(files) & set(tmp_path.glob("*.safetensors"))
    with server(port, *STORED, str(tmp_path)):
        found = [asked(port, prompt) for prompt in prompts]
    assert [text for text, _ in found] == answers and all(known > 300 for _, known in found)


def test_files_that_change_places_between_models_answer_for_their_own(tmp_path):
    other = bundled_model_with(tmp_path / "other", rope_theta=500.0)
    prompt, port, folder, answers = long_text(), free_port(), tmp_path / "store", []
    for model in (TINY_LM, other):
        with server(port, "--model", model, *STORED, str(folder)) as process:
            answers.append(asked(port, prompt)[0])
            stop(process)
    first, second = folder.glob("*.safetensors")
    first.rename(folder / "third")
    second.rename(first)
    (folder / "third").rename(second)
    for model, expected in zip((TINY_LM, other), answers):
        with server(port, "--model", model, *STORED, str(folder)):
            text, known = asked(port, prompt)
            assert text == expected and known > 300


def test_a_clock_that_was_set_back_loses_nothing_and_stops_nothing(tmp_path):
    """Files appear to be from the distant future; they are evicted first."""
    prompts, port = [f"{number} {long_text()}" for number in "abc"], free_port()
    with server(port, *STORED, str(tmp_path)) as process:
        answers = [asked(port, prompt)[0] for prompt in prompts[:2]]
        stop(process)
    future = 4e9
    for file in tmp_path.glob("*.safetensors"):
        os.utime(file, (future, future))
    size = ("--prompt-store-size", str(int(2.5 * file.stat().st_size)))
    with server(port, *STORED, str(tmp_path), *size) as process:
        text, known = asked(port, prompts[1])
        assert text == answers[1] and known > 300
        asked(port, prompts[2])
        stop(process)
    with server(port, *STORED, str(tmp_path), *size):
        assert [asked(port, prompt)[1] > 300 for prompt in prompts] == [False, True, True]


def test_a_request_that_ends_after_the_store_was_closed_costs_a_warning(tiny_lm, tmp_path, caplog):
    model, tokenizer = tiny_lm
    enable(model, 8)
    store = PromptStore(tmp_path)
    prompts = KeptPrompts(Admission(10**9), store=store)
    prompts.use(model, tokenizer, "tiny")
    tokens = ScopedTokens(tokenizer.encode("import os\n" * 100), "")
    store.close()
    cache = make_prompt_cache(model)
    model(mx.array([tokens]), cache=cache)
    prompts.insert_cache("model", tokens, cache)
    assert f"A prompt of {len(tokens)} tokens is not kept: {tmp_path} is closed" in caplog.text
    longer = ScopedTokens([*tokens, 1], "")
    assert prompts.fetch_nearest_cache("model", longer)[1] == [1]


@pytest.mark.parametrize("prefixes, repeats", [(8, 4), pytest.param(60, 7, marks=pytest.mark.slow)])
def test_requests_wait_for_memory_and_get_their_answers(tmp_path, prefixes, repeats):
    """Sixteen clients with little memory, in which few requests fit, and a store."""
    port = free_port()
    prompts, answers = prompts_with_codes(prefixes * repeats, prefixes)
    options = (*STORED, str(tmp_path), "--memory-limit", "80MB")
    with server(port, *options) as process:
        with ThreadPoolExecutor(16) as pool:
            completed = list(pool.map(lambda prompt: complete(client(port), prompt), prompts))
        right = [text.strip().startswith(code.strip()) for text, code in zip(completed, answers)]
        # The model finds nearly all codes.
        assert sum(right) > 0.9 * len(prompts)
        # 340 MB are in use before the first request.
        assert resident_bytes(process) < 1e9
        short = client(port).completions.create(
            model="default_model", prompt=prompts[0], max_tokens=1
        )
        count = 10**7 + short.usage.prompt_tokens
        with pytest.raises(openai.BadRequestError) as refused:
            complete(client(port), prompts[0], 10**7)
        message = refused.value.body["message"]
        assert f"A request of {count:,} tokens" in message
        assert "more than is left beside the model" in message
    with server(port, *STORED[:-1]):
        alone = {prompt: complete(client(port), prompt) for prompt in set(prompts[: 2 * prefixes])}
    assert all(text == alone.get(prompt, text) for prompt, text in zip(prompts, completed))


@pytest.mark.parametrize(
    "options, message",
    [
        (("--prompt-store", __file__), "is not a folder"),
        (("--prompt-store", "store", "--prompt-store-size", "0"), "'0' is not a size"),
        (("--prompt-store", "store", "--prompt-store-size", "20 bananas"), "is not a size"),
        (("--prompt-store", "store", "--draft-model", TINY_LM), "used with --draft-model"),
    ],
)
def test_a_store_that_is_not_possible_is_one_sentence(tmp_path, options, message):
    command = [sys.executable, "-m", "mlx_turboquant", "server", "--model", TINY_LM, *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
