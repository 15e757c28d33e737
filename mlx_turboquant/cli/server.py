"""``mlx_turboquant server``: mlx-lm's OpenAI-compatible server, with compressed caches."""

import argparse
import importlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.utils import _download, load, load_config, sharded_load

from ..lm.enable import enable
from ..lm.loading import model_errors
from .loading import load_ready
from .options import parse
from .replaced import replaced

_mlx_lm_server = importlib.import_module("mlx_lm.server")
_WAITING_CONNECTIONS = 128


def main(arguments: list[str]) -> None:
    """Run mlx-lm's own server with its parser, loader and store of prompt caches wrapped.

    It ends on SIGINT and SIGTERM, after the requests that are being answered.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = _Run(arguments)
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
    ):
        _mlx_lm_server.main()
    # Threads of MLX for the streams of a thread that has ended would abort the interpreter's end.
    logging.shutdown()
    os._exit(0)


class _Run:
    """One run of mlx-lm's server: the functions that stand in for its own."""

    def __init__(self, arguments: list[str]):
        self.arguments = arguments

    def parser(self, **_) -> SimpleNamespace:
        """What mlx-lm adds its options to, and then calls without arguments."""
        parser = argparse.ArgumentParser(prog="mlx_turboquant server", description=__doc__)
        return SimpleNamespace(
            add_argument=parser.add_argument, parse_args=lambda: self._parse(parser)
        )

    def _parse(self, parser: argparse.ArgumentParser) -> argparse.Namespace:
        args, self.settings = parse(parser, self.arguments)
        self.args = args
        for model in (args.model, args.draft_model):
            if model is not None:
                with model_errors(model):
                    load_config(_download(model))
        if mx.distributed.init().rank() == 0:
            # Before mlx-lm starts the thread that would outlive its failure.
            socket.create_server((args.host, args.port)).close()
        return args

    def load(self, load: Callable[..., tuple], *positional, **keywords) -> tuple:
        """A model with compression switched on, also one that a request names."""
        model, *rest = load_ready(load, self.args, self.settings, *positional, **keywords)
        return (enable(model, self.settings), *rest)

    def prompt_caches(self, max_size: int) -> LRUPromptCache:
        """A store that keeps to the limit in bytes, as mlx-lm does only while it serves batches."""
        limit = self.args.prompt_cache_bytes
        return LRUPromptCache(max_size) if limit is None else LRUPromptCache(max_size, limit)
