"""The memory of a server: requests are admitted while they fit, cached prompts get the rest."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..lm.compressible import cut_back, flat_caches
from ..lm.loading import device_nbytes
from ..lm.prompt_store import key_of
from ..lm.settings import Settings
from ..measure.cache_specs import CacheSpec
from ..measure.footprint import Footprint, chunk_nbytes, footprint
from .requests import BadRequest
from .scopes import ScopedTokens


class DoesNotFit(BadRequest):
    """A request that does not fit into memory even alone."""


class Admission:
    """Admits requests in order while they and the model fit into ``limit`` bytes.

    Every request counts as much as the longest, because a batch pads its rows to one length.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._room = 0
        self._footprint: Footprint | None = None
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        # Final length of each admitted request, in tokens.
        self._inside: list[int] = []

    @property
    def left(self) -> int:
        """Bytes that admitted requests do not need."""
        return self._room - self._nbytes(self._inside)

    def _nbytes(self, requests: list[int]) -> int:
        """Bytes of requests of these lengths with the current model; 0 before there is one."""
        if self._footprint is None or not requests:
            return 0
        return len(requests) * int(self._footprint.prompt_nbytes(max(requests)))

    def room(self, model: nn.Module) -> int:
        """Bytes left for caches beside a model.

        Raises:
            ValueError: there is no room for a prompt.
        """
        needed = device_nbytes(model) + chunk_nbytes(model)
        if needed >= self.limit:
            raise ValueError(
                f"The model needs {needed / 1e9:,.2f} GB and the limit is "
                f"{self.limit / 1e9:,.2f} GB: use a larger --memory-limit or a smaller model."
            )
        return self.limit - needed

    def use(self, model: nn.Module, settings: Settings) -> int:
        """Switch to this model and return its :meth:`room`."""
        room, counted = self.room(model), footprint(model, CacheSpec("ours", settings=settings))
        with self._changed:
            self._room, self._footprint = room, counted
            self._changed.notify_all()
        return room

    @contextmanager
    def admitted(self, tokens: int) -> Iterator[None]:
        """Wait until a request of ``tokens`` tokens, new ones included, fits.

        Raises:
            DoesNotFit: it cannot fit with the current model, which may change during the wait.
        """
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._may_enter(ticket, tokens))
                self._inside.append(tokens)
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._inside.remove(tokens)
                self._changed.notify_all()

    def _may_enter(self, ticket: object, tokens: int) -> bool:
        alone = self._nbytes([tokens])
        if alone > self._room:
            raise DoesNotFit(
                f"A request of {tokens:,} tokens, new ones included, needs {alone / 1e9:,.2f} GB, "
                "more than is left beside the model: ask for less, or use a larger --memory-limit.",
                "max_tokens",
                code="context_length_exceeded",
            )
        is_next = self._waiting[0] is ticket
        return is_next and self._nbytes([*self._inside, tokens]) <= self._room


class KeptPrompts(LRUPromptCache):
    """mlx-lm's prompt caches in memory, evicted to make room for admitted requests.

    A request finds prompts of its own scope only.
    """

    def __init__(self, admission: Admission, *limits: int):
        super().__init__(*limits)
        self._admission = admission
        self._key = ""

    def use(self, model: nn.Module, tokenizer: TokenizerWrapper, name: str) -> None:
        """Keep prompts of this model, which is shown to users as ``name``.

        mlx-lm tells models apart by path alone, but the weights at a path and the bits of caches
        may change.
        """
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self._empty = make_prompt_cache(model)
        self._key = key_of(model, self._empty)

    def fetch_nearest_cache(
        self, model: Any, tokens: ScopedTokens
    ) -> tuple[list[Any] | None, list]:
        """Find a cache as mlx-lm does, but leave at least the last token to prefill."""
        model = (model, self._key, tokens.scope)
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if not rest:
            # Without a token to start from, the generation thread would fail and end.
            cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
            rest = [*rest, *tokens[-1:]]
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

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Evict prompts; mlx-lm does this for each request after it has looked up its prompt."""
        left = self._admission.left
        n_bytes = left if n_bytes is None else min(n_bytes, left)
        super().trim_to(n_sequences=n_sequences, n_bytes=n_bytes)
