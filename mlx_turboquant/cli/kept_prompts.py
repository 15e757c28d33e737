"""mlx-lm's caches of prompts in memory, by scope, with the prompt store behind them."""

import hashlib
import logging
from http.server import BaseHTTPRequestHandler
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, LRUPromptCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..cache.single import TurboQuantKVCache
from ..lm.compressible import cut_back, flat_caches
from ..lm.prompt_store import CHECKPOINT_TOKENS, SHOWN_TOKENS, PromptStore, key_of
from .admission import Admission

SCOPES = ("all", "key", "user")

_log = logging.getLogger("mlx_turboquant")


def scope_of(request: BaseHTTPRequestHandler, kind: str) -> str:
    """The scope of a request for one of ``SCOPES``: a hash of its key or user, "" without one."""
    if kind == "key":
        told = request.headers.get("Authorization", "")
    else:
        told = request.body.get("user") or "" if kind == "user" else ""
    return hashlib.sha256(str(told).encode()).hexdigest() if told else ""


class ScopedTokens(list):
    """Tokens with the scope of their request, which slices and additions keep.

    mlx-lm keeps a cache under such a copy of its request's tokens. So the scope of the cache is
    known, even if several requests have the same tokens.
    """

    def __init__(self, tokens: list[int], scope: str):
        super().__init__(tokens)
        self.scope = scope
        self.on_disk = 0

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        return ScopedTokens(part, self.scope) if isinstance(index, slice) else part


class KeptPrompts(LRUPromptCache):
    """mlx-lm's prompt caches in memory, evicted to make room for admitted requests.

    A request finds prompts of its own scope only. With a store, it looks on disk as well, and all
    prompts that are kept in memory go to disk.
    """

    def __init__(self, admission: Admission, *limits: int, store: PromptStore | None = None):
        super().__init__(*limits)
        self._admission, self._store = admission, store
        self._key = ""

    def use(self, model: nn.Module, tokenizer: TokenizerWrapper, name: str) -> None:
        """Keep prompts of this model, which is shown to users as ``name``.

        mlx-lm tells models apart by path alone, but the weights at a path and the bits of caches
        may change.
        """
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self._empty = make_prompt_cache(model)
        self._key = key_of(model, self._empty)
        # Whether its caches can be cut back to any prefix.
        layers = flat_caches(self._empty)
        self._can_be_cut = all(isinstance(x, (KVCache, TurboQuantKVCache)) for x in layers)

    def in_pieces(
        self, segments: list[list[int]], kinds: list[str]
    ) -> tuple[list[list[int]], list[str]]:
        """Split the long segments of a prompt if caches are stored and cannot be cut back.

        mlx-lm keeps a cache at the end of each segment, from which a similar prompt can go on.
        """
        if self._store is None or self._can_be_cut or len(segments) != len(kinds):
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
        """The cache of the longest known prefix, and the tokens, at least one, left to prefill."""
        model = (model, self._key, tokens.scope)
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if not rest:
            # Without a token to start from, the generation thread would fail and end.
            cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
            rest = [*rest, *tokens[-1:]]
        if self._store is not None and _are_tokens(tokens):
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
        """Keep a cache for its scope; its bytes are still counted for its request, which runs."""
        # In mlx-lm the cache of a draft model may lag behind that of its model.
        offsets = {layer.offset for layer in flat_caches(prompt_cache) if hasattr(layer, "offset")}
        count = min([len(tokens), *offsets])
        if offsets - {count} and not cut_back(prompt_cache, count):
            return
        tokens = tokens[:count]
        super().insert_cache((model, self._key, tokens.scope), tokens, prompt_cache, **keywords)
        own = sum(layer.nbytes for layer in prompt_cache)
        super().trim_to(n_bytes=self._admission.left + own)
        if self._store is not None and _are_tokens(tokens):
            about = self._name, self._tokenizer.decode(tokens[:SHOWN_TOKENS]), tokens.scope
            try:
                self._store.keep(self._model, tokens, prompt_cache, *about)
            except ValueError as error:  # the server is being closed
                _log.warning("A prompt of %d tokens is not kept: %s", len(tokens), error)

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Evict prompts; mlx-lm does this for each request after it has looked up its prompt."""
        left = self._admission.left
        n_bytes = left if n_bytes is None else min(n_bytes, left)
        super().trim_to(n_sequences=n_sequences, n_bytes=n_bytes)


def _are_tokens(tokens: list[Any]) -> bool:
    """Whether all are tokens of text; mlx-lm has negative numbers for parts of images."""
    return min(tokens, default=0) >= 0
