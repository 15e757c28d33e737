"""The identity of a model's weights, which tells whose tokens a cache holds.

A key or value depends on all weights below it, so every bit counts: a fine-tune, another
quantization or an adapter makes another model. Words of 32 bits are multiplied by random odd
numbers of 64 bits and summed modulo 2^64, at the memory bandwidth of a GPU. The identity is the
SHA-256 of the sums, with names, shapes, dtypes and configuration. A change of one word always
changes its sum. Arrays that differ in any other way have the same sum with a probability of about
2^-32 (multilinear hashing, arXiv 1202.4961).
"""

import hashlib
import weakref
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

_NUMBERS = (bool, int, float, str)
# Words per sum, and sums per evaluation: few enough for memory, enough to keep a GPU busy.
_WORDS, _SUMS = 1 << 19, 16
# The most bytes of a small array, which is kept and compared by its bits: some models (Gemma 3n)
# clip such weights at every call, which replaces an array by an equal one.
_SMALL = 1 << 16


class Weights:
    """The weights of a model at one time, by references to their arrays.

    Writes into an array in place (``weight[0] = 1``, ``weight += 1``) are not noticed. Of the
    weights that a saved cache was made with, only the ``identity`` is known.
    """

    def __init__(self, model: nn.Module | None, identity: str | None = None):
        parts = [] if model is None else _parts(model)
        self._parts = [(name, _reference(part)) for name, part in parts]
        self._identity = identity

    def are_of(self, model: nn.Module) -> bool:
        """Whether these are still the weights of a model."""
        now = list(_parts(model))
        return len(now) == len(self._parts) and all(
            name == other and _are_same(reference(), part)
            for (name, part), (other, reference) in zip(now, self._parts)
        )

    def identity(self) -> str:
        """A digest of names, shapes, dtypes and bits of all arrays, and of the configuration.

        Raises:
            ValueError: the weights of the model have changed.
        """
        if self._identity is None:
            if any(isinstance(x, weakref.ref) and x() is None for _, x in self._parts):
                raise ValueError(CHANGED)
            self._identity = _digest({name: reference() for name, reference in self._parts})
        return self._identity

    def __reduce__(self) -> tuple[Any, ...]:
        return Weights, (None, self.identity())


CHANGED = (
    "The weights of the model have changed since this cache was made (by an adapter, for example): "
    "make a new cache and prefill the prompt again."
)


def adapters_of(model: nn.Module) -> set[str]:
    """The names of the modules that wrap a layer of the base model in a LoRA or DoRA adapter."""
    return {name for name, module in model.named_modules() if "lora_a" in module}


def description(model: nn.Module) -> str:
    """A short description of a model, for messages."""
    arguments = getattr(model, "args", None)
    kind = getattr(arguments, "model_type", type(model).__module__.rpartition(".")[2])
    layers = f"{kind} with {len(getattr(model, 'layers', []))} layers"
    return f"{layers} and adapters" if adapters_of(model) else layers


def _parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All parameters of a model and all plain attributes of its modules, by name.

    The scale of an adapter is such an attribute.
    """
    yield "configuration", repr(getattr(model, "args", None))
    parts: list[tuple[str, Any]] = [("", model)]
    while parts:
        name, part = parts.pop()
        if isinstance(part, nn.Module):
            values = vars(part).items()
            numbers = [(key, x) for key, x in values if key[0] != "_" and type(x) in _NUMBERS]
            yield f"{name}()", f"{type(part).__name__} {numbers}"
        if isinstance(part, dict):
            parts += [(f"{name}.{key}", x) for key, x in part.items() if key[0] != "_"]
        elif isinstance(part, (list, tuple)):
            parts += [(f"{name}.{index}", x) for index, x in enumerate(part)]
        else:
            yield name, part


def _digest(parts: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    multipliers = mx.array(np.random.PCG64(0).random_raw(_WORDS) | np.uint64(1))
    sums: list[mx.array] = []
    for name, part in sorted(parts.items()):
        if isinstance(part, mx.array):
            digest.update(f"{name} {part.shape} {part.dtype}\n".encode())
            for words in _words(part):
                sums.append((words * multipliers[: words.shape[1]]).sum(axis=1))
                if len(sums) % _SUMS == 0:
                    mx.eval(sums[-_SUMS:])  # bounds the products in memory
        else:
            digest.update(f"{name} {part}\n".encode())
    if sums:
        digest.update(bytes(memoryview(mx.concatenate(sums))))
    return digest.hexdigest()


def _words(x: mx.array) -> Iterator[mx.array]:
    """The bits of an array as rows of 32-bit words, each widened to uint64."""
    bits = x.reshape(-1)
    if x.nbytes % 4:
        bits = mx.pad(bits.view(mx.uint8), (0, -x.nbytes % 4))
    words = bits.view(mx.uint32)
    whole = words.size // _WORDS * _WORDS
    for start in range(0, whole, _WORDS * _SUMS):
        rows = words[start : min(start + _WORDS * _SUMS, whole)].reshape(-1, _WORDS)
        yield rows.astype(mx.uint64)
    if words.size > whole:
        yield words[whole:].reshape(1, -1).astype(mx.uint64)


def _reference(x: Any) -> Any:
    """A weak reference to a large array; small arrays and other objects are kept."""
    return weakref.ref(x) if isinstance(x, mx.array) and x.nbytes > _SMALL else lambda: x


def _are_same(x: Any, y: Any) -> bool:
    """Whether two parts are the same array, small arrays of equal bits, or other equal objects."""
    if x is y:
        return True
    if not (isinstance(x, mx.array) and isinstance(y, mx.array)):
        return type(x) is type(y) and x == y
    if x.nbytes > _SMALL or (x.shape, x.dtype) != (y.shape, y.dtype):
        return False
    first, second = (each.reshape(-1).view(mx.uint8) for each in (x, y))
    return mx.array_equal(first, second).item()
