"""Measures what an error in the keys or values of one layer does to the output of a model.

A text is read exactly up to its second part. Then the second part is decoded once as it is, and for
every compressed layer once more with one side of this layer quantized, at two numbers of bits. The
KL divergence of the output is the cost of that side at these bits. The four of a layer are the
rows of one batch, and the layers below it, whose output is the same, are not computed again.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..kernels.quantize import quantize
from ..kernels.storage import VALUE_MEAN_ENERGY, removable_mean, shared_quantizer
from .compressible import Compressible, check_compressible, compressible_caches, plain_caches
from .profile import LEAST_DIVERGENCE, MEASURED_BITS, Profile, fingerprint
from .texts import encode, start_tokens

_FOLDER = Path(__file__).parent / "calibration"
_SINKS = 4
# A text is read up to so many tokens before those that are scored, and the last of them stay exact:
# errors of tokens that in a cache are still in the window would hide what the others do.
_PREFIX_TOKENS = 512
_EXACT_PART = 1 / 8
# As many tokens are scored as all passes together may have: it is less than reading 16 000 tokens.
_LEAST_SCORED, _MOST_SCORED = 24, 128
_PASSED_TOKENS = 12_000
_LEAST_TOKENS = 64
_ROWS = [(side, bits) for side, measured in MEASURED_BITS.items() for bits in measured]

# Called with the number of finished passes and of all passes.
Progress = Callable[[int, int], Any]


def calibration_texts() -> dict[str, str]:
    """The bundled texts: prose, code, other languages, and numbers."""
    files = sorted(_FOLDER.glob("*.txt"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def calibrate(
    model: nn.Module,
    tokenizer,
    texts: dict[str, str] | None = None,
    progress: Progress = lambda finished, all: None,
) -> Profile:
    """The profile of a model, measured on ``texts`` (by name), or on the bundled ones.

    Raises:
        ValueError: a model that is spread over several machines or has no layer that could be
            compressed, or a text of fewer than 64 tokens.
    """
    if mx.distributed.init().size() > 1:
        raise ValueError(
            "A model that is spread over several machines cannot be calibrated: "
            "calibrate it on one machine and give the profile."
        )
    compressible = compressible_caches(model)
    check_compressible(model, compressible)
    texts = texts or calibration_texts()
    start = start_tokens(tokenizer)
    tokens = {name: start + part for name, part in zip(texts, encode(tokenizer, texts.values()))}
    for name, part in tokens.items():
        if len(part) < _LEAST_TOKENS:
            raise ValueError(
                f"The text {name} has {len(part)} tokens and calibration needs {_LEAST_TOKENS}: "
                "give a longer text."
            )
    passes = len(texts) * len(compressible)
    # Half of the layers are computed in a pass on average.
    wanted = int(_PASSED_TOKENS / (passes * len(_ROWS) / 2)) // 8 * 8
    most = min(max(wanted, _LEAST_SCORED), _MOST_SCORED)
    scored = [min(most, len(part) // 2) for part in tokens.values()]
    keys = tuple({bits: () for bits in MEASURED_BITS["keys"]} for _ in compressible)
    values = tuple({bits: () for bits in MEASURED_BITS["values"]} for _ in compressible)
    finished = 0
    progress(finished, passes)
    for part, count in zip(tokens.values(), scored):
        text = _Text(model, part, count)
        for place, *sides in zip(compressible, keys, values):
            rows = ((side, bits) for side in sides for bits in side)
            for (side, bits), found in zip(rows, text.divergences(place)):
                side[bits] += (max(found, LEAST_DIVERGENCE),)
            finished += 1
            progress(finished, passes)
        mx.clear_cache()
    values = tuple(None if at.values is None else x for at, x in zip(compressible, values))
    return Profile(fingerprint(model), tuple(texts), sum(scored), keys, values)


def divergence(exact: mx.array, other: mx.array) -> mx.array:
    """KL(exact || other) in nats of log-probabilities (..., vocabulary): float32 (...)."""
    return (mx.exp(exact) * (exact - other)).sum(axis=-1)


class _Text:
    """One text for one model: what is the same for all passes over its second part."""

    def __init__(self, model: nn.Module, tokens: list[int], scored: int):
        self.model = model
        prefix = min(_PREFIX_TOKENS, len(tokens) - scored)
        self.scored = mx.array([tokens[prefix : prefix + scored]] * len(_ROWS))
        self.caches = plain_caches(model)
        model(mx.array([tokens[:prefix]]), cache=self.caches)
        for cache in self.caches:
            cache.state = tree_map(_as_rows, cache.state)
        mx.eval([cache.state for cache in self.caches])
        self.layers = _layers(model)
        recorders = [_StandIn(layer) for layer in self.layers]
        self.exact = self._log_probabilities(recorders)[0]
        self.inputs = [each.input for each in recorders if each.input is not None]
        mx.eval(self.exact, *self.inputs)
        self.can_skip = self._skipping_changes_nothing()

    def divergences(self, place: Compressible) -> list[float]:
        """KL(exact || quantized), in nats, of a layer: for each of ``_ROWS``."""
        caches = copy.deepcopy(self.caches)
        cache = place.of(caches)
        is_latent = place.values is None
        for side in ("keys",) if is_latent else ("keys", "values"):
            exact = getattr(cache, side)[:1]
            are_keys = side == "keys" and not is_latent
            rows = [
                _quantized(exact, cache.offset, bits, are_keys) if name == side else exact
                for name, bits in _ROWS
            ]
            setattr(cache, side, mx.concatenate(rows))
        rows = self._log_probabilities(self._skipped(place.layer if self.can_skip else 0), caches)
        return divergence(self.exact, rows).mean(axis=-1).tolist()

    def _skipped(self, layer: int) -> list["_StandIn"]:
        """What replaces all below a ``layer``, which gets its recorded input."""
        return [_StandIn(each, self.inputs[layer]) for each in self.layers[:layer]]

    def _log_probabilities(
        self, replaced: list["_StandIn"], caches: list[Any] | None = None
    ) -> mx.array:
        """Of the scored tokens in all rows, with the first layers of the model ``replaced``."""
        originals = self.layers[: len(replaced)]
        self.layers[: len(replaced)] = replaced
        try:
            logits = self.model(self.scored, cache=caches or copy.deepcopy(self.caches))
        finally:
            self.layers[: len(originals)] = originals
        return nn.log_softmax(logits.astype(mx.float32), axis=-1)

    def _skipping_changes_nothing(self) -> bool:
        """Whether the layers of the model are called one after the other, and nothing beside."""
        last = len(self.inputs) - 1
        if last < 1 or len(self.inputs) != len(self.caches):
            return False
        try:
            rows = self._log_probabilities(self._skipped(last))
        except Exception:  # whatever a model of its own kind raises
            return False
        return mx.allclose(rows[0], self.exact, atol=1e-3).item()


def _as_rows(x: Any) -> Any:
    """A part of the state of a cache, for as many rows as there are ``_ROWS``."""
    is_row = isinstance(x, mx.array) and x.ndim > 1
    return mx.repeat(x, len(_ROWS), axis=0) if is_row else x


def _quantized(x: mx.array, count: int, bits: int, are_keys: bool) -> mx.array:
    """x (1, H, n, dim) with ``count`` tokens quantized, but for the sinks and the last of them."""
    end = count - int(_EXACT_PART * count)
    middle = x[:, :, _SINKS:end]
    quantizer = shared_quantizer(x.shape[3], bits, 0)
    mean = removable_mean(middle, 0.0 if are_keys else VALUE_MEAN_ENERGY)
    [packed] = quantize([middle], [mean], [quantizer])
    restored = (quantizer.dequantize(packed) + mean).astype(x.dtype)
    return mx.concatenate([x[:, :, :_SINKS], restored, x[:, :, end:]], axis=2)


class _StandIn:
    """Stands for a layer: keeps its input, and returns ``output`` without it if there is one."""

    input: mx.array | None = None

    def __init__(self, layer: nn.Module, output: mx.array | None = None):
        self.layer = layer
        self.output = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __call__(self, x: mx.array, *arguments: Any, **keywords: Any) -> Any:
        self.input = x
        return self.layer(x, *arguments, **keywords) if self.output is None else self.output


def _layers(model: nn.Module) -> list[nn.Module]:
    """The list itself, of which ``model.layers`` may be a copy; an empty one if there is none."""
    layers = getattr(model, "layers", [])
    for module in model.modules():
        for value in module.values():
            if isinstance(value, list) and len(value) == len(layers):
                if all(one is other for one, other in zip(value, layers)):
                    return value
    return []
