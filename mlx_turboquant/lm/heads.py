"""The attention heads of a model's compressed layers, and their dimensions."""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .compressible import check_compressible, compressed_caches, compressible_caches
from .hook import observed_attention
from .settings import Settings


class Heads(NamedTuple):
    """``key_heads`` heads of keys and values, each for ``group`` query heads.

    In latent attention, one vector of ``dim`` values is key and value.
    """

    key_heads: int
    group: int
    dim: int
    value_dim: int
    is_latent: bool


def attention_heads(model: nn.Module) -> list[Heads]:
    """The different heads of a model's compressed layers.

    The model is called lazily with one token: nothing is computed.

    Raises:
        ValueError: no layer of the model can be compressed.
    """
    places = compressible_caches(model)
    check_compressible(model, places)
    cache = compressed_caches(model, places, [(4, 4)] * len(places), Settings())
    found: list[Heads] = []

    def observe(queries, keys, *_, **others):
        tokens = getattr(keys, "tokens", None)
        if tokens is not None:
            _, key_heads, _, dim = tokens.exact_keys.shape
            group, value_dim = queries.shape[1] // key_heads, tokens.exact_values.shape[3]
            found.append(Heads(key_heads, group, dim, value_dim, tokens.is_latent))

    with observed_attention(model, observe):
        model(mx.zeros((1, 1), mx.int32), cache=cache)
    return list(dict.fromkeys(found))
