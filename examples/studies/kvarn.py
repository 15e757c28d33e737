"""KVarN (arXiv 2606.03458): quantize tiles of tokens with equal variance along both axes.

A tile of T tokens of a head is rotated by a Hadamard matrix. Its channels are divided by their
standard deviation, then its tokens, in turns. Keys are then rounded channel by channel and values
token by token, to even steps between the smallest and the largest value.
"""

from typing import NamedTuple

import mlx.core as mx
from methods.common import Method

from mlx_turboquant.codec.codebook import check_bits
from mlx_turboquant.codec.packing import pack, unpack, words_per_vector
from mlx_turboquant.codec.rotation import Rotation

_ROUNDS = 16
_LEAST_DEVIATION = 1e-6


class KVarNTiles(NamedTuple):
    """Codes of tiles (..., tiles, T, words) uint32, and the numbers that restore the values.

    ``scales`` and ``offsets`` belong to the axis that is rounded, ``deviations`` to the other. All
    are bfloat16: (..., tiles, 1, dim) for channels, (..., tiles, T, 1) for tokens.
    """

    codes: mx.array
    scales: mx.array
    offsets: mx.array
    deviations: mx.array


class KVarN(Method):
    """KVarN for keys or values of a head: vectors (..., n, dim), n a multiple of the tile.

    Args:
        dim: Values per vector.
        bits: Bits per value, 1 to 8, without scales, offsets and deviations.
        by_channel: Round channel by channel, as for keys; otherwise token by token, as for values.
        tile: Tokens per tile.
        seed: The seed of the random signs of the rotation.

    Raises:
        ValueError: bits that are not supported.
    """

    def __init__(self, dim: int, bits: int, *, by_channel: bool, tile: int = 128, seed: int = 0):
        check_bits(bits)
        self.dim = dim
        self.bits = bits
        self.by_channel = by_channel
        self.tile = tile
        self.rotation = Rotation(dim, seed=seed)
        rounded, other = (tile, dim) if by_channel else (dim, tile)
        self.bits_per_value = 32 * words_per_vector(dim, bits) / dim + 32 / rounded + 16 / other

    def _pack(self, x: mx.array) -> KVarNTiles:
        if x.shape[-2] % self.tile:
            raise ValueError(
                f"{x.shape[-2]} vectors are not whole tiles of {self.tile}: use a multiple of that."
            )
        tiles = mx.unflatten(self.rotation.apply(x), -2, (-1, self.tile))
        of_channels, of_tokens = _even_deviations(tiles)
        even = tiles / (of_channels * of_tokens)
        axis = -2 if self.by_channel else -1
        low, high = even.min(axis=axis, keepdims=True), even.max(axis=axis, keepdims=True)
        steps = 2**self.bits - 1
        scales = mx.maximum((high - low) / steps, _LEAST_DEVIATION)
        codes = mx.clip(mx.round((even - low) / scales), 0, steps)
        own, other = (of_channels, of_tokens) if self.by_channel else (of_tokens, of_channels)
        numbers = (scales * own, low * own, other)
        return KVarNTiles(pack(codes, self.bits), *(each.astype(mx.bfloat16) for each in numbers))

    def _values(self, packed: KVarNTiles) -> mx.array:
        codes = unpack(packed.codes, self.bits, self.dim).astype(mx.float32)
        scales, offsets, deviations = (part.astype(mx.float32) for part in packed[1:])
        tiles = (codes * scales + offsets) * deviations
        return self.rotation.invert(tiles.flatten(-3, -2))


def _even_deviations(tiles: mx.array) -> tuple[mx.array, mx.array]:
    """Factors for channels (..., 1, dim) and for tokens (..., T, 1) of tiles (..., T, dim).

    Divided by them, all channels and all tokens have about the same standard deviation. The factors
    are from the round after which the largest deviation is nearest to the smallest.
    """
    of_channels = mx.ones_like(tiles[..., :1, :])
    of_tokens = mx.ones_like(tiles[..., :, :1])
    best = (of_channels, of_tokens)
    least = mx.full((*tiles.shape[:-2], 1, 1), mx.inf)
    for _ in range(_ROUNDS):
        of_channels = of_channels * _deviation(tiles / (of_channels * of_tokens), axis=-2)
        of_tokens = of_tokens * _deviation(tiles / (of_channels * of_tokens), axis=-1)
        even = tiles / (of_channels * of_tokens)
        channels, tokens = _deviation(even, axis=-2), _deviation(even, axis=-1)
        spread = channels.max(axis=-1, keepdims=True) / channels.min(axis=-1, keepdims=True)
        spread = spread + tokens.max(axis=-2, keepdims=True) / tokens.min(axis=-2, keepdims=True)
        better = spread < least
        least = mx.where(better, spread, least)
        best = [mx.where(better, *pair) for pair in zip((of_channels, of_tokens), best)]
    return best


def _deviation(x: mx.array, axis: int) -> mx.array:
    return mx.maximum(mx.std(x, axis=axis, keepdims=True), _LEAST_DEVIATION)
