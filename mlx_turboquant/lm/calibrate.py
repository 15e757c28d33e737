"""Measures what an error in the keys or values of one layer does to the output of a model.

The first part of several texts is read exactly and once. Then their second part is decoded exactly,
and once more for every compressed layer, with one side of this layer quantized at two numbers of
bits. The KL divergence of the output is the cost of that side at these bits. All texts, each with
its four sides and bits, are the rows of one batch, and the layers below, whose output is the same,
are not computed again.
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
# As many tokens are scored as all passes together may have.
_PASSED_TOKENS = 12_000
_LEAST_SCORED, _MOST_SCORED = 24, 128
_LEAST_TOKENS = 64
# Texts that are read together.
_TEXTS = 4
_ROWS = [(side, bits) for side, measured in MEASURED_BITS.items() for bits in measured]
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
        unfinished: Where the layers are kept that were measured on the bundled texts, and where an
            interrupted calibration continues from.

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
    # Half of the layers are computed in a pass on average.
    wanted = int(_PASSED_TOKENS / (len(tokens) * len(places) * len(_ROWS) / 2)) // 8 * 8
    most = min(max(wanted, _LEAST_SCORED), _MOST_SCORED)
    counts = [min(most, *(len(part) // 2 for part in batch)) for batch in batches]
    scored = sum(len(batch) * count for batch, count in zip(batches, counts))
    nothing = Profile(fingerprint(model), tuple(texts), scored, (), ())
    begun = nothing if unfinished is None else _begun(unfinished, nothing)
    known, steps = len(begun.keys), len(batches) * (1 + len(places))
    sides = {
        name: [*getattr(begun, name), *({b: () for b in bits} for _ in places[known:])]
        for name, bits in MEASURED_BITS.items()
    }

    def measured(count: int) -> Profile:
        """What was found out about the first layers."""
        values = zip(places[:count], sides["values"])
        values = tuple(None if place.values is None else side for place, side in values)
        return nothing._replace(keys=tuple(sides["keys"][:count]), values=values)

    bar = tqdm(desc="Calibrating", total=steps, bar_format=_BAR, disable=progress is not True)

    def advance(finished: int) -> None:
        bar.update(finished - bar.n)
        if callable(progress):
            progress(finished, steps)

    model = _in_float32(model)
    with bar:
        for i, (batch, count) in enumerate(zip(batches, counts)):
            rows, first = _Rows(model, batch, count), i * (1 + len(places)) + 1
            advance(first + known)
            for done, place in enumerate(places[known:], known + 1):
                for (name, bits), found in zip(_ROWS, rows.divergences(place)):
                    sides[name][done - 1][bits] += tuple(found)
                if unfinished is not None:
                    with suppress(OSError):  # then the next one begins anew
                        save_profile(measured(done), unfinished)
                advance(first + done)
            mx.clear_cache()
    return measured(len(places))


def _begun(file: Path, nothing: Profile) -> Profile:
    """What an interrupted calibration has left, if it was like this one, or ``nothing``."""
    try:
        found = load_profile(file, [nothing.fingerprint])
    except (OSError, ValueError):
        return nothing
    return found if found._replace(keys=(), values=()) == nothing else nothing


def _in_float32(model: nn.Module) -> nn.Module:
    """On a CPU, a copy of a model that has other weights: they would be multiplied slowly."""
    dtypes = {x.dtype for _, x in tree_flatten(model.parameters())}
    if mx.default_device().type != mx.DeviceType.cpu or dtypes == {mx.float32}:
        return model
    return prepare_for_device(copy.deepcopy(model))


class _Rows:
    """Some texts for one model: what is the same for all layers."""

    def __init__(self, model: nn.Module, texts: list[list[int]], scored: int):
        self.model = model
        prefix = min(_PREFIX_TOKENS, min(map(len, texts)) - scored)
        tokens = mx.array([text[: prefix + scored] for text in texts])
        self.scored = tokens[:, prefix:]
        self.caches = plain_caches(model)
        model(tokens[:, :prefix], cache=self.caches)
        mx.eval([cache.state for cache in self.caches])
        self.layers = _layers(model)
        recorders = [_StandIn(layer) for layer in self.layers]
        self.exact = self._logits(recorders)
        self.probabilities = mx.softmax(self.exact, axis=-1)
        self.inputs = [each.input for each in recorders if each.input is not None]
        mx.eval(self.exact, self.probabilities, *self.inputs)
        self.can_skip = self._skipping_changes_nothing()
        self.scored = _repeated(self.scored)
        self.inputs = [_repeated(x) for x in self.inputs]
        for cache in self.caches:
            cache.state = tree_map(_repeated, cache.state)

    def divergences(self, place: Compressible) -> list[list[float]]:
        """KL(exact || quantized), in nats, of a layer: for each of ``_ROWS`` and each text."""
        caches = copy.deepcopy(self.caches)
        cache = place.of(caches)
        is_latent = place.values is None
        for side in ("keys",) if is_latent else ("keys", "values"):
            exact = getattr(cache, side)[:: len(_ROWS)]
            are_keys = side == "keys" and not is_latent
            rows = [
                _quantized(exact, cache.offset, bits, are_keys) if name == side else exact
                for name, bits in _ROWS
            ]
            setattr(cache, side, mx.stack(rows, axis=1).flatten(0, 1))
        logits = self._logits(self._skipped(place.layer if self.can_skip else 0), caches)
        probabilities = self.probabilities[:, None]
        rise = mx.unflatten(logits, 0, (-1, len(_ROWS))) - self.exact[:, None]
        # What all logits have in common changes nothing. Without it the growth is never negative.
        rise = rise - (probabilities * rise).sum(axis=-1, keepdims=True)
        growth = (probabilities * mx.expm1(mx.minimum(rise, _MOST_RISE))).sum(axis=-1)
        found = mx.log1p(mx.maximum(growth, 0)).mean(axis=-1)
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
        return mx.allclose(logits, self.exact, atol=1e-3).item()


def _repeated(x: Any) -> Any:
    """An array, or a part of the state of a cache, with every row once for each of ``_ROWS``."""
    has_rows = isinstance(x, mx.array) and x.ndim > 1
    return mx.repeat(x, len(_ROWS), axis=0) if has_rows else x


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
