"""Measures what an error in the keys or values of one layer does to the output of a model.

Several texts are the rows of one batch. Their first part is read exactly and once. Then their
second part is decoded exactly, and once more for every compressed layer, with two copies of each
row: one with the keys of this layer quantized, and one with its values quantized. The KL divergence
of the output is the cost of that side. The layers below, whose output is the same, are not computed
again.
"""

import copy
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from tqdm import tqdm

from ..kernels.quantize import quantize
from ..kernels.storage import VALUE_MEAN_ENERGY, removable_mean, shared_quantizer
from .compressible import Compressible, check_compressible, compressible_caches, plain_caches
from .loading import prepare_for_device, reason_of
from .profile import (
    LEAST_DIVERGENCE,
    MEASURED_BITS,
    Profile,
    fingerprint,
    load_profile,
    profile_path,
    save_profile,
    unfinished_path,
)
from .texts import encode, start_tokens

_FOLDER = Path(__file__).parent / "calibration"
_SINKS = 4
# A text is read up to so many tokens before those that are scored, and the last of them stay exact:
# errors of tokens that in a cache are still in the window would hide what the others do.
_PREFIX_TOKENS = 512
_EXACT_PART = 1 / 8
# The more layers, the fewer tokens are scored: over all layers about so many.
_SCORED_IN_ALL = 6_000
_LEAST_SCORED, _MOST_SCORED = 24, 128
_LEAST_TOKENS = 64
# Texts that are read together.
_TEXTS = 4
# An exponential of more would overflow; such an output is lost anyway.
_MOST_RISE = 80.0
_BAR = "{desc}: {percentage:3.0f}%|{bar}| step {n_fmt} of {total_fmt}, {remaining} left"

_log = logging.getLogger("mlx_turboquant")

# Called with the number of finished steps and of all steps.
Progress = Callable[[int, int], Any]


def calibration_texts() -> dict[str, str]:
    """The bundled texts: prose, code, other languages, and numbers."""
    files = sorted(_FOLDER.glob("*.txt"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def calibrated(model: nn.Module, tokenizer, progress: Progress | bool = True) -> Profile:
    """The profile of a model, measured on the bundled texts and kept in the user's cache folder.

    If it is interrupted, the next call continues from there. A profile that cannot be written is a
    warning.
    """
    own = fingerprint(model)
    profile = calibrate(model, tokenizer, None, progress, unfinished_path(own))
    try:
        save_profile(profile)
    except OSError as error:
        folder = profile_path(own).parent
        _log.warning("The profile cannot be kept in %s: %s", folder, reason_of(error))
    return profile


def calibrate(
    model: nn.Module,
    tokenizer,
    texts: dict[str, str] | None = None,
    progress: Progress | bool = False,
    unfinished: Path | None = None,
) -> Profile:
    """The profile of a model, measured on ``texts`` (by name), or on the bundled ones.

    Four texts at a time are read together, each as far as the shortest of them. On a CPU a copy of
    the model in float32 is measured.

    Args:
        model: A model of mlx-lm.
        tokenizer: Its tokenizer.
        texts: Texts of 64 tokens or more.
        progress: Called with the number of finished steps and of all steps; True shows a bar.
        unfinished: Where the layers that were measured are kept if the calibration on the bundled
            texts is interrupted, and where it continues from.

    Raises:
        ValueError: a model that is spread over several machines or has no layer that could be
            compressed, or a text of fewer than 64 tokens.
    """
    if mx.distributed.init().size() > 1:
        raise ValueError(
            "A model that is spread over several machines cannot be calibrated: "
            "calibrate it on one machine and give the profile."
        )
    places = compressible_caches(model)
    check_compressible(model, places)
    if texts:
        unfinished = None
    texts = texts or calibration_texts()
    start = start_tokens(tokenizer)
    tokens = [start + part for part in encode(tokenizer, texts.values())]
    for name, part in zip(texts, tokens):
        if len(part) < _LEAST_TOKENS:
            raise ValueError(
                f"The text {name} has {len(part)} tokens and calibration needs {_LEAST_TOKENS}: "
                "give a longer text."
            )
    batches = [tokens[i : i + _TEXTS] for i in range(0, len(tokens), _TEXTS)]
    wanted = _SCORED_IN_ALL // (len(tokens) * len(places)) // 8 * 8
    most = min(max(wanted, _LEAST_SCORED), _MOST_SCORED)
    counts = [min(most, *(len(part) // 2 for part in batch)) for batch in batches]
    scored = sum(len(batch) * count for batch, count in zip(batches, counts))
    empty = Profile(fingerprint(model), tuple(texts), scored, (), ())
    layers = [] if unfinished is None else _measured_before(unfinished, empty)
    known = len(layers)
    layers += [[()] * (1 if place.values is None else 2) for place in places[known:]]
    steps = len(batches) * (1 + len(places))
    model = _in_float32(model)
    bar = tqdm(desc="Calibrating", total=steps, bar_format=_BAR, disable=progress is not True)

    def advance(finished: int) -> None:
        bar.update(finished - bar.n)
        if callable(progress):
            progress(finished, steps)

    with bar:
        try:
            for i, (batch, count) in enumerate(zip(batches, counts)):
                rows = _Rows(model, batch, count, is_latent=places[0].values is None)
                first = i * (1 + len(places)) + 1
                advance(first + known)
                for j, place in enumerate(places[known:], known):
                    sides = zip(layers[j], rows.divergences(place))
                    layers[j] = [(*before, *found) for before, found in sides]
                    advance(first + j + 1)
                mx.clear_cache()
        except BaseException:
            measured = [layer for layer in layers if layer[0]]
            if unfinished is not None and len(measured) > known:
                with suppress(OSError):  # it begins anew then
                    save_profile(_with_layers(empty, measured), unfinished)
            raise
    if unfinished is not None:
        with suppress(OSError):
            unfinished.unlink()
    return _with_layers(empty, layers)


def divergence(exact: mx.array, other: mx.array) -> mx.array:
    """KL(exact || other) in nats of log-probabilities (..., vocabulary): float32 (...)."""
    return (mx.exp(exact) * (exact - other)).sum(axis=-1)


def _measured_before(file: Path, empty: Profile) -> list[list[tuple[float, ...]]]:
    """The layers in the file of an interrupted calibration that is like this one."""
    try:
        found = load_profile(file, [empty.fingerprint])
    except (OSError, ValueError):
        return []
    if found._replace(keys=(), values=()) != empty:
        return []
    return [[x for x in sides if x is not None] for sides in zip(found.keys, found.values)]


def _with_layers(empty: Profile, layers: list[list[tuple[float, ...]]]) -> Profile:
    keys = tuple(keys for keys, *_ in layers)
    values = tuple(values[0] if values else None for _, *values in layers)
    return empty._replace(keys=keys, values=values)


def _in_float32(model: nn.Module) -> nn.Module:
    """On a CPU, a copy of a model that has other weights: they would be multiplied slowly."""
    dtypes = {x.dtype for _, x in tree_flatten(model.parameters())}
    if mx.default_device().type != mx.DeviceType.cpu or dtypes == {mx.float32}:
        return model
    return prepare_for_device(copy.deepcopy(model))


class _Rows:
    """Some texts for one model: what is the same for all layers."""

    def __init__(self, model: nn.Module, texts: list[list[int]], scored: int, is_latent: bool):
        self.model = model
        self.sides = ("keys",) if is_latent else ("keys", "values")
        prefix = min(_PREFIX_TOKENS, min(map(len, texts)) - scored)
        tokens = mx.array([text[: prefix + scored] for text in texts])
        self.scored = tokens[:, prefix:]
        self.caches = plain_caches(model)
        model(tokens[:, :prefix], cache=self.caches)
        mx.eval([cache.state for cache in self.caches])
        self.layers = _layers(model)
        recorders = [_StandIn(layer) for layer in self.layers]
        self.exact = self._logits(recorders)[:, None]
        self.probabilities = mx.softmax(self.exact, axis=-1)
        self.inputs = [each.input for each in recorders if each.input is not None]
        mx.eval(self.exact, self.probabilities, *self.inputs)
        self.can_skip = self._skipping_changes_nothing()
        self.scored = self._for_each_side(self.scored)
        self.inputs = [self._for_each_side(x) for x in self.inputs]
        for cache in self.caches:
            cache.state = tree_map(self._for_each_side, cache.state)

    def divergences(self, place: Compressible) -> list[list[float]]:
        """KL(exact || quantized), in nats, of the sides of a layer: for each text."""
        caches = copy.deepcopy(self.caches)
        cache = place.of(caches)
        for side in self.sides:
            exact = getattr(cache, side)[:: len(self.sides)]
            bits = MEASURED_BITS[side]
            are_keys = side == "keys" and len(self.sides) == 2
            quantized = _quantized(exact, cache.offset, bits, are_keys)
            rows = [quantized if each == side else exact for each in self.sides]
            setattr(cache, side, mx.stack(rows, axis=1).flatten(0, 1))
        logits = self._logits(self._skipped(place.layer if self.can_skip else 0), caches)
        rise = mx.unflatten(logits, 0, (-1, len(self.sides))) - self.exact
        rise = mx.minimum(rise, _MOST_RISE)
        mean, change = ((self.probabilities * x).sum(axis=-1) for x in (rise, mx.expm1(rise)))
        found = (mx.log1p(change) - mean).mean(axis=-1)
        return mx.maximum(found, LEAST_DIVERGENCE).T.tolist()

    def _skipped(self, layer: int) -> list["_StandIn"]:
        """What replaces all below a ``layer``, which gets its recorded input."""
        return [_StandIn(each, self.inputs[layer]) for each in self.layers[:layer]]

    def _logits(self, replaced: list["_StandIn"], caches: list[Any] | None = None) -> mx.array:
        """Of the scored tokens in all rows, with the first layers of the model ``replaced``."""
        originals = self.layers[: len(replaced)]
        self.layers[: len(replaced)] = replaced
        try:
            logits = self.model(self.scored, cache=caches or copy.deepcopy(self.caches))
        finally:
            self.layers[: len(originals)] = originals
        return logits.astype(mx.float32)

    def _skipping_changes_nothing(self) -> bool:
        """Whether the layers of the model are called one after the other, and nothing beside."""
        last = len(self.inputs) - 1
        if last < 1 or len(self.inputs) != len(self.caches):
            return False
        try:
            logits = self._logits(self._skipped(last))
        except Exception:  # whatever a model of its own kind raises
            return False
        return mx.allclose(logits, self.exact[:, 0], atol=1e-3).item()

    def _for_each_side(self, x: Any) -> Any:
        """A part of the state of a cache, or another array, with a copy of each row for a side."""
        has_rows = isinstance(x, mx.array) and x.ndim > 1
        return mx.repeat(x, len(self.sides), axis=0) if has_rows else x


def _quantized(x: mx.array, count: int, bits: int, are_keys: bool) -> mx.array:
    """x (B, H, n, dim) with ``count`` tokens quantized, but for the sinks and the last of them."""
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
