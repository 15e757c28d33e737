"""A cache whose tokens are coded by any of ``methods``: for study, through plain MLX alone."""

from copy import copy
from typing import Any

import mlx.core as mx

from .attention import CachedTokens
from .cache import TurboQuantKVCache
from .methods import Method, make_method
from .methods.common import map_arrays

# Buffers grow by this many tokens.
_STEP = 256
# Every method takes vectors of this many values.
_USUAL_DIM = 128


def split_codec(codec: str) -> tuple[str, str]:
    """The methods of keys and values: ``qjl`` for both, or ``qjl+affine``."""
    keys, plus, values = codec.partition("+")
    return keys, values if plus else keys


def check_codec(codec: str, key_bits: int, value_bits: int, dims: tuple[int, ...] = ()) -> None:
    """Raise ValueError unless keys and values of these ``dims`` (or some) can be coded so."""
    arguments = zip(split_codec(codec), (key_bits, value_bits), dims or (_USUAL_DIM,) * 2)
    for name, bits, dim in arguments:
        make_method(name, mx.zeros((1, dim)), bits)


class MethodTokens:
    """Vectors of one layer, (B, H, count, dim), as one of ``METHODS`` packs them.

    ``packed`` are buffers (B, H, capacity, ...) of the arrays that the method returns, with numbers
    of 32 bits in bfloat16. A method that looks at the vectors gets the first ones.
    """

    def __init__(self, name: str, bits: int, seed: int):
        self.name = name
        self.bits = bits
        self.seed = seed
        self.count = 0
        self.capacity = 0
        self.method: Method | None = None
        self.packed: Any = None

    @property
    def counts(self) -> list[int]:
        """Tokens of each sequence: one number, because all have the same length."""
        return [self.count]

    @property
    def arrays(self) -> list[mx.array]:
        """All buffers."""
        return [] if self.packed is None else _arrays(self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, free space included, and of what the method learned."""
        channels = getattr(self.method, "channels", None)
        return sum(x.nbytes for x in self.arrays) + (0 if channels is None else channels.nbytes)

    def vector_nbytes(self, dim: int) -> int:
        """Bytes that one stored vector takes."""
        x = mx.zeros((1, dim))
        packed = make_method(self.name, x, self.bits, self.seed).quantize(x)
        return sum(x.nbytes for x in _arrays(map_arrays(_as_stored, packed)))

    def append(self, x: mx.array) -> None:
        """Pack x (B, H, n, dim) and store it after the tokens that are there."""
        if self.method is None:
            self.method = make_method(self.name, x, self.bits, self.seed)
        packed = map_arrays(_as_stored, self.method.quantize(x))
        stop = self.count + x.shape[2]
        if stop > self.capacity:
            self._reserve(-(-stop // _STEP) * _STEP, packed)
        for buffer, new in zip(self.arrays, _arrays(packed)):
            buffer[:, :, self.count : stop] = new
        self.count = stop

    def dense(self, dtype: mx.Dtype) -> mx.array:
        """The reconstructed tokens (B, H, count, dim)."""
        return self.method.dequantize(
            map_arrays(lambda x: x[:, :, : self.count], self.packed), dtype
        )

    def order(self) -> mx.array:
        """The place of each token in the order of their age: int32 (count,)."""
        return mx.arange(self.count)

    def view(self) -> "MethodTokens":
        """The tokens of now: the same buffers, read up to the count of now."""
        return copy(self)

    def _reserve(self, capacity: int, like: Any) -> None:
        """Buffers for ``capacity`` tokens, with the arrays of ``like`` for some."""

        def grown(new: mx.array, *old: mx.array) -> mx.array:
            buffer = mx.zeros((*new.shape[:2], capacity, *new.shape[3:]), new.dtype)
            for x in old:
                buffer[:, :, : self.count] = x[:, :, : self.count]
            return buffer

        self.packed = map_arrays(grown, like, *([] if self.packed is None else [self.packed]))
        self.capacity = capacity


class MethodKVCache(TurboQuantKVCache):
    """What :class:`.TurboQuantKVCache` does, with keys and values coded by any of ``METHODS``.

    Attention gets all tokens of a layer dequantized, which gives the products of ``inner_product``.
    No mean is removed. It can be neither limited nor batched nor saved.

    Args:
        codec: A name in ``METHODS``, or those for keys and values, as ``qjl+affine``.
        key_bits: Bits of the method of the keys.
        value_bits: Bits of the method of the values.
        settings: Those of :class:`.TurboQuantKVCache`.

    Raises:
        ValueError: another name, bits that the method cannot have, or a setting out of range.
    """

    def __init__(self, key_bits: int = 4, value_bits: int = 4, *, codec: str, **settings: Any):
        check_codec(codec, key_bits, value_bits)
        super().__init__(key_bits, value_bits, **settings)
        if self.max_size is not None:
            raise ValueError(
                f"A cache with the codec {codec} cannot be limited to {self.max_size} tokens: "
                "leave the limit or the codec out."
            )
        self.codec = codec
        self._packed = [
            MethodTokens(name, bits, self.seed)
            for name, bits in zip(split_codec(codec), (key_bits, value_bits))
        ]

    @property
    def merge(self) -> None:
        """There is none: such caches are for one sequence, or several of the same length."""
        raise AttributeError(f"A cache with the codec {self.codec} cannot be batched.")

    @property
    def state(self) -> tuple[mx.array, ...]:
        """All arrays, for ``mx.eval``."""
        return (*self._exact, *(array for store in self._packed for array in store.arrays))

    def _needs_no_arrays(self, new: int) -> bool:
        return False

    def _fetch(self, tokens: CachedTokens, fused: bool) -> tuple[mx.array, ...]:
        return tuple(tokens.reference_dense() if tokens.keys.count else tokens.dense())

    def _store_packed(self, arrays: list[mx.array], start: int, count: int) -> None:
        for store, x in zip(self._packed, arrays):
            store.append(x[:, :, start : start + count])


def _as_stored(x: mx.array) -> mx.array:
    return x.astype(mx.bfloat16) if x.dtype == mx.float32 else x


def _arrays(packed: Any) -> list[mx.array]:
    """The arrays of what ``quantize`` returned."""
    return (
        [packed] if isinstance(packed, mx.array) else [x for part in packed for x in _arrays(part)]
    )
