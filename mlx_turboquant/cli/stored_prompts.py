"""mlx-lm's caches of prompts in memory, with the prompt store behind them."""

import hashlib
import logging
from http.server import BaseHTTPRequestHandler
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..cache.single import TurboQuantKVCache
from ..lm.compressible import flat_caches
from ..lm.prompt_store import CHECKPOINT_TOKENS, SHOWN_TOKENS, PromptStore
from .admission import Admission, KeptPrompts

SCOPES = ("all", "key", "user")

_log = logging.getLogger("mlx_turboquant")


class ScopedTokens(list):
    """Tokens that belong to the request of a scope, as do parts of them and what is appended.

    mlx-lm keeps a cache by tokens that it has copied from those of its request in this way, so that
    no comparison has to tell which of several requests they come from.
    """

    def __init__(self, tokens: list[int], scope: str):
        super().__init__(tokens)
        self.scope = scope
        self.on_disk = 0

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        return ScopedTokens(part, self.scope) if isinstance(index, slice) else part


class StoredPrompts(KeptPrompts):
    """Prompts are found in memory, then on disk; all that are kept in memory go to disk as well.

    Requests of different scopes do not find each other's prompts: by the ``kind`` of scope, all
    are of one, or those with the same API key, or with the same "user" field.
    """

    def __init__(self, store: PromptStore, kind: str, admission: Admission, *limits: int):
        super().__init__(admission, *limits)
        self._store = store
        self._kind = kind

    def use(self, model: nn.Module, tokenizer: TokenizerWrapper, name: str) -> None:
        """From now on prompts are those of this model, which people call ``name``."""
        super().use(model, tokenizer, name)
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

    def fetch_nearest_cache(
        self, model: Any, tokens: ScopedTokens
    ) -> tuple[list[Any] | None, list]:
        """The cache of the longest known beginning, and the tokens that are left to be read."""
        cache, rest = super().fetch_nearest_cache((model, tokens.scope), tokens)
        if _are_tokens(tokens):
            try:
                known = len(tokens) - len(rest)
                found = self._store.find(self._model, tokens, self._empty, known, tokens.scope)
            except OSError as error:
                _log.warning("The prompt store cannot be read: %s", error)
                found = None
            if found is not None:
                cache, tokens.on_disk = found
                rest = tokens[tokens.on_disk :]
        return cache, rest

    def insert_cache(
        self, model: Any, tokens: ScopedTokens, prompt_cache: list[Any], **keywords: str
    ) -> None:
        """Keep the cache of a request, or of the beginning of its prompt, for its scope alone."""
        super().insert_cache((model, tokens.scope), tokens, prompt_cache, **keywords)
        if _are_tokens(tokens):
            text = self._tokenizer.decode(tokens[:SHOWN_TOKENS])
            try:
                about = self._name, text, tokens.scope
                self._store.keep(self._model, tokens, prompt_cache, *about)
            except ValueError as error:  # the server is being closed
                _log.warning("A prompt of %d tokens is not kept: %s", len(tokens), error)


def _are_tokens(tokens: list[Any]) -> bool:
    """Whether these are tokens alone: mlx-lm has negative numbers for parts of pictures."""
    return min(tokens, default=0) >= 0
