"""Whose tokens a cache holds: the identity of a model's weights.

A key or value depends on all weights below it, so every bit counts: a fine-tune, another
quantization and an adapter are other models. Words of 32 bits are multiplied with random odd
numbers of 64 bits and summed up modulo 2^64, which the GPU does at the speed of its memory, and
SHA-256 is taken of the sums. One word that changes always changes its sum; two arrays that differ
in any other way have the same sum with a probability of about 2^-32 (multilinear hashing,
arXiv 1202.4961).
"""

import hashlib
import weakref
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

# Words that are summed up at once: few enough for the memory, enough for a GPU.
_PIECE = 1 << 21
# Bytes of a small array, which is kept and compared by its bits: some models (Gemma 3n) clip such
# weights again at every call, and put a new array in the place of an equal one.
_SMALL = 1 << 16


class Weights:
    """The weights that a model has now: the same object for as long as they are the same arrays.

    An array that was written in place is not noticed.
    """

    def __init__(self, model: nn.Module):
        self._numbers = _numbers(model)
        self._arrays = {name: _reference(x) for name, x in tree_flatten(model.parameters())}
        self._identity: str | None = None

    def are_of(self, model: nn.Module) -> bool:
        """Whether these are still the weights of a model."""
        now = dict(tree_flatten(model.parameters()))
        return (
            now.keys() == self._arrays.keys()
            and all(_are_same(self._arrays[name](), x) for name, x in now.items())
            and self._numbers == _numbers(model)
        )

    def identity(self) -> str:
        """A digest of names, shapes, dtypes and bits of all arrays, and of the configuration.

        Raises:
            ValueError: the model has other weights by now.
        """
        if self._identity is None:
            references = self._arrays.values()
            if any(type(each) is weakref.ref and each() is None for each in references):
                raise ValueError(CHANGED)
            arrays = {name: reference() for name, reference in self._arrays.items()}
            self._identity = _digest(self._numbers, arrays)
        return self._identity


CHANGED = (
    "The weights of the model have changed since this cache was made, by an adapter for instance: "
    "make a new cache and read the prompt again."
)


def adapters_of(model: nn.Module) -> set[str]:
    """The names of the modules that are a layer of the base model and its LoRA or DoRA adapter."""
    return {name for name, module in model.named_modules() if "lora_a" in module}


def description(model: nn.Module) -> str:
    """What people may recognise a model by, for messages."""
    arguments = getattr(model, "args", None)
    kind = getattr(arguments, "model_type", type(model).__module__.rpartition(".")[2])
    layers = f"{kind} with {len(getattr(model, 'layers', []))} layers"
    return f"{layers} and adapters" if adapters_of(model) else layers


def _numbers(model: nn.Module) -> str:
    """The configuration, and what else modules compute with: the scale of an adapter is one."""
    texts = [repr(getattr(model, "args", type(model).__name__))]
    for name, module in model.named_modules():
        values = sorted(
            (key, value)
            for key, value in vars(module).items()
            if not key.startswith("_") and type(value) in (bool, int, float, str)
        )
        texts.append(f"{name} {type(module).__name__} {values}")
    return "\n".join(texts)


def _digest(numbers: str, arrays: dict[str, Any]) -> str:
    digest = hashlib.sha256(numbers.encode())
    multipliers = mx.array(np.random.PCG64(0).random_raw(_PIECE) | np.uint64(1))
    sums = []
    for name, x in sorted(arrays.items()):
        if isinstance(x, mx.array):
            digest.update(f"\n{name} {x.shape} {x.dtype}".encode())
            sums += [(words * multipliers[: words.size]).sum() for words in _pieces(x)]
        else:
            digest.update(f"\n{name} {x!r}".encode())
    if sums:
        digest.update(bytes(memoryview(mx.stack(sums))))
    return digest.hexdigest()


def _pieces(x: mx.array) -> Iterator[mx.array]:
    """The bits of an array as uint64 vectors that hold one word of 32 bits each."""
    bits = x.reshape(-1)
    if x.nbytes % 4:
        bits = mx.pad(bits.view(mx.uint8), (0, -x.nbytes % 4))
    words = bits.view(mx.uint32)
    for start in range(0, words.size, _PIECE):
        yield words[start : start + _PIECE].astype(mx.uint64)


def _reference(x: Any) -> Any:
    """A weak reference to an array; a small one, and what is no array, are kept."""
    return weakref.ref(x) if isinstance(x, mx.array) and x.nbytes > _SMALL else lambda: x


def _are_same(x: Any, y: Any) -> bool:
    """Whether two parameters are one, or small arrays with the same bits."""
    if x is y:
        return True
    if not (isinstance(x, mx.array) and isinstance(y, mx.array)) or x.nbytes > _SMALL:
        return False
    first, second = (each.reshape(-1).view(mx.uint8) for each in (x, y))
    return (x.shape, x.dtype) == (y.shape, y.dtype) and mx.array_equal(first, second).item()
