"""No request ends or blocks the server: invalid ones get a sentence in OpenAI's error format."""

import http.client
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import openai
import pytest
from damage import truncated
from servers import TINY_LM, client, complete, free_port, server

from mlx_turboquant.cli.requests import answer

PROMPT = "def add(a, b):\n    return"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# A template with three roles, as many models have, and only text as content.
TEMPLATE = """{% for message in messages %}
{%- if message.role not in ("system", "user", "assistant") %}
{{- raise_exception("A role of " ~ message.role ~ " is not known") }}
{%- endif %}{{ message.content }}
{% endfor %}"""


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """The port of a server with a chat template and without a folder of hub models."""
    folder = tmp_path_factory.mktemp("models") / "tiny-lm"
    shutil.copytree(TINY_LM, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder.parent / "missing")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        port = free_port()
        options = ("--kv-bits", "8", "--max-tokens", "16", "--log-level", "ERROR")
        with server(port, "--model", str(folder), *options):
            yield port


@pytest.fixture(scope="module")
def right_text(port):
    return complete(client(port), PROMPT)


@pytest.fixture(autouse=True)
def next_request_is_answered(port, right_text):
    yield
    assert complete(client(port), PROMPT) == right_text


def answer_to(
    port: int, path: str, body: bytes, headers: dict[str, str] | None = None, method: str = "POST"
) -> tuple[int, bytes]:
    """The status and the body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def sentence_in(body: bytes) -> str:
    """The message of an error, whose form is that of OpenAI's API."""
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"][-1] == "." and "\n" not in error["message"]
    return error["message"]


def refused(port: int, path: str, **fields) -> tuple[str, str]:
    """The message and the field that the openai client gets for a request with these fields."""
    key, value = ("prompt", PROMPT) if path == TEXT else ("messages", chat("Hi"))
    with pytest.raises(openai.BadRequestError) as error:
        client(port).post(
            path.removeprefix("/v1"),
            body={"model": "default_model", "max_tokens": 2, key: value, **fields},
            cast_to=object,
        )
    return error.value.body["message"], error.value.param


def chat(content, role: str = "user") -> list[dict]:
    return [{"role": role, "content": content}]


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("logit_bias", {"999999999": 5}, "has token 999999999: use ids of the model's 4096 tokens"),
        ("logit_bias", {"7": None}, '{"7": null}: use an object of token ids, each with a number'),
        ("logit_bias", {"7": 101}, "from -100 to 100"),
        ("logit_bias", {"seven": 1}, "use an object of token ids"),
        ("stop", 5, "stop is 5: use a string or a list of strings."),
        ("stop", ["\n", 5], "stop[1] is 5: use a string."),
        ("temperature", -1, "temperature is -1: use a number from 0 to 100."),
        ("temperature", True, "temperature is true: use a number from 0 to 100."),
        ("top_k", 4096, "top_k is 4096: use less than 4096, the size of the vocabulary."),
        ("xtc_threshold", 0.7, "use a number from 0 to 0.5."),
        ("repetition_context_size", 2**40, "use an integer from 0 to 2147483647."),
        ("max_tokens", 10**400, "max_tokens is 1000"),
        ("max_tokens", 2**31 - 1, "more than is left beside the model: ask for less"),
        ("seed", -1, "use an integer from 0 to 18446744073709551615."),
        ("draft_model", ["a"], 'draft_model is ["a"]: use a string.'),
        ("stream_options", {"include_usage": 1}, "include_usage is true or false."),
        ("logprobs", 3, "logprobs is 3: use true or false."),
        ("user", 5, "user is 5: use a string."),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_field_that_is_not_possible_is_one_sentence(port, path, field, value, message):
    sentence, param = refused(port, path, **{field: value})
    assert message in sentence and param.startswith(field)


@pytest.mark.parametrize(
    "path, fields, message",
    [
        (TEXT, {"prompt": ""}, "The prompt has no tokens: give one that is not empty."),
        (TEXT, {"prompt": ["a", "b"]}, 'prompt is ["a", "b"]: use a string.'),
        (TEXT, {"prompt": None}, "The field prompt is missing: give a string."),
        (CHAT, {"messages": None}, "The field messages is missing: give a list of one or more"),
        (CHAT, {"messages": []}, "messages is []: use a list of one or more messages."),
        (CHAT, {"messages": ["Hi"]}, 'messages[0] is "Hi": use an object with a role (string)'),
        (CHAT, {"messages": chat([5])}, "a content (string, null, or a list of parts"),
        (CHAT, {"messages": chat("Hi", "king")}, "A role of king is not known"),
        (CHAT, {"messages": chat([{"type": "image", "image": "x"}])}, "Only 'text' content type"),
        (CHAT, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "none of"),
        (CHAT, {"chat_template_kwargs": {"return_dict": True}}, "none of"),
        (CHAT, {"tools": [{"type": "function"}]}, "use an object whose function has a name."),
    ],
)
def test_a_prompt_that_is_not_possible_is_one_sentence(port, path, fields, message):
    sentence, param = refused(port, path, **fields)
    assert message in sentence and param.startswith(tuple(fields))


def test_what_is_null_counts_as_not_given(port, right_text):
    names = ("stop", "logit_bias", "seed", "user", "max_completion_tokens", "stream", "top_p")
    fields = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, **dict.fromkeys(names)}
    status, body = answer_to(port, TEXT, json.dumps(fields).encode())
    assert status == 200 and json.loads(body)["choices"][0]["text"] == right_text


def test_the_end_of_a_stream_comes_with_options_that_say_nothing(port):
    body = {"prompt": PROMPT, "max_tokens": 2, "stream": True, "stream_options": {}}
    status, events = answer_to(port, TEXT, json.dumps(body).encode())
    assert status == 200 and events.endswith(b"data: [DONE]\n\n")


def test_an_answer_can_be_gone_on_with(port):
    """All tokens of the prompt are in a cache that was kept, so that none is left to prefill."""
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": True}
    first = json.loads(answer_to(port, TEXT, json.dumps(body).encode())[1])["choices"][0]
    for _ in range(2):
        second = client(port).completions.create(
            model="default_model", prompt=f"{PROMPT} {first['text']}", max_tokens=4, temperature=0
        )
    assert second.choices[0].text and second.usage.prompt_tokens_details.cached_tokens > 0


def test_a_model_that_is_not_there_is_not_found(port):
    with pytest.raises(openai.NotFoundError) as error:
        client(port).completions.create(model="no/such", prompt=PROMPT, max_tokens=2)
    assert "no/such is not a folder, and " in error.value.body["message"]
    assert (error.value.param, error.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize("method, path", [("GET", "/v2"), ("POST", "/v1/embeddings")])
def test_a_path_that_is_not_there_is_not_found(port, method, path):
    status, body = answer_to(port, path, b"{}", method=method)
    assert status == 404 and f'There is nothing at "{path}"' in sentence_in(body)


def test_models_are_listed_without_a_folder_of_the_hub(port):
    (model,) = client(port).models.list()
    assert Path(model.id).name == "tiny-lm"


@pytest.mark.parametrize(
    "body, headers, status, message",
    [
        (b"", {}, 400, "The body is not valid JSON"),
        (b'{"prompt": "x"', {}, 400, "not valid JSON"),
        (b"\xff\xfe", {}, 400, "not valid JSON in UTF-8"),
        (b'{"prompt": "x", "temperature": NaN}', {}, 400, "not JSON compliant"),
        (b'{"prompt": "x", "temperature": 1e999}', {}, 400, "not JSON compliant"),
        (b'{"prompt": "\\ud800"}', {}, 400, "surrogates not allowed"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", {}, 400, "not valid JSON"),
        (b"[" * 100_000, {}, 400, "not valid JSON"),
        (b"[]", {}, 400, "The body is []: use a JSON object."),
        (b"{}", {"Content-Length": "-1"}, 400, 'The Content-Length is "-1": use a number'),
        (b"{}", {"Content-Length": "two"}, 400, 'The Content-Length is "two": use a number'),
        (b"{}", {"Content-Length": "9" * 12}, 413, "bytes: use at most"),
        (None, {"Transfer-Encoding": "chunked"}, 411, "no Content-Length"),
    ],
)
def test_a_body_that_cannot_be_read_is_one_sentence(port, body, headers, status, message):
    answered, text = answer_to(port, TEXT, body, headers)
    assert answered == status and message in sentence_in(text)


def test_a_client_that_hangs_up_is_forgotten(port):
    """While it sends its headers or its body, or is being answered."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": 500, "stream": True}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    for sent in (request[:20], request[:-20], request):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(sent)
            if sent is request:
                assert connection.recv(10)


def test_headers_that_never_end_are_refused(port):
    status, _ = answer_to(port, TEXT, b"", {f"X-{number}": "x" for number in range(1000)})
    assert status == 431


def test_a_server_whose_model_cannot_be_loaded_ends_with_an_error(tmp_path):
    """Its generation thread ends, without which it would refuse all requests forever."""
    folder = tmp_path / "damaged"
    shutil.copytree(TINY_LM, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(truncated(weights.read_bytes()))
    command = [sys.executable, "-m", "mlx_turboquant", "server", "--port", str(free_port())]
    result = subprocess.run(
        [*command, "--model", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert "The server ends because generation has failed: " in result.stderr


class FailingHandler(BaseHTTPRequestHandler):
    """A handler whose answers fail: streams after they have begun, others before their headers.

    mlx-lm's answers begin in the same way.
    """

    def do_POST(self) -> None:
        answer(FailingHandler.begin_and_fail, self)

    def begin_and_fail(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        if body["stream"]:
            self.send_header("Content-type", "text/event-stream")
            self.end_headers()
        raise RuntimeError("Out of memory")

    def _set_cors_headers(self) -> None:
        pass

    def log_message(self, *_) -> None:
        pass


@pytest.mark.parametrize(
    "stream, error", [(True, openai.APIError), (False, openai.InternalServerError)]
)
def test_an_answer_that_fails_says_so_to_its_client(stream, error):
    with HTTPServer(("127.0.0.1", 0), FailingHandler) as failing:
        threading.Thread(target=failing.handle_request).start()
        with pytest.raises(error, match=r"The request has failed \(Out of memory\)") as raised:
            list(
                client(failing.server_port).completions.create(
                    model="default_model", prompt=PROMPT, stream=stream
                )
            )
        assert raised.value.type == "server_error"


NAMES = (
    "adapters best_of chat_template_kwargs draft_model echo frequency_context_size "
    "frequency_penalty logit_bias logprobs max_completion_tokens max_tokens messages metadata "
    "min_p model n num_draft_tokens presence_context_size presence_penalty prompt repetition_"
    "context_size repetition_penalty response_format role_mapping seed stop store stream "
    "stream_options suffix temperature tool_choice tools top_k top_logprobs top_p unknown user "
    "xtc_probability xtc_threshold"
).split()
# Fields that name a model or adapters would make the server load it.
NAMES_OF_MODELS = ("adapters", "draft_model", "model")
# None of these values makes the server generate thousands of tokens.
NUMBERS = (0, 1, 2, 3, -1, 11, 2**31 - 1, 2**31, 2**63, 2**64, -(2**70), 10**400)
FLOATS = (0.0, 0.3, 0.5, 1.0, -0.5, 2.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"))
STRINGS = ("", "x", "7", "\n", "user", "def f(x):\n", "\ud800", "\0", "ü" * 50, "text", "[" * 200)
KEYS = ("7", "4096", "999999999", "-1", "role", "content", "type", "text", "function", "name")


def junk(rng: random.Random, depth: int = 0):
    """A value of any type."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [junk(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        more = (
            "include_usage",
            "tokenize",
            "tool_calls",
            "image_url",
            "arguments",
            "enable_thinking",
        )
        keys = rng.choices(KEYS + more, k=rng.randrange(4))
        return {key: junk(rng, depth + 1) for key in keys}
    choices = ((None,), (False, True), NUMBERS, FLOATS, STRINGS, (rng.uniform(-3, 3),))
    return rng.choice(choices[kind])


def fuzzed(number: int) -> tuple[str, bytes]:
    """A path and a body: a correct body with up to four junk fields, or a damaged one."""
    rng = random.Random(number)
    path = rng.choice((CHAT, TEXT))
    body = {"max_tokens": rng.randrange(1, 3), "prompt": "x =", "messages": chat("x =")}
    for name in rng.sample(NAMES, rng.randrange(1, 5)):
        value = junk(rng)
        if not (name in NAMES_OF_MODELS and isinstance(value, str)):
            body[name] = value
    raw = json.dumps(body).encode()
    if rng.random() < 0.1:
        start, stop = sorted(rng.choices(range(len(raw)), k=2))
        raw = rng.choice((raw[:stop], raw[start:], raw[:start] + rng.randbytes(3) + raw[stop:]))
    return path, raw


def outcome(port: int, number: int) -> int:
    """Send a fuzzed request; its answer is a text, or a sentence about the error."""
    path, raw = fuzzed(number)
    status, body = answer_to(port, path, raw)
    if status != 200:
        assert status == 400 and sentence_in(body), (number, raw)
    elif body.startswith((b"data: ", b": keepalive")):
        assert body.endswith(b"data: [DONE]\n\n"), (number, raw)
    else:
        assert json.loads(body)["choices"], (number, raw)
    return status


@pytest.mark.parametrize(
    "seed, count", [(0, 2_000), pytest.param(1, 20_000, marks=pytest.mark.slow)]
)
def test_fuzzed_requests_are_answered_or_refused(port, seed, count):
    numbers = range(10**6 * seed, 10**6 * seed + count)
    with ThreadPoolExecutor(4) as clients:
        outcomes = Counter(clients.map(lambda number: outcome(port, number), numbers))
    assert outcomes.keys() == {200, 400} and min(outcomes.values()) > count / 20
