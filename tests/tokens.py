"""Random vectors and tokens, the same for the same seed, and helpers that use them."""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step

from mlx_turboquant.codec.basis import Basis, learned_basis
from mlx_turboquant.kernels.reference import packed_side
from mlx_turboquant.kernels.storage import shared_quantizer
from mlx_turboquant.kernels.tokens import VisibleTokens


def normal(shape: tuple[int, ...], seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def unit_vectors(count: int, dim: int, seed: int = 1234) -> mx.array:
    x = normal((count, dim), seed)
    return x / mx.linalg.norm(x, axis=-1, keepdims=True)


def keys_and_values(
    count: int, seed: int = 0, *, rows: int = 1, heads: int = 2, dim: int = 64
) -> tuple[mx.array, mx.array]:
    """Keys and values of ``count`` tokens: float32 (rows, heads, count, dim) each."""
    return tuple(normal((2, rows, heads, count, dim), seed))


def basis_of(dim: int, heads: int, spread: float, seed: int = 0) -> Basis:
    """A basis of keys whose deviations differ by a factor of 4^spread along random axes."""
    axes = np.linalg.qr(np.random.default_rng(seed).standard_normal((heads, dim, dim)))[0]
    variances = 4 ** np.linspace(spread, -spread, dim)
    return learned_basis(axes.swapaxes(1, 2) * variances @ axes, np.stack([np.eye(dim)] * heads))


def append_in_chunks(cache: Any, tokens: Iterable[mx.array], sizes: list[int]) -> Any:
    """Append keys and values to a cache in chunks of these sizes; return the last result."""
    keys, values = tokens
    start, fetched = 0, None
    for size in sizes:
        chunk = slice(start, start + size)
        fetched = cache.update_and_fetch(keys[:, :, chunk], values[:, :, chunk])
        mx.eval(fetched)
        start += size
    return fetched


def visible_tokens(
    dim: int = 64,
    value_dim: int = 64,
    key_bits: int = 4,
    value_bits: int = 4,
    dtype: mx.Dtype = mx.float32,
    *,
    packed: int = 70,
    mean: float = 0.0,
    heads: int = 2,
    basis: Basis | None = None,
    codec: str = "scalar",
) -> VisibleTokens:
    """Two sequences: 4 sinks, ``packed`` tokens, 11 recent ones, and free space behind them."""
    sides, exact = [], []
    for seed, width, bits, axes in ((1, dim, key_bits, basis), (2, value_dim, value_bits, None)):
        x, quantizer = (
            normal((2, heads, packed, width), seed) + mean,
            shared_quantizer(width, bits, 0, axes, codec),
        )
        means = x.mean(axis=2, keepdims=True)
        sides.append(packed_side(x, means, quantizer, interleaved=seed == 1))
        exact.append(normal((2, heads, 24, width), width, dtype))
    return VisibleTokens(*sides, packed, *exact, exact_count=15, sink_count=4, recent_start=4)


def random_tokens(*shape: int, seed: int = 0, vocabulary: int = 128) -> mx.array:
    """Tokens of any shape; 128 is the vocabulary of ``random_model``, 512 of ``tiny_model``."""
    return mx.random.randint(0, vocabulary, shape, key=mx.random.key(seed))


def continuation(
    model: nn.Module,
    prompt: list[int] | mx.array,
    cache: list[Any],
    count: int = 40,
    **options: Any,
) -> list[int]:
    """The ``count`` tokens that a model generates greedily after a prompt."""
    steps = generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache, **options)
    return [token for token, _ in steps]
