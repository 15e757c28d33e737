"""Predict how many bytes a cache takes, before it is filled."""

from bisect import bisect_right
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..cache.fetched import KVArray
from ..cache.latent import TurboQuantLatentCache
from ..cache.single import TurboQuantKVCache
from ..kernels.storage import GROWTH, LEAST_GROWTH
from ..lm.compressible import flat_caches, text_arguments
from ..lm.hook import observed_attention
from ..lm.prefill import scores_nbytes
from .cache_specs import CHUNK, GROUP_SIZE, CacheSpec

# With other head dimensions, MLX's attention over many query rows holds all scores in memory.
_FUSED_DIMS = (64, 80, 128)
# Keys on axes are restored as coordinates first: 1.5 times the bytes of dense tokens, measured.
_COPIES = 1.5
# Arrays of scores that exist at once.
_SCORES = 2


class Footprint(NamedTuple):
    """Bytes of the cache of one sequence, as a function of its length.

    ``per_token`` counts a token in all layers without a limit; ``constant`` counts what layers
    hold for any text (exact tokens, states). ``bounded`` has the bytes per token and the maximum
    number of tokens of each sliding window. ``workspace_per_token`` counts the additional bytes of
    a layer for each token in its cache, during prefill. ``scores_per_token`` counts those of
    scores that exist in parts, which take ``most_scores`` bytes at once.
    """

    per_token: float
    constant: float
    bounded: tuple[tuple[float, int], ...]
    workspace_per_token: float
    scores_per_token: float = 0.0
    most_scores: float = 0.0

    def nbytes(self, tokens: int) -> float:
        """Bytes of the cache of ``tokens`` tokens."""
        windows = sum(each * min(tokens, most) for each, most in self.bounded)
        return self.per_token * tokens + self.constant + windows

    def prompt_nbytes(self, tokens: int) -> float:
        """Bytes of the cache and the workspace at the end of the prefill of ``tokens`` tokens.

        A sliding window then holds the last chunk as well.
        """
        chunk = sum(each * min(max(tokens - most, 0), CHUNK) for each, most in self.bounded)
        scores = min(self.scores_per_token * tokens, self.most_scores)
        return self.nbytes(tokens) + chunk + self.workspace_per_token * tokens + scores

    def longest(self, nbytes: float) -> int:
        """The length in tokens of the longest prompt that fits into ``nbytes``."""
        return bisect_right(range(1, (1 << 40) + 1), nbytes, key=self.prompt_nbytes)


def footprint(model: nn.Module, spec: CacheSpec, memory: float | None = None) -> Footprint:
    """The footprint of the caches that ``spec`` makes; nothing of the model is evaluated.

    One token goes through the model lazily to find the numbers of heads and dimensions. The model
    is to run with ``memory`` bytes, or on this machine. ValueError for a model that the cache does
    not support.
    """
    cache, hooked = spec.make_cache(model), []

    def observe(queries: mx.array, keys: Any, *_: Any, **others: Any) -> None:
        hooked.append(isinstance(keys, KVArray))

    with observed_attention(model, observe):
        model(mx.zeros((1, 1), mx.int32), cache=cache)
    ours = [layer for layer in flat_caches(cache) if isinstance(layer, TurboQuantKVCache)]
    # Others look at arrays that they make of the keys and values of a prompt, as a whole.
    in_parts = sum(hooked) >= len(ours) > 0 and not any(
        isinstance(layer, TurboQuantLatentCache) for layer in ours
    )
    scores = _scores(model, spec)
    per_token, constant, bounded, workspaces = 0.0, 0.0, [], [0.0]
    for layer in flat_caches(cache):
        if isinstance(layer, TurboQuantKVCache):
            packed = layer.token_nbytes * (1 + GROWTH)
            if layer.max_size is None:
                per_token += packed
            else:
                bounded.append((packed, layer.max_size))
            constant += layer.exact_nbytes + LEAST_GROWTH * layer.token_nbytes
            copies = 1 if layer.settings.basis is None else _COPIES
            dense = copies * layer.fp16_nbytes  # dequantized
            workspaces.append(dense if in_parts else dense + scores)
        elif type(layer) is KVCache:
            dense = _token_nbytes(layer)
            if spec.mlx_lm_bits is not None:
                dense *= (spec.mlx_lm_bits + 32 / GROUP_SIZE) / (8 * layer.keys.itemsize)
            per_token += dense
            # A cache is copied when it grows.
            workspaces.append(dense + scores)
        elif getattr(layer, "max_size", None):
            bounded.append((_token_nbytes(layer), layer.max_size))
        else:
            constant += layer.nbytes
    divided = (scores, _SCORES * scores_nbytes(memory)) if in_parts else ()
    return Footprint(per_token, constant, tuple(bounded), max(workspaces), *divided)


def chunk_nbytes(model: nn.Module) -> int:
    """Approximate bytes of the activations of one chunk of a prompt."""
    hidden, intermediate = _size(model, "hidden_size"), _size(model, "intermediate_size")
    experts = _size(model, "num_experts_per_tok") * _size(model, "moe_intermediate_size")
    width = max(intermediate, 2 * hidden, experts) if hidden else _widest(model)
    return 8 * CHUNK * width


def _size(model: nn.Module, name: str) -> int:
    """An integer of a configuration, 0 if there is none of this name."""
    size = getattr(text_arguments(model), name, None)
    return size if type(size) is int else 0


def _widest(model: nn.Module) -> int:
    """The widest output of a linear layer, for configurations that use other names."""
    layers = [module for layer in model.layers for module in layer.modules()]
    weights = [module.weight for module in layers if "weight" in module]
    return max(weight.shape[0] for weight in weights if weight.ndim == 2)


def _scores(model: nn.Module, spec: CacheSpec) -> int:
    """Bytes of the 16-bit scores of a chunk for one token; 0 if MLX fuses the attention."""
    heads = _size(model, "num_attention_heads")
    head_dim = _size(model, "head_dim") or _size(model, "hidden_size") // max(heads, 1)
    fused = spec.mlx_lm_bits is None and head_dim in _FUSED_DIMS
    return 0 if fused else _SCORES * 2 * heads * CHUNK


def _token_nbytes(layer: Any) -> float:
    return (layer.keys.nbytes + layer.values.nbytes) / layer.keys.shape[2]
