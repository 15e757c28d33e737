"""mlx-lm's caches of prompts in memory, with the prompt store behind them."""

import logging
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..cache.single import TurboQuantKVCache
from ..lm.compressible import flat_caches
from ..lm.prompt_store import CHECKPOINT_TOKENS, SHOWN_TOKENS, PromptStore
from .admission import Admission, KeptPrompts
from .scopes import ScopedTokens

_log = logging.getLogger("mlx_turboquant")


class StoredPrompts(KeptPrompts):
    """Looks up prompts in memory, then on disk; all that are kept in memory go to disk as well."""

    def __init__(self, store: PromptStore, admission: Admission, *limits: int):
        super().__init__(admission, *limits)
        self._store = store

    def use(self, model: nn.Module, tokenizer: TokenizerWrapper, name: str) -> None:
        """Keep prompts of this model, which is shown to users as ``name``."""
        super().use(model, tokenizer, name)
        # Whether its caches can be cut back to any prefix.
        layers = flat_caches(self._empty)
        self._can_be_cut = all(isinstance(x, (KVCache, TurboQuantKVCache)) for x in layers)

    def in_pieces(
        self, segments: list[list[int]], kinds: list[str]
    ) -> tuple[list[list[int]], list[str]]:
        """Split the long segments of a prompt if caches cannot be cut back.

        mlx-lm keeps a cache at the end of each segment, from which a similar prompt can go on.
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
        """The cache of the longest known prefix, and the tokens that remain to be prefilled."""
        cache, rest = super().fetch_nearest_cache(model, tokens)
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
        """Keep the cache of a request, or of a prefix of its prompt, for its scope alone."""
        super().insert_cache(model, tokens, prompt_cache, **keywords)
        if _are_tokens(tokens):
            text = self._tokenizer.decode(tokens[:SHOWN_TOKENS])
            try:
                about = self._name, text, tokens.scope
                self._store.keep(self._model, tokens, prompt_cache, *about)
            except ValueError as error:  # the server is being closed
                _log.warning("A prompt of %d tokens is not kept: %s", len(tokens), error)


def _are_tokens(tokens: list[Any]) -> bool:
    """Whether all are tokens of text; mlx-lm has negative numbers for parts of images."""
    return min(tokens, default=0) >= 0
