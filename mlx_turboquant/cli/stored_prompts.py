"""mlx-lm's caches of prompts in memory, with the prompt store behind them."""

import hashlib
import logging
from collections import deque
from http.server import BaseHTTPRequestHandler
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..cache.single import TurboQuantKVCache
from ..lm.compressible import flat_caches
from ..lm.prompt_store import CHECKPOINT_TOKENS, SHOWN_TOKENS, PromptStore
from .admission import Admission, KeptPrompts

SCOPES = ("all", "key", "user")
# Prompts whose scope is known, until their caches come back.
_REMEMBERED = 256

_log = logging.getLogger("mlx_turboquant")


class StoredPrompts(KeptPrompts):
    """Prompts are found in memory, then on disk; all that are kept in memory go to disk as well.

    Requests of different scopes do not find each other's prompts: by the ``kind`` of scope, all
    are of one, or those with the same API key, or with the same "user" field.
    """

    def __init__(self, store: PromptStore, kind: str, admission: Admission, *limits: int):
        super().__init__(admission, *limits)
        self._store = store
        self._kind = kind
        self._scope = ""
        self._scopes: deque[tuple[list[int], str]] = deque(maxlen=_REMEMBERED)

    def use(self, model: nn.Module, tokenizer: TokenizerWrapper, name: str) -> None:
        """From now on prompts are those of this model, which people call ``name``."""
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self._empty = make_prompt_cache(model)
        # Whether its caches can be cut back to any prompt that they begin with.
        layers = flat_caches(self._empty)
        self._can_be_cut = all(isinstance(x, (KVCache, TurboQuantKVCache)) for x in layers)

    def scope_of(self, request: BaseHTTPRequestHandler) -> str:
        """A hash of what the scope of a request goes by, "" for nothing."""
        if self._kind == "key":
            told = request.headers.get("Authorization", "")
        else:
            told = request.body.get("user") or "" if self._kind == "user" else ""
        return hashlib.sha256(str(told).encode()).hexdigest() if told else ""

    def begin(self, tokens: list[int], scope: str) -> None:
        """A request of a scope is answered next, whose prompt has these tokens."""
        self._scope = scope
        self._scopes.append((tokens, scope))

    def in_pieces(
        self, segments: list[list[int]], kinds: list[str]
    ) -> tuple[list[list[int]], list[str]]:
        """The segments of a prompt, none of them long where caches cannot be cut back.

        mlx-lm keeps the cache at the end of each, so that no more tokens are read again.
        """
        if self._can_be_cut or len(segments) != len(kinds):
            return segments, kinds
        pieces = [
            (segment[start : start + CHECKPOINT_TOKENS], kind)
            for segment, kind in zip(segments, kinds)
            for start in range(0, len(segment), CHECKPOINT_TOKENS)
        ]
        return [piece for piece, _ in pieces], [kind for _, kind in pieces]

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list]:
        """The cache of the longest known beginning, and the tokens that are left to be read."""
        cache, rest = super().fetch_nearest_cache((model, self._scope), tokens)
        in_memory, on_disk = len(tokens) - len(rest), 0
        if _are_tokens(tokens):
            found = self._store.find(self._model, tokens, self._empty, in_memory, self._scope)
            if found is not None:
                cache, on_disk = found
                in_memory, rest = 0, tokens[on_disk:]
        _log.info(
            "Prompt of %d tokens: %d from memory, %d from disk, %d to read",
            len(tokens),
            in_memory,
            on_disk,
            len(rest),
        )
        return cache, rest

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **keywords: str
    ) -> None:
        """Keep a cache for those who have asked what its tokens begin with."""
        are_tokens = _are_tokens(tokens)
        text = self._tokenizer.decode(tokens[:SHOWN_TOKENS]) if are_tokens else ""
        for scope in {scope for prompt, scope in self._scopes if _alike(prompt, tokens)}:
            super().insert_cache((model, scope), tokens, prompt_cache, **keywords)
            if are_tokens:
                try:
                    self._store.keep(self._model, tokens, prompt_cache, self._name, text, scope)
                except ValueError as error:  # the server is being closed
                    _log.warning("A prompt of %d tokens is not kept: %s", len(tokens), error)


def _alike(first: list[Any], second: list[Any]) -> bool:
    """Whether one begins with the other."""
    count = min(len(first), len(second))
    return first[:count] == second[:count]


def _are_tokens(tokens: list[Any]) -> bool:
    """Whether these are tokens alone, and no parts of pictures among them."""
    return all(type(token) is int for token in tokens)
