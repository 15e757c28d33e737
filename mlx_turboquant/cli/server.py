"""This command is mlx-lm's OpenAI-compatible server, with compressed caches."""

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
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import mlx.core as mx
from huggingface_hub import CacheNotFound, scan_cache_dir
from mlx_lm.utils import _download, load, load_config, sharded_load

from ..lm.enable import enable
from ..lm.loading import device_nbytes, memory_nbytes, model_errors, reason_of
from ..lm.prompt_store import PromptStore
from ..measure.shapes import unloaded_model
from .admission import Admission, KeptPrompts
from .loading import load_ready
from .options import add_store_options, open_store, parse, parse_size
from .replaced import replaced
from .requests import BadRequest, answer, begin_answer, check_tokens, place_of, read_request
from .scopes import SCOPES, ScopedTokens, scope_of
from .stored_prompts import StoredPrompts

_mlx_lm_server = importlib.import_module("mlx_lm.server")
_WAITING_CONNECTIONS = 128

_LOOPBACK = ("127.0.0.1", "localhost", "::1")

_log = logging.getLogger("mlx_turboquant")


def main(arguments: list[str]) -> None:
    """Run mlx-lm's own server with its parser, loader and store of prompt caches wrapped.

    It ends on SIGINT and SIGTERM, after the requests that are being answered.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = _Run(arguments)
    handler, generator = _mlx_lm_server.APIHandler, _mlx_lm_server.ResponseGenerator
    provider = _mlx_lm_server.ModelProvider
    get, post, complete = handler.do_GET, handler.do_POST, handler.handle_completion
    begin, tokenize = handler._set_completion_headers, generator._tokenize
    options, generate = handler.do_OPTIONS, generator.generate
    serve, load_default = ThreadingHTTPServer.serve_forever, provider.load_default
    with (
        replaced(
            ThreadingHTTPServer,
            # Python's five would turn away clients that connect at once.
            request_queue_size=_WAITING_CONNECTIONS,
            serve_forever=lambda server: (run.listening.set(), serve(server)),
            handle_error=lambda *_: _log.warning("No request: %s", place_of(sys.exception())),
        ),
        replaced(provider, load_default=lambda provider: run.load_default(load_default, provider)),
        replaced(
            _mlx_lm_server,
            argparse=SimpleNamespace(ArgumentParser=run.parser),
            load=partial(run.load, load),
            sharded_load=partial(run.load, sharded_load),
            scan_cache_dir=_hub_models,
            LRUPromptCache=run.prompt_caches,
        ),
        replaced(
            handler,
            log_request=lambda handler, status, *_: setattr(handler, "status", int(status)),
            log_error=lambda handler, text, *values: _log.warning("No request: " + text, *values),
            do_OPTIONS=lambda handler: answer(handler, options),
            do_GET=lambda handler: answer(handler, partial(run.get, get)),
            do_POST=lambda handler: answer(handler, partial(_post, post)),
            handle_completion=lambda *arguments: run.complete(complete, tokenize, *arguments),
            _set_completion_headers=lambda *arguments: begin_answer(begin, *arguments),
        ),
        replaced(
            generator,
            generate=lambda *arguments, **keywords: _counted(generate, *arguments, **keywords),
            _tokenize=lambda *arguments: run.tokenize(tokenize, *arguments),
            _run_generate=lambda generator: run.generate(generator),
        ),
    ):
        _mlx_lm_server.main()
    run.end(0)


class _Run:
    """One run of mlx-lm's server: the functions that stand in for its own."""

    def __init__(self, arguments: list[str]):
        self.arguments = arguments
        self.store: PromptStore | None = None
        self.prompts: StoredPrompts | None = None
        self.listening = threading.Event()

    def parser(self, **_) -> SimpleNamespace:
        """What mlx-lm adds its options to, and then calls without arguments."""
        parser = argparse.ArgumentParser(prog="mlx_turboquant server", description=__doc__)
        parser.add_argument(
            "--memory-limit",
            metavar="SIZE",
            help="Memory that the model and its caches may have, like 16GB, or 16. Requests that "
            "do not fit wait (default: what this machine lets MLX use)",
        )
        add_store_options(parser).add_argument(
            "--prompt-store-scope",
            choices=SCOPES,
            help='Requests that share prompts: all, those with one API key, or with one "user" '
            "field (default: all on the loopback, otherwise key)",
        )
        return SimpleNamespace(
            add_argument=parser.add_argument, parse_args=lambda: self._parse(parser)
        )

    def _parse(self, parser: argparse.ArgumentParser) -> argparse.Namespace:
        args, self.settings = parse(parser, self.arguments)
        self.args = args
        level = getattr(logging, args.log_level)
        # What mlx-lm and other libraries say of every request is for those who debug.
        others = level if level == logging.DEBUG else max(level, logging.WARNING)
        logging.basicConfig(level=others, format="%(asctime)s %(levelname)s %(message)s")
        _log.setLevel(level)
        warnings.filterwarnings("ignore", "mlx_lm.server is not recommended")
        limit = args.memory_limit
        self.admission = Admission(memory_nbytes() if limit is None else parse_size(limit))
        self.store = self._open_store()
        # What is beyond the loopback may be anyone.
        self.scope = args.prompt_store_scope or ("all" if args.host in _LOOPBACK else "key")
        for model in (args.model, args.draft_model):
            if model is not None:
                with model_errors(model):
                    config = load_config(_download(model))
                if model == args.model and limit is not None:
                    self.admission.room(unloaded_model(config))
        if mx.distributed.init().rank() == 0:
            # Before mlx-lm starts the thread that would outlive its failure.
            socket.create_server((args.host, args.port)).close()
        return args

    def load_default(self, load_default: Callable[..., None], provider: Any) -> None:
        """Load the model of the options, if any, and say that requests will be answered."""
        load_default(provider)
        if mx.distributed.init().rank() > 0:
            return
        self.listening.wait()
        model, weights = "the model of the first request", ""
        if provider.model is not None:
            model = Path(self.args.model).name
            weights = f", of which weights take {device_nbytes(provider.model) / 1e9:,.2f} GB"
        memory = f"{self.admission.limit / 1e9:,.2f} GB of memory{weights}"
        address = f"http://{self.args.host}:{self.args.port}"
        _log.info("Ready at %s: %s, %s, %s", address, model, self.settings, memory)

    def load(self, load: Callable[..., tuple], *positional, **keywords) -> tuple:
        """A model with compression switched on, also one that a request names."""
        model, tokenizer, *rest = load_ready(
            load, self.args, self.settings, *positional, **keywords
        )
        enable(model, self.settings)
        if "return_config" not in keywords:  # the draft model
            return (model, tokenizer, *rest)
        self.vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]  # nothing is evaluated
        self.kept.use(model, tokenizer, Path(positional[0] or "").name)
        room = self.admission.use(model, self.settings)
        if self.args.prompt_cache_bytes is None:
            # With a limit mlx-lm makes room for each request.
            self.args.prompt_cache_bytes = self.kept.max_bytes = room
        return (model, tokenizer, *rest)

    def _open_store(self) -> PromptStore | None:
        """The store of the options; without one, where it cannot be written, requests go on."""
        if self.args.prompt_store is not None and self.args.draft_model is not None:
            raise ValueError("--prompt-store does not keep caches of a --draft-model: use one.")
        try:
            return open_store(self.args)
        except OSError as error:
            _log.warning("There is no prompt store: %s", error)
            return None

    def prompt_caches(self, max_size: int) -> KeptPrompts:
        """One that keeps to the limit in bytes, as mlx-lm does only while it serves batches."""
        limit = self.args.prompt_cache_bytes
        limits = (max_size,) if limit is None else (max_size, limit)
        if self.store is None:
            self.kept = KeptPrompts(self.admission, *limits)
        else:
            self.kept = self.prompts = StoredPrompts(self.store, self.admission, *limits)
        return self.kept

    def complete(
        self,
        complete: Callable[..., None],
        tokenize: Callable[..., tuple],
        handler: Any,
        request: Any,
        *others,
    ):
        """Give a request the scope of who sent it, and let mlx-lm answer it once it fits."""
        request.scope = scope_of(handler, self.scope)
        draft = handler.requested_draft_model
        if self.prompts is not None and draft not in (None, "default_model"):
            message = "The prompt store does not keep caches of a draft_model: leave it out."
            raise BadRequest(message, "draft_model")
        request.tokenized = _tokenized(tokenize, handler, request)
        request.context, request.count, handler.completion = None, 0, request
        tokens = len(request.tokenized[1][0]) if request.tokenized[1] else 0
        with self.admission.admitted(tokens + handler.max_tokens):
            complete(handler, request, *others)

    def tokenize(
        self,
        tokenize: Callable[..., tuple],
        generator: Any,
        tokenizer: Any,
        request: Any,
        args: Any,
    ):
        """mlx-lm's tokens of a request; what it does next is look for a cache of them."""
        model, tokenized = request.tokenized
        if tokenized is None or model != generator.model_provider.model_key:
            try:
                tokenized = tokenize(generator, tokenizer, request, args)
            except Exception as error:
                message = f"The prompt cannot be made into tokens ({reason_of(error)}): change it."
                raise BadRequest(message, "messages" if request.messages else "prompt") from error
        tokens, segments, kinds, state, vision = tokenized
        check_tokens(args, tokens, tokenizer, self.vocabulary)
        tokens = ScopedTokens(tokens, request.scope)
        if vision is not None:
            vision.cache_key = ScopedTokens(vision.cache_key, request.scope)
        if self.prompts is not None:
            segments, kinds = self.prompts.in_pieces(segments, kinds)
        return tokens, segments, kinds, state, vision

    def get(self, get: Callable[..., None], handler: Any) -> None:
        """Answer a GET request: of the store here, any other by mlx-lm."""
        if handler.path != "/v1/prompt-store" or self.store is None:
            get(handler)
            return
        handler._set_completion_headers(200)
        handler.end_headers()
        handler.wfile.write(json.dumps(self.store.statistics()).encode())

    def generate(self, generator: Any) -> None:
        """What mlx-lm's thread does; without it the server would refuse all requests for ever."""
        try:
            generator._generate()
        except BaseException as error:
            _log.critical("The server ends, as it cannot generate any more: %s", place_of(error))
            self.end(1)

    def end(self, status: int) -> NoReturn:
        """Write what is left to be written, and end the process."""
        if self.store is not None:
            self.store.close()
        logging.shutdown()
        # Threads of MLX for the streams of a thread that has ended would abort a usual end.
        os._exit(status)


def _counted(generate: Callable[..., tuple], generator: Any, request: Any, *others, **keywords):
    """What mlx-lm answers a request, of which the log will say how many tokens it has."""
    request.context, replies = generate(generator, request, *others, **keywords)

    def each() -> Iterator[Any]:
        for reply in replies:
            request.count += 1
            yield reply

    return request.context, each()


def _post(post: Callable[..., None], handler: Any) -> None:
    """Check a POST request, and let mlx-lm answer it."""
    body = read_request(handler)
    handler.headers.replace_header("Content-Length", str(len(body)))
    handler.rfile = io.BytesIO(body)
    post(handler)


def _hub_models() -> Any:
    """The models of the hub that are on this machine, also where there is no folder of them."""
    try:
        return scan_cache_dir()
    except CacheNotFound:
        return SimpleNamespace(repos=())


def _tokenized(
    tokenize: Callable[..., tuple], handler: Any, request: Any
) -> tuple[Any, tuple | None]:
    """The model that is there, and mlx-lm's tokens of a request for it.

    There are none before a model is there, and none of pictures: what is made of these belongs to
    the thread that answers. What is wrong with a request mlx-lm says when it tries again.
    """
    generator = handler.response_generator
    provider = generator.model_provider
    model = provider.model_key  # before its tokenizer: mlx-lm may be loading another one
    try:
        if provider.tokenizer is None or any(_mlx_lm_server._image_parts(request.messages)):
            return model, None
        # Of its arguments, mlx-lm needs those for the template, which the handler has as well.
        return model, tokenize(generator, provider.tokenizer, request, handler)
    except Exception:
        return model, None
