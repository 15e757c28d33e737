"""Check requests before mlx-lm sees them, and refuse invalid ones in OpenAI's error format."""

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from ..cache.blocks import LARGEST
from ..lm.loading import reason_of

_MOST_BODY_BYTES = 1 << 28
# Maximum number of characters of a value in a message.
_SHOWN = 60

_log = logging.getLogger("mlx_turboquant")


class BadRequest(ValueError):
    """A request that is refused, with the reason, the invalid field and the HTTP status."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._about = {"type": kind, "param": param, "code": code}

    def send(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer a request with this error, by an event if a stream has begun."""
        body = json.dumps({"error": {"message": str(self), **self._about}}).encode()
        if getattr(handler, "_headers_buffer", None) == []:  # sent
            handler.wfile.write(b"data: " + body + b"\n\n")
            return
        handler._headers_buffer = []
        handler.send_response(self.status)
        handler.send_header("Content-type", "application/json")
        handler._set_cors_headers()
        handler.end_headers()
        handler.wfile.write(body)


def answer(reply: Callable[..., None], handler: BaseHTTPRequestHandler) -> None:
    """Let ``reply`` answer a request; send its errors to the client and log one line."""
    begin, level, problem = time.perf_counter(), logging.INFO, ""
    try:
        reply(handler)
    except BadRequest as error:
        level, problem = logging.WARNING, f": {error}"
        error.send(handler)
    except ConnectionError as error:
        problem = f": the client has gone ({reason_of(error)})"
    except Exception as error:
        level, problem = logging.ERROR, f": {place_of(error)}"
        message = f"The request has failed ({reason_of(error)}): the server's log says where."
        BadRequest(message, status=500).send(handler)
    finally:
        path = handler.path.encode("unicode_escape").decode()  # it may contain anything
        about = f"{handler.command} {path} {getattr(handler, 'status', '-')}{_tokens_of(handler)}"
        _log.log(level, "%s, %.2f s%s", about, time.perf_counter() - begin, problem)


def place_of(error: BaseException) -> str:
    """The message of an error, and the file and line that raised it."""
    _log.debug("A traceback:", exc_info=error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{reason_of(error)}, in {Path(last.filename).name}, line {last.lineno}"


def _tokens_of(handler: BaseHTTPRequestHandler) -> str:
    """The token counts of an answered request, for the log."""
    completion = getattr(handler, "completion", None)
    if getattr(completion, "context", None) is None:
        return ""
    prompt, cached = completion.context.prompt, max(completion.context.prompt_cache_count, 0)
    from_disk = f" ({prompt.on_disk:,} from disk)" if getattr(prompt, "on_disk", 0) else ""
    return (
        f", {len(prompt):,} prompt tokens, {cached:,} cached{from_disk}, {completion.count:,} new"
    )


def begin_answer(
    begin: Callable[..., None], handler: BaseHTTPRequestHandler, status: int = 200
) -> None:
    """Begin an answer of mlx-lm; BadRequest if it refuses a path, or for an error it caught."""
    error = sys.exception()
    if status not in (400, 404):
        begin(handler, status)
    elif error is None:
        raise _no_such_path(handler)
    elif isinstance(error, BadRequest):
        raise error
    else:
        missing = ("model", 404, "model_not_found") if status == 404 else ()
        raise BadRequest(reason_of(error), *missing) from error


class _Kind(NamedTuple):
    """The values that a field may have: a description, a test, and the kind of list items."""

    name: str
    fits: Callable[[Any], bool]
    each: "_Kind | None" = None


def _number(least: float, most: float, name: str = "a number", types=(int, float)) -> _Kind:
    return _Kind(
        f"{name} from {least} to {most}", lambda x: type(x) in types and least <= x <= most
    )


def _integer(least: int, most: int) -> _Kind:
    return _number(least, most, "an integer", (int,))


def _list(name: str, each: _Kind, least: int = 0) -> _Kind:
    return _Kind(name, lambda x: type(x) is list and len(x) >= least, each)


def _object(which: str, fits: Callable[[dict], bool]) -> _Kind:
    return _Kind(f"an object {which}", lambda x: type(x) is dict and fits(x))


def _either(first: _Kind, second: _Kind) -> _Kind:
    name = f"{first.name} or {second.name}"
    return _Kind(name, lambda x: first.fits(x) or second.fits(x), second.each)


_TEXT = _Kind("a string", lambda x: type(x) is str)
_SWITCH = _Kind("true or false", lambda x: type(x) is bool)
_ONE = _Kind("1, as there is one answer", lambda x: type(x) is int and x == 1)
_OBJECT = _Kind("an object", lambda x: type(x) is dict)


def _are(x: Any, fits: Callable[[Any], bool]) -> bool:
    return x is None or type(x) is list and all(map(fits, x))


def _is_part(x: Any) -> bool:
    if type(x) is not dict or type(x.get("type")) is not str:
        return False
    url = x.get("image_url", x.get("image"))
    url = url.get("url") if type(url) is dict else url
    return type(x.get("text") if x["type"] == "text" else url) is str


def _is_function(x: dict[str, Any]) -> bool:
    # Tools of other types have no function, and some clients send a flat form.
    function = x.get("function", x if x.get("type") == "function" else {"name": ""})
    return type(function) is dict and type(function.get("name")) is str


def _is_message(x: dict[str, Any]) -> bool:
    return (
        type(x.get("role")) is str
        and (type(x.get("content")) is str or _are(x.get("content"), _is_part))
        and _are(x.get("tool_calls"), _TOOL.fits)
        and all(type(x.get(name, "")) in (str, NoneType) for name in ("name", "tool_call_id"))
    )


_TOOL = _object("whose function has a name", _is_function)
_MESSAGE = _object(
    "with a role (string), a content (string, null, or a list of parts, each a text or an image) "
    "and, if any, tool_calls, each an object whose function has a name",
    _is_message,
)
_LOGIT_BIAS = _object(
    "of token ids, each with a number from -100 to 100",
    lambda x: (
        all(re.fullmatch("[0-9]{1,9}", token) for token in x)
        and all(map(_number(-100, 100).fits, x.values()))
    ),
)
_ROLES = _object("of strings", lambda x: all(map(_TEXT.fits, x.values())))
_STREAM_OPTIONS = _object(
    "in which include_usage is true or false",
    lambda x: type(x.get("include_usage")) in (bool, NoneType),
)
# Not variables, but arguments of the functions that render and tokenize a template.
_NO_VARIABLES = (
    "add_generation_prompt chat_template continue_final_message conversation max_length messages "
    "padding processor_kwargs return_assistant_tokens_mask return_dict return_tensors "
    "sanitize_control_tokens tokenize tokenizer_kwargs tools truncation"
).split()
_VARIABLES = _object(
    f"of chat template variables, but none of {', '.join(_NO_VARIABLES)}",
    lambda x: not x.keys() & {*_NO_VARIABLES},
)

# The fields of all requests. mlx-lm reads those before "user" and ignores the others.
_FIELDS = {
    "model": _TEXT,
    "draft_model": _TEXT,
    "adapters": _TEXT,
    "num_draft_tokens": _integer(1, 1000),
    "max_tokens": _integer(1, LARGEST),
    "max_completion_tokens": _integer(1, LARGEST),
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    "top_k": _integer(0, LARGEST),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0, 100),
    "repetition_context_size": _integer(0, LARGEST),
    "presence_penalty": _number(-100, 100),
    "presence_context_size": _integer(0, LARGEST),
    "frequency_penalty": _number(-100, 100),
    "frequency_context_size": _integer(0, LARGEST),
    "xtc_probability": _number(0, 1),
    "xtc_threshold": _number(0, 0.5),
    "logit_bias": _LOGIT_BIAS,
    "logprobs": _SWITCH,
    "top_logprobs": _integer(-1, 11),
    "seed": _integer(0, 2**64 - 1),
    "stop": _either(_TEXT, _list("a list of strings", _TEXT)),
    "stream": _SWITCH,
    "stream_options": _STREAM_OPTIONS,
    "chat_template_kwargs": _VARIABLES,
    "user": _TEXT,
    "n": _ONE,
    "metadata": _OBJECT,
    "store": _SWITCH,
}
_FIELDS_OF = {
    "/v1/completions": {
        "prompt": _TEXT,
        **_FIELDS,
        "best_of": _ONE,
        "echo": _SWITCH,
        "suffix": _TEXT,
    },
    "/v1/chat/completions": {
        "messages": _list("a list of one or more messages", _MESSAGE, 1),
        **_FIELDS,
        "tools": _list("a list of tools", _TOOL),
        "role_mapping": _ROLES,
        "tool_choice": _either(_TEXT, _OBJECT),
        "parallel_tool_calls": _SWITCH,
        "response_format": _OBJECT,
        "reasoning_effort": _TEXT,
        "service_tier": _TEXT,
    },
}
_FIELDS_OF["/chat/completions"] = _FIELDS_OF["/v1/chat/completions"]
_REQUIRED = ("prompt", "messages")
# Null disables the draft model; any other field that is null counts as not given.
_NULL_IS_A_VALUE = "draft_model"


def read_request(handler: BaseHTTPRequestHandler) -> bytes:
    """The body of a request without fields that are null; BadRequest if it or its path is wrong."""
    fields = _FIELDS_OF.get(handler.path)
    if fields is None:
        raise _no_such_path(handler)
    body = _read_object(handler)
    for name, kind in fields.items():
        value = body.get(name)
        if value is not None:
            _check(name, value, kind)
        elif name in _REQUIRED:
            raise BadRequest(f"The field {name} is missing: give {kind.name}.", name)
        elif name != _NULL_IS_A_VALUE:
            body.pop(name, None)
    # mlx-lm refuses integers in these fields, and stream_options without include_usage.
    for name in {"xtc_probability", "xtc_threshold"} & body.keys():
        body[name] = float(body[name])
    if body.get("stream_options", {}).get("include_usage") is None:
        body.pop("stream_options", None)
    return json.dumps(body).encode()


def _no_such_path(handler: BaseHTTPRequestHandler) -> BadRequest:
    paths = ", ".join([*_FIELDS_OF, "/v1/models", "/health"])
    message = f"There is nothing at {_shown(handler.path)}: use one of {paths}."
    return BadRequest(message, status=404, code="unknown_url")


def _read_object(handler: BaseHTTPRequestHandler) -> dict[str, Any]:
    length = handler.headers.get("Content-Length")
    if length is None:
        message = "The request has no Content-Length: give the number of bytes of its body."
        raise BadRequest(message, status=411)
    if not re.fullmatch("[0-9]{1,18}", length):
        raise BadRequest(f"The Content-Length is {_shown(length)}: use a number of bytes.")
    if int(length) > _MOST_BODY_BYTES:
        message = f"The body has {length} bytes: use at most {_MOST_BODY_BYTES}."
        raise BadRequest(message, status=413)
    raw = handler.rfile.read(int(length))
    try:
        body = json.loads(raw.decode())
        # Non-finite numbers and lone surrogates fail here, at any depth.
        json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        message = f"The body is not valid JSON in UTF-8 ({error}): use a JSON object."
        raise BadRequest(message) from error
    if type(body) is not dict:
        raise BadRequest(f"The body is {_shown(body)}: use a JSON object.")
    return body


def _check(param: str, value: Any, kind: _Kind) -> None:
    if not kind.fits(value):
        raise BadRequest(f"{param} is {_shown(value)}: use {kind.name}.", param)
    if kind.each and type(value) is list:
        for i, each in enumerate(value):
            _check(f"{param}[{i}]", each, kind.each)


def _shown(value: Any) -> str:
    """The beginning of a value in JSON."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def check_tokens(args: Any, tokens: Any, tokenizer: Any, vocabulary: int) -> None:
    """Raise BadRequest if a prompt has no tokens, or ``args`` has some that the model lacks."""
    if not tokens:
        raise BadRequest("The prompt has no tokens: give one that is not empty.", "prompt")
    if (top_k := args.sampling.top_k) >= vocabulary:
        message = f"top_k is {top_k}: use less than {vocabulary}, the size of the vocabulary."
        raise BadRequest(message, "top_k")
    for token in args.logits.logit_bias or ():
        if token >= vocabulary or tokenizer.convert_ids_to_tokens(token) is None:
            message = f"logit_bias has token {token}: use ids of the model's {vocabulary} tokens."
            raise BadRequest(message, "logit_bias")
