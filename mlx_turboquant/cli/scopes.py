"""Who may find whose prompts on a server."""

import hashlib
from http.server import BaseHTTPRequestHandler
from typing import Any

SCOPES = ("all", "key", "user")


def scope_of(request: BaseHTTPRequestHandler, kind: str) -> str:
    """The scope of a request by one of ``SCOPES``: a hash of what tells it, "" for nothing."""
    if kind == "key":
        told = request.headers.get("Authorization", "")
    else:
        told = request.body.get("user") or "" if kind == "user" else ""
    return hashlib.sha256(str(told).encode()).hexdigest() if told else ""


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
