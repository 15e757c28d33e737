"""Attention of a model that reads compressed tokens as they are, in place of mlx-lm's."""

import logging
import weakref
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cache.batch import CausalMask
from ..cache.fetched import Link
from ..cache.single import TurboQuantKVCache
from ..kernels.attention import MAX_DECODE_ROWS, decode_attention
from ..kernels.tokens import BLOCK
from .compressible import (
    HOOKED_NAME,
    attention_scopes,
    compressed_caches,
    compressible_caches,
    flat_caches,
)
from .settings import Settings

_ATTRIBUTE = "_mlx_turboquant_link"

_log = logging.getLogger("mlx_turboquant")


class _AttentionHook:
    """Takes the place of ``scaled_dot_product_attention`` in the module of a model.

    Decode steps over packed tokens read them as they are. Everything else goes to the original
    function, which gets dense arrays. The ``links`` are those of the models that use the hook.
    """

    def __init__(self, original):
        self.original = original
        self.links: weakref.WeakSet[Link] = weakref.WeakSet()

    def __call__(self, queries, keys, values, *arguments, **keywords):
        tokens = getattr(keys, "tokens", None)
        if tokens is None or tokens is not getattr(values, "tokens", None):
            return self.original(queries, keys, values, *arguments, **keywords)
        if tokens.packed_count and queries.shape[2] <= MAX_DECODE_ROWS:
            return self._decode(queries, tokens, *arguments, **keywords)
        output = self.original(queries, keys, values, *arguments, **keywords)
        if queries.shape[2] > MAX_DECODE_ROWS:
            keys.link.submit_attention(output)
        return output

    @staticmethod
    def _decode(queries, tokens, cache, scale, mask, sinks=None):
        if type(mask) is CausalMask:
            mask = None if queries.shape[2] == 1 else "causal"
        return decode_attention(queries, tokens, scale, mask, sinks)


def connect(model: nn.Module, cache: list[Any]) -> None:
    """Let the attention of ``model`` read compressed tokens, and link a prompt cache to it."""
    link = getattr(model, _ATTRIBUTE, None)
    if link is None:
        link = Link()
        setattr(model, _ATTRIBUTE, link)
        _hook_attention(model, link)
        link.needs_arrays = _raises_without_arrays(model, link)
    elif not link.is_hooked:
        _hook_attention(model, link)
    _link(cache, link)


def disconnect(model: nn.Module) -> None:
    """Give the model mlx-lm's attention back; its compressed caches then return arrays."""
    link = getattr(model, _ATTRIBUTE, None)
    if link is None:
        return
    link.is_hooked = False
    for scope in attention_scopes(model):
        hook = scope[HOOKED_NAME]
        if isinstance(hook, _AttentionHook):
            hook.links.discard(link)
            if not hook.links:
                scope[HOOKED_NAME] = hook.original


def _hook_attention(model: nn.Module, link: Link) -> None:
    link.is_hooked = True
    for scope in attention_scopes(model):
        if not isinstance(scope[HOOKED_NAME], _AttentionHook):
            scope[HOOKED_NAME] = _AttentionHook(scope[HOOKED_NAME])
        scope[HOOKED_NAME].links.add(link)


def _link(cache: list[Any], link: Link) -> None:
    layers = flat_caches(cache)
    for layer, reads in zip(layers, link.shared_reads or [0] * len(layers)):
        if isinstance(layer, TurboQuantKVCache):
            layer.link, layer.shared_reads = link, reads


def _raises_without_arrays(model: nn.Module, link: Link) -> bool:
    """Whether anything but hooked attention uses the keys and values of one new token.

    Tried on a token after a packed block, read in steps that are not evaluated: nothing of the
    model is. What is not an array raises when it is used as one. The steps before it count how
    often each cache is read again.
    """
    places = compressible_caches(model)
    settings = Settings(window=0, sink_tokens=0)
    cache = compressed_caches(model, places, [(4, 4)] * len(places), settings)
    _link(cache, link)
    for _ in range(BLOCK // MAX_DECODE_ROWS):
        model(mx.zeros((1, MAX_DECODE_ROWS), mx.int32), cache=cache)
    link.shared_reads = tuple(getattr(layer, "reads", 0) for layer in flat_caches(cache))
    _link(cache, link)
    link.needs_arrays = False
    try:
        model(mx.zeros((1, 1), mx.int32), cache=cache)
        return False
    except (TypeError, AttributeError) as error:
        _log.info("Decoding makes dense keys and values as well, because of: %s", error)
        return True
