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
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.utils import _download, load, load_config, sharded_load

from ..lm.enable import enable
from ..lm.loading import model_errors, prepare_for_device
from .calibrate import ensure_profile
from .options import add_cache_options, cache_settings, warn_without_effect
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
            load=run.loader(load),
            sharded_load=run.loader(sharded_load),
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
        self.args = argparse.Namespace()
        self.settings: dict[str, Any] = {}
        self.max_bytes: int | None = None

    def parser(self, **_) -> argparse.ArgumentParser:
        """The parser that mlx-lm adds its options to and then calls without arguments."""
        parser = argparse.ArgumentParser(prog="mlx_turboquant server", description=__doc__)
        parse = partial(parser.parse_args, self.arguments)
        parser.parse_args = lambda: self._checked(parser, parse)
        return parser

    def _checked(self, parser, parse) -> argparse.Namespace:
        add_cache_options(parser)
        args = self.args = parse()
        self.settings = cache_settings(args)
        self.max_bytes = args.prompt_cache_bytes
        defaults = ("kv_group_size", "quantized_kv_start")
        warn_without_effect(args, {option: parser.get_default(option) for option in defaults})
        args.kv_bits = None  # mlx-lm would quantize by itself, and serve one request at a time
        for model in (args.model, args.draft_model):
            if model is not None:
                with model_errors(model):
                    load_config(_download(model))
        if mx.distributed.init().rank() == 0:
            # Before mlx-lm starts the thread that would outlive its failure.
            socket.create_server((args.host, args.port)).close()
        return args

    def loader(self, load: Callable[..., tuple]) -> Callable[..., tuple]:
        """mlx-lm's loader with compression switched on, also for models that requests name."""

        def load_enabled(*positional, **keywords):
            with model_errors(positional[0]):
                model, *rest = load(*positional, **keywords)
            prepare_for_device(model)
            ensure_profile(model, rest[0], self.args, self.settings)
            return (enable(model, **self.settings), *rest)

        return load_enabled

    def prompt_caches(self, max_size: int) -> LRUPromptCache:
        """A store that keeps to the limit in bytes, as mlx-lm does only while it serves batches."""
        return LRUPromptCache(max_size, *([] if self.max_bytes is None else [self.max_bytes]))
