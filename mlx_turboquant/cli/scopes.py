"""Scopes of a server's prompts: requests find only cached prompts of their own scope."""

import hashlib
from http.server import BaseHTTPRequestHandler
from typing import Any

SCOPES = ("all", "key", "user")


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
