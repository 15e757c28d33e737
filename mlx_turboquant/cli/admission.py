"""The memory of a server: requests are admitted while they fit beside its model."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn

from ..lm.loading import device_nbytes
from ..lm.settings import Settings
from ..measure.cache_specs import CacheSpec
from ..measure.footprint import Footprint, chunk_nbytes, footprint
from .requests import BadRequest


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
        """Bytes left for caches beside a model; ValueError if there is no room for a prompt."""
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
            BadRequest: it cannot fit with the current model, which may change during the wait.
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
            raise BadRequest(
                f"A request of {tokens:,} tokens, new ones included, needs {alone / 1e9:,.2f} GB, "
                "more than is left beside the model: ask for less, or use a larger --memory-limit.",
                "max_tokens",
                code="context_length_exceeded",
            )
        is_next = self._waiting[0] is ticket
        return is_next and self._nbytes([*self._inside, tokens]) <= self._room
