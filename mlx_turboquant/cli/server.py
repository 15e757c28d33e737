"""``mlx_turboquant server``: mlx-lm's OpenAI-compatible server, with compressed caches."""

import argparse
import importlib
import json
import logging
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.utils import _download, load, load_config, sharded_load

from ..lm.enable import enable
from ..lm.loading import memory_nbytes, model_errors
from ..lm.prompt_store import PromptStore
from ..measure.shapes import unloaded_model
from .admission import Admission, DoesNotFit, KeptPrompts
from .loading import load_ready
from .options import add_store_options, open_store, parse, parse_size
from .replaced import replaced
from .stored_prompts import SCOPES, StoredPrompts

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
    originals = handler.do_GET, handler.handle_completion, generator._tokenize
    with (
        # Python's five would turn away clients that connect at once.
        replaced(ThreadingHTTPServer, request_queue_size=_WAITING_CONNECTIONS),
        replaced(
            _mlx_lm_server,
            argparse=SimpleNamespace(ArgumentParser=run.parser),
            load=partial(run.load, load),
            sharded_load=partial(run.load, sharded_load),
            LRUPromptCache=run.prompt_caches,
        ),
        replaced(
            handler,
            do_GET=lambda *arguments: run.get(originals[0], *arguments),
            handle_completion=lambda *arguments: run.handle_completion(*originals[1:], *arguments),
        ),
        replaced(generator, _tokenize=lambda *arguments: run.tokenize(originals[2], *arguments)),
    ):
        _mlx_lm_server.main()
    if run.store is not None:
        run.store.close()
    # Threads of MLX for the streams of a thread that has ended would abort the interpreter's end.
    logging.shutdown()
    os._exit(0)


class _Run:
    """One run of mlx-lm's server: the functions that stand in for its own."""

    def __init__(self, arguments: list[str]):
        self.arguments = arguments
        self.store: PromptStore | None = None
        self.prompts: StoredPrompts | None = None

    def parser(self, **_) -> SimpleNamespace:
        """What mlx-lm adds its options to, and then calls without arguments."""
        parser = argparse.ArgumentParser(prog="mlx_turboquant server", description=__doc__)
        parser.add_argument(
            "--memory-limit",
            metavar="SIZE",
            help="Bytes that the model, its caches and what computes them may have, as 16GB; "
            "requests that do not fit wait (default: what this machine lets MLX use)",
        )
        add_store_options(parser).add_argument(
            "--prompt-store-scope",
            choices=SCOPES,
            help="Who finds whose prompts: everyone (all), or those with the same API key (key) or "
            '"user" field (user); default: all on the loopback, otherwise key',
        )
        return SimpleNamespace(
            add_argument=parser.add_argument, parse_args=lambda: self._parse(parser)
        )

    def _parse(self, parser: argparse.ArgumentParser) -> argparse.Namespace:
        args, self.settings = parse(parser, self.arguments)
        self.args = args
        limit = args.memory_limit
        self.admission = Admission(memory_nbytes() if limit is None else parse_size(limit))
        self.store = self._open_store()
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

    def load(self, load: Callable[..., tuple], *positional, **keywords) -> tuple:
        """A model with compression switched on, also one that a request names."""
        model, tokenizer, *rest = load_ready(
            load, self.args, self.settings, *positional, **keywords
        )
        enable(model, self.settings)
        if self.prompts is not None:
            self.prompts.use(model, tokenizer, Path(self.args.model or "").name)
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
            # What is beyond the loopback may be anyone.
            default = "all" if self.args.host in _LOOPBACK else "key"
            scope = self.args.prompt_store_scope or default
            self.kept = self.prompts = StoredPrompts(self.store, scope, self.admission, *limits)
        return self.kept

    def handle_completion(
        self,
        handle: Callable[..., None],
        tokenize: Callable[..., tuple],
        handler: Any,
        request: Any,
        *others,
    ):
        """Give a request the scope of who sent it, and let mlx-lm answer it once it fits."""
        if self.prompts is not None:
            request.scope = self.prompts.scope_of(handler)
        request.tokenized = _tokenized(tokenize, handler, request)
        tokens = len(request.tokenized[1][0]) if request.tokenized[1] else 0
        try:
            with self.admission.admitted(tokens + (handler.max_tokens or 0)):
                handle(handler, request, *others)
        except DoesNotFit as error:
            handler._set_completion_headers(400)
            handler.end_headers()
            handler.wfile.write(json.dumps({"error": str(error)}).encode())

    def tokenize(
        self, tokenize: Callable[..., tuple], generator: Any, tokenizer: Any, request: Any, *others
    ):
        """mlx-lm's tokens of a request; what it does next is look for a cache of them."""
        model, tokenized = request.tokenized
        if tokenized is None or model != generator.model_provider.model_key:
            tokenized = tokenize(generator, tokenizer, request, *others)
        tokens, segments, kinds, *rest = tokenized
        if self.prompts is not None:
            segments, kinds = self.prompts.in_pieces(segments, kinds)
            self.prompts.begin(tokens, request.scope)
        return (tokens, segments, kinds, *rest)

    def get(self, answer: Callable[..., None], handler: Any) -> None:
        """Answer a GET request: of the store here, any other by mlx-lm."""
        if handler.path != "/v1/prompt-store" or self.store is None:
            answer(handler)
            return
        handler._set_completion_headers(200)
        handler.end_headers()
        handler.wfile.write(json.dumps(self.store.statistics()).encode())


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
