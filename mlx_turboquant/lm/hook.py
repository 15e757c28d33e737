"""Hooks that let the attention of a model read compressed tokens directly.

A module of mlx-lm looks up its attention function in its global scope. One hook per scope replaces
that function for as long as a model or an observer uses it.
"""

import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cache.batch import CausalMask
from ..cache.fetched import Link, submit_attention
from ..kernels.attention import MAX_DECODE_ROWS, decode_attention
from ..kernels.quantize import dense
from ..kernels.tokens import BLOCK
from .compressible import Compressible, compressed_caches, flat_caches, link_caches
from .prefill import attend_in_parts
from .settings import Settings

_NAME = "scaled_dot_product_attention"
# The arguments after queries, keys and values that decode attention supports, in their order.
_ARGUMENTS = ("cache", "scale", "mask", "sinks")

# Scopes are shared by all models of an architecture, and several threads may enable models.
_scopes_lock = threading.Lock()
_thread = threading.local()

_log = logging.getLogger("mlx_turboquant")


class _AttentionHook:
    """Replaces ``scaled_dot_product_attention`` in a scope.

    Decode steps read packed tokens directly. All other calls go to the original function, which
    gets dense arrays, chunks of prompts in parts. The hook stays while there are ``users``: links
    of models, and observers.
    """

    def __init__(self, original: Callable[..., mx.array]):
        self.original = original
        parameters = inspect.signature(original).parameters
        self._defaults = {name: parameter.default for name, parameter in parameters.items()}
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self, queries, keys, values, *arguments, **keywords):
        for observe in getattr(_thread, "observers", ()):
            observe(queries, keys, *arguments, **keywords)
        tokens = getattr(keys, "tokens", None)
        if tokens is None or tokens is not getattr(values, "tokens", None):
            return self.original(queries, keys, values, *arguments, **keywords)
        if tokens.packed_count and queries.shape[2] <= MAX_DECODE_ROWS:
            if self._are_known(arguments, keywords):
                return _decode(queries, tokens, *arguments, **keywords)
            keys, values = dense(tokens) * (2 if tokens.is_latent else 1)
            return self.original(queries, keys, values, *arguments, **keywords)
        is_chunk = queries.shape[2] > MAX_DECODE_ROWS
        if is_chunk and self._are_known(arguments, keywords):
            keywords |= zip(_ARGUMENTS, arguments)
            return attend_in_parts(self.original, queries, keys, values, **keywords)
        output = self.original(queries, keys, values, *arguments, **keywords)
        if is_chunk:
            submit_attention(output)
        return output

    def _are_known(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
        """Whether decode attention supports all arguments that differ from their defaults."""
        if len(arguments) > len(_ARGUMENTS):
            return False
        others = {name: value for name, value in keywords.items() if name not in _ARGUMENTS}
        return all(_is(value, self._defaults.get(name, ...)) for name, value in others.items())


def _is(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, mx.array) and value == default)


def _decode(queries, tokens, cache, scale, mask, sinks=None, **_):
    if type(mask) is CausalMask:
        mask = None if queries.shape[2] == 1 else "causal"
    return decode_attention(queries, tokens, scale, mask, sinks)


def _hook_attention(model: nn.Module, user: Any) -> None:
    """Hook the attention of a model for a ``user``, until it is unhooked or gone."""
    with _scopes_lock:
        for scope in _attention_scopes(model):
            if not isinstance(scope[_NAME], _AttentionHook):
                scope[_NAME] = _AttentionHook(scope[_NAME])
            scope[_NAME].users.add(user)


def _unhook_attention(model: nn.Module, user: Any) -> None:
    """Restore mlx-lm's attention in a model, unless others still use the hooks."""
    with _scopes_lock:
        for scope in _attention_scopes(model):
            hook = scope[_NAME]
            if isinstance(hook, _AttentionHook):
                hook.users.discard(user)
                if not hook.users:
                    scope[_NAME] = hook.original


@contextmanager
def observed_attention(model: nn.Module, observe: Callable[..., None]) -> Iterator[None]:
    """Call ``observe`` with all arguments except the values of each attention in this thread."""
    before = getattr(_thread, "observers", ())
    _thread.observers = (*before, observe)
    _hook_attention(model, observe)
    try:
        yield
    finally:
        _unhook_attention(model, observe)
        _thread.observers = before


def link_of(model: nn.Module, places: list[Compressible]) -> Link:
    """Make a new link to a model and hook its attention."""
    link = Link(is_hooked=True)
    _hook_attention(model, link)
    link.needs_arrays = _raises_without_arrays(model, places, link)
    return link


def unlink(model: nn.Module, link: Link) -> None:
    """Restore mlx-lm's attention in a model; caches with this link then return arrays."""
    link.is_hooked = False
    _unhook_attention(model, link)


def _raises_without_arrays(model: nn.Module, places: list[Compressible], link: Link) -> bool:
    """Whether code other than hooked attention uses the keys and values of one new token.

    The model is called lazily and computes nothing: first with a block to pack, then with one
    token, whose keys and values raise an error if they are used as arrays. The steps of the block
    also count how often other layers read each cache.
    """
    settings = Settings(window=0, sink_tokens=0)
    cache = compressed_caches(model, places, [(4, 4)] * len(places), settings)
    link_caches(cache, link)
    for _ in range(BLOCK // MAX_DECODE_ROWS):
        model(mx.zeros((1, MAX_DECODE_ROWS), mx.int32), cache=cache)
    link.shared_reads = tuple(getattr(layer, "reads", 0) for layer in flat_caches(cache))
    link_caches(cache, link)
    link.needs_arrays = False
    try:
        model(mx.zeros((1, 1), mx.int32), cache=cache)
        return False
    except (TypeError, AttributeError) as error:
        _log.info("Decoding also makes dense keys and values, because of: %s", error)
        return True


def _attention_scopes(model: nn.Module) -> list[dict[str, Any]]:
    """The global scopes in which the layers of a model look up their attention function."""
    calls = {type(module).__call__ for module in model.modules()}
    scopes = [getattr(call, "__globals__", {}) for call in calls]
    return [scope for scope in scopes if _NAME in scope]
