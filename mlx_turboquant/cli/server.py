"""This command runs mlx-lm's OpenAI-compatible server with compressed caches."""

import argparse
import importlib
import io
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import mlx.core as mx
from huggingface_hub import CacheNotFound
from mlx_lm.utils import _download, load_config

from ..lm.enable import enable
from ..lm.loading import device_nbytes, memory_nbytes, model_errors, reason_of
from ..lm.prompt_store import PromptStore
from ..measure.shapes import unloaded_model
from .admission import Admission
from .kept_prompts import SCOPES, KeptPrompts, ScopedTokens, scope_of
from .loading import load_ready
from .options import add_store_options, open_store, parse, parse_size
from .replaced import replace, wrap
from .requests import BadRequest, answer, begin_answer, check_tokens, place_of, read_request
from .signals import ENDINGS

_mlx_lm_server = importlib.import_module("mlx_lm.server")
_Handler, _Generator = _mlx_lm_server.APIHandler, _mlx_lm_server.ResponseGenerator
_tokenize = _Generator._tokenize
_WAITING_CONNECTIONS = 128
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

_log = logging.getLogger("mlx_turboquant")


def main(arguments: list[str]) -> None:
    """Run mlx-lm's own server with its parser, loader and prompt caches wrapped.

    A signal to end lets it answer the requests that it has begun; a second one ends it at once.
    """
    run = _Run(arguments)
    replace(
        ThreadingHTTPServer,
        # Python's default of 5 would reject some clients that connect at the same time.
        request_queue_size=_WAITING_CONNECTIONS,
        serve_forever=lambda server: run.serve(server),
        handle_error=lambda *_: _log.warning("Bad request: %s", place_of(sys.exception())),
    )
    parsers = SimpleNamespace(ArgumentParser=run.parser)
    replace(_mlx_lm_server, argparse=parsers, LRUPromptCache=run.prompt_caches)
    wrap(_mlx_lm_server.ModelProvider, load_default=run.load_default)
    wrap(_mlx_lm_server, load=run.load, sharded_load=run.load, scan_cache_dir=_hub_models)
    wrap(
        _Handler,
        log_request=lambda _, handler, status, *others: setattr(handler, "status", int(status)),
        log_error=lambda _, handler, text, *values: _log.warning("Bad request: " + text, *values),
        do_OPTIONS=answer,
        do_GET=lambda get, handler: answer(partial(run.get, get), handler),
        do_POST=lambda post, handler: answer(partial(run.post, post), handler),
        handle_completion=run.complete,
        _set_completion_headers=begin_answer,
    )
    wrap(_Generator, generate=_counted, _tokenize=run.tokenize, _run_generate=run.generate)
    _mlx_lm_server.main()
    run.end(0)


class _Run:
    """The functions that replace mlx-lm's own in one run of its server."""

    def __init__(self, arguments: list[str]):
        self.arguments = arguments
        self.store: PromptStore | None = None
        self.listening = threading.Event()
        self.signals: list[int] = []
        self.answering: set[Any] = set()  # handlers of requests
        self.is_loading = False

    def parser(self, **_) -> SimpleNamespace:
        """A stand-in for the parser to which mlx-lm adds its options."""
        parser = argparse.ArgumentParser(prog="mlx_turboquant server", description=__doc__)
        text = (
            "Maximum memory of the model and its caches, like 16GB, or 16 for short; requests "
            "wait until they fit (default: all memory that MLX may use)"
        )
        parser.add_argument("--memory-limit", metavar="SIZE", help=text)
        text = (
            "Requests that share prompts: all, those with the same API key, or those with the "
            'same "user" field (default: all on a loopback host, otherwise key)'
        )
        add_store_options(parser).add_argument("--prompt-store-scope", choices=SCOPES, help=text)
        return SimpleNamespace(
            add_argument=parser.add_argument, parse_args=lambda: self._parse(parser)
        )

    def _parse(self, parser: argparse.ArgumentParser) -> argparse.Namespace:
        args, self.settings = parse(parser, self.arguments)
        self.args = args
        level = getattr(logging, args.log_level)
        # mlx-lm and other libraries log every request, which only helps in debugging.
        others = level if level == logging.DEBUG else max(level, logging.WARNING)
        logging.basicConfig(level=others, format="%(asctime)s %(levelname)s %(message)s")
        _log.setLevel(level)
        warnings.filterwarnings("ignore", "mlx_lm.server is not recommended")
        limit = args.memory_limit
        self.admission = Admission(memory_nbytes() if limit is None else parse_size(limit))
        self.store = self._open_store()
        # Beyond the loopback, clients may be strangers to each other.
        self.scope = args.prompt_store_scope or ("all" if args.host in _LOOPBACK else "key")
        for model in (args.model, args.draft_model):
            if model is not None:
                with model_errors(model):
                    config = load_config(_download(model))
                if model == args.model and limit is not None:
                    self.admission.room(unloaded_model(config))
        if mx.distributed.init().rank() == 0:
            # Fail on a taken port before mlx-lm starts its thread, which would keep running.
            _check_address(args.host, args.port)
            for number in (signal.SIGINT, *ENDINGS):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves a hang-up
                    signal.signal(number, lambda number, _: self.signals.append(number))
        return args

    def load_default(self, load_default: Callable[..., None], provider: Any) -> None:
        """Load the model of the options, if any, and log that the server is ready."""
        load_default(provider)
        if mx.distributed.init().rank() > 0:
            return
        self.listening.wait()
        model, weights = "the model of the first request", ""
        if provider.model is not None:
            model = Path(self.args.model).name
            weights = f", of which weights take {device_nbytes(provider.model) / 1e9:,.2f} GB"
        memory = f"{self.admission.limit / 1e9:,.2f} GB of memory{weights}"
        host = f"[{self.args.host}]" if ":" in self.args.host else self.args.host
        address = f"http://{host}:{self.port}"
        _log.info("Ready at %s: %s, %s, %s", address, model, self.settings, memory)

    def serve(self, server: ThreadingHTTPServer) -> NoReturn:
        """Accept requests until a signal comes, and end as ``main`` says."""
        self.port, server.timeout = server.server_port, 0.2
        self.listening.set()
        while not self.signals:
            server.handle_request()
        server.server_close()
        if self.is_loading:
            text = "The server ends before its model is loaded. Measured layers are kept, if any."
            print(f"\n{text}", file=sys.stderr)  # below the bar
            self.end(0)
        if self.answering:
            text = "The server ends after %d more answers, or at once with a second signal."
            _log.info(text, len(self.answering))
        # The thread keeps the cache of a request after it was answered.
        while len(self.signals) == 1 and self.generator.generation_available():
            self.generator._stop = not self.answering
            time.sleep(0.1)
        self.end(0)

    def post(self, post: Callable[..., None], handler: Any) -> None:
        """Check a POST request, and let mlx-lm answer it; a server that ends waits for it."""
        body = read_request(handler)
        handler.headers.replace_header("Content-Length", str(len(body)))
        handler.rfile = io.BytesIO(body)
        self.answering.add(handler)
        try:
            post(handler)
        finally:
            self.answering.remove(handler)

    def load(self, load: Callable[..., tuple], *positional, **keywords) -> tuple:
        """Load a model, of the options or of a request, and enable its compression."""
        self.is_loading = True
        try:
            model, tokenizer, *rest = load_ready(
                load, self.args, self.settings, *positional, **keywords
            )
        finally:
            self.is_loading = False
        enable(model, self.settings)
        if "return_config" not in keywords:  # the draft model
            return (model, tokenizer, *rest)
        self.vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]  # nothing is evaluated
        self.kept.use(model, tokenizer, Path(positional[0] or "").name)
        room = self.admission.use(model, self.settings)
        if self.args.prompt_cache_bytes is None:
            # With a limit mlx-lm evicts prompts for each request.
            self.args.prompt_cache_bytes = self.kept.max_bytes = room
        return (model, tokenizer, *rest)

    def _open_store(self) -> PromptStore | None:
        """Open the store of the options; if it cannot be written, serve without one."""
        if self.args.prompt_store is not None and self.args.draft_model is not None:
            raise ValueError("--prompt-store cannot be used with --draft-model: leave one out.")
        try:
            return open_store(self.args)
        except OSError as error:
            _log.warning("There is no prompt store: %s", error)
            return None

    def prompt_caches(self, max_size: int) -> KeptPrompts:
        """Prompt caches within the limit in bytes, which mlx-lm's observe only in batches."""
        limit = self.args.prompt_cache_bytes
        limits = (max_size,) if limit is None else (max_size, limit)
        self.kept = KeptPrompts(self.admission, *limits, store=self.store)
        return self.kept

    def complete(self, complete: Callable[..., None], handler: Any, request: Any, *others):
        """Give a request its sender's scope, and let mlx-lm answer it once it fits."""
        request.scope = scope_of(handler, self.scope)
        if self.store is not None and handler.requested_draft_model not in (None, "default_model"):
            message = "The prompt store does not keep caches of a draft_model: leave it out."
            raise BadRequest(message, "draft_model")
        request.tokenized = _tokenized(handler, request)
        request.context, request.count, handler.completion = None, 0, request
        tokens = len(request.tokenized[1][0]) if request.tokenized[1] else 0
        with self.admission.admitted(tokens + handler.max_tokens):
            complete(handler, request, *others)

    def tokenize(self, _: Any, generator: Any, tokenizer: Any, request: Any, args: Any):
        """The tokens of a request with its scope; mlx-lm looks up a cache of them next."""
        model, tokenized = request.tokenized
        if tokenized is None or model != generator.model_provider.model_key:
            try:
                tokenized = _tokenize(generator, tokenizer, request, args)
            except Exception as error:
                message = f"The prompt cannot be tokenized ({reason_of(error)}): change it."
                raise BadRequest(message, "messages" if request.messages else "prompt") from error
        tokens, segments, kinds, state, vision = tokenized
        check_tokens(args, tokens, tokenizer, self.vocabulary)
        tokens = ScopedTokens(tokens, request.scope)
        if vision is not None:
            vision.cache_key = ScopedTokens(vision.cache_key, request.scope)
        return tokens, *self.kept.in_pieces(segments, kinds), state, vision

    def get(self, get: Callable[..., None], handler: Any) -> None:
        """Answer a GET request for the store's statistics; mlx-lm answers all others."""
        if handler.path != "/v1/prompt-store" or self.store is None:
            get(handler)
            return
        handler._set_completion_headers(200)
        handler.end_headers()
        handler.wfile.write(json.dumps(self.store.statistics()).encode())

    def generate(self, _: Any, generator: Any) -> None:
        """Run mlx-lm's generation thread; if it fails, end the server, which could only refuse."""
        self.generator = generator
        try:
            generator._generate()
        except BaseException as error:
            _log.critical("The server ends because generation has failed: %s", place_of(error))
            self.end(1)

    def end(self, status: int) -> NoReturn:
        if self.store is not None:
            self.store.close()
        logging.shutdown()
        # A normal exit aborts in MLX, which has threads for the streams of an ended thread.
        os._exit(status)


def _counted(generate: Callable[..., tuple], generator: Any, request: Any, *others, **keywords):
    """mlx-lm's answer to a request; its tokens are counted for the log."""
    request.context, replies = generate(generator, request, *others, **keywords)

    def each() -> Iterator[Any]:
        for reply in replies:
            request.count += 1
            yield reply

    return request.context, each()


def _check_address(host: str, port: int) -> None:
    """Raise ValueError unless mlx-lm's server could listen at an address."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}: use 0 to 65535, where 0 takes any that is free.")
    try:
        flags = {"type": socket.SOCK_STREAM, "flags": socket.AI_PASSIVE}
        family, *_, address = socket.getaddrinfo(host, port, **flags)[0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise ValueError(
            f"The server cannot listen on {host} at port {port} ({error.strerror}): "
            "use another --host or --port."
        ) from error


def _hub_models(scan_cache_dir: Callable[[], Any]) -> Any:
    """The hub's models on this machine; none if there is no folder of them."""
    try:
        return scan_cache_dir()
    except CacheNotFound:
        return SimpleNamespace(repos=())


def _tokenized(handler: Any, request: Any) -> tuple[Any, tuple | None]:
    """The loaded model, and mlx-lm's tokens of a request for it or None.

    There are no tokens before a model is loaded, or with images, which the generation thread
    processes. Errors are ignored here: mlx-lm raises them when it tokenizes the request itself.
    """
    generator = handler.response_generator
    provider = generator.model_provider
    model = provider.model_key  # before its tokenizer: mlx-lm may be loading another one
    try:
        if provider.tokenizer is None or any(_mlx_lm_server._image_parts(request.messages)):
            return model, None
        # mlx-lm uses only the arguments for the template, which the handler has as well.
        return model, _tokenize(generator, provider.tokenizer, request, handler)
    except Exception:
        return model, None
