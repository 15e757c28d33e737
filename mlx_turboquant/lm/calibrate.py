"""Calibration: how much quantized keys or values of one layer change the output of a model.

The first part of each text is prefilled exactly, once. The second part is scored exactly. Then
every compressed layer is computed again, alone, with its keys or its values quantized at two
numbers of bits. One batch holds every text in all four combinations of side and bits. Gradients
tell how much this change of a layer's output changes that of the model: its KL divergence is the
divergence of that side at these bits. Where a model has no gradients, the layers above are computed
as well.
"""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from tqdm import tqdm

from ..codec.basis import Basis
from ..kernels.quantize import quantize
from ..kernels.storage import VALUE_MEAN_ENERGY, removable_mean, shared_quantizer
from .axes import learned_bases, watched
from .compressible import Compressible, check_compressible, compressible_caches, plain_caches
from .loading import prepare_for_device, reason_of
from .profile import (
    LEAST_DIVERGENCE,
    MEASURED_BITS,
    Profile,
    fingerprint,
    load_profile,
    save_profile,
    unfinished_path,
)
from .texts import encode, start_tokens

_FOLDER = Path(__file__).parent / "calibration"
_SINKS = 4
# The most tokens that are prefilled before the scored ones. Their last part stays exact, as the
# window of a cache does: its errors would hide those of the other tokens.
_PREFIX_TOKENS = 512
_EXACT_PART = 1 / 8
# Of the prefix, so that the bar moves early.
_PIECE = 128
_SCORED_TOKENS = 48
_LEAST_TOKENS = 64
# Texts in a batch.
_TEXTS = 4
# Random vectors of the logits from which the divergence of a small change is estimated.
_DIRECTIONS = 4
_ROWS = [(side, bits) for side, measured in MEASURED_BITS.items() for bits in measured]
# The exponential of a larger rise would overflow; such an output is unusable anyway.
_MOST_RISE = 80.0
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left, step {n_fmt} of {total_fmt}"

_log = logging.getLogger("mlx_turboquant")

# Called with the number of finished steps and of all steps.
Progress = Callable[[int, int], Any]


def calibration_texts() -> dict[str, str]:
    """The bundled texts: prose, code, other languages, and numbers."""
    files = sorted(_FOLDER.glob("*.txt"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def calibrated(model: nn.Module, tokenizer, progress: Progress | bool = True) -> Profile:
    """Calibrate a model on the bundled texts and keep its profile in the user's cache folder.

    The next call continues an interrupted calibration. If the profile cannot be written, a warning
    says so.
    """
    own = fingerprint(model)
    profile = calibrate(model, tokenizer, None, progress, unfinished_path(own))
    try:
        save_profile(profile)
    except OSError as error:
        _log.warning("The profile is not kept for the next start: %s", reason_of(error))
    return profile


def calibrate(
    model: nn.Module,
    tokenizer,
    texts: dict[str, str] | None = None,
    progress: Progress | bool = False,
    unfinished: Path | None = None,
) -> Profile:
    """Measure the profile of a model on ``texts`` (by name), or on the bundled ones.

    Texts are read in batches of four, each as far as the shortest of its batch. On a CPU a copy of
    the model in float32 is measured.

    Args:
        model: A model of mlx-lm.
        tokenizer: Its tokenizer.
        texts: Texts of 64 tokens or more.
        progress: Called with the number of finished steps and of all steps; True shows a bar.
        unfinished: The file of the layers measured so far on the bundled texts, from which an
            interrupted calibration continues.

    Raises:
        ValueError: a model that is spread over several machines or has no layer that could be
            compressed, a text of fewer than 64 tokens, or an output that is not finite.
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
    # With experts, all layers are computed for each one.
    most = _SCORED_TOKENS // 2 if _has_experts(model) else _SCORED_TOKENS
    counts = [min(most, *(len(part) // 2 for part in batch)) for batch in batches]
    scored = sum(len(batch) * count for batch, count in zip(batches, counts))
    nothing = Profile(fingerprint(model), tuple(texts), scored, (), ())
    begun = nothing if unfinished is None else _begun(unfinished, nothing)
    # Reading the texts and finding the gradients take about as long as measuring all layers.
    known, ahead = len(begun.keys), 2 * len(plain_caches(model))
    each = ahead + len(places)
    steps = each * len(batches)
    sides = {
        name: [*getattr(begun, name), *({b: () for b in bits} for _ in places[known:])]
        for name, bits in MEASURED_BITS.items()
    }

    def measured(count: int) -> Profile:
        """The profile of the first ``count`` layers."""
        values = zip(places[:count], sides["values"])
        values = tuple(None if place.values is None else side for place, side in values)
        return nothing._replace(keys=tuple(sides["keys"][:count]), values=values)

    bar = tqdm(desc="Calibrating", total=steps, bar_format=_BAR, disable=progress is not True)

    def advance(finished: int) -> None:
        bar.update(finished - bar.n)
        if callable(progress):
            progress(finished, steps)

    model = _in_float32(model)
    bases: tuple[Basis | None, ...] = ()
    with bar:
        for i, (batch, count) in enumerate(zip(batches, counts)):
            start = i * each
            rows = _Rows(
                model,
                batch,
                count,
                lambda share, s=start: advance(s + int(share * ahead)),
                () if i else places,
            )
            bases = bases or rows.bases
            # Without gradients all the work is in the layers.
            start += ahead if rows.gradients else ahead // 2
            rest = (i + 1) * each - start
            advance(start + rest * known // len(places))
            for done, place in enumerate(places[known:], known + 1):
                divergences = rows.divergences(place, bases[done - 1] if bases else None)
                if not all(map(math.isfinite, chain(*divergences))):
                    raise ValueError(
                        f"The output of the model is not finite with layer {place.layer} "
                        "quantized: calibrate it in float32 or bfloat16."
                    )
                for (name, bits), found in zip(_ROWS, divergences):
                    sides[name][done - 1][bits] += tuple(found)
                if unfinished is not None:
                    with suppress(OSError):  # without the file, the next calibration starts over
                        save_profile(measured(done), unfinished)
                advance(start + rest * done // len(places))
            mx.clear_cache()
    return measured(len(places))._replace(bases=bases)


def _begun(file: Path, nothing: Profile) -> Profile:
    """The profile that an interrupted calibration of the same kind has left, or ``nothing``."""
    try:
        found = load_profile(file, [nothing.fingerprint])
    except (OSError, ValueError):
        return nothing
    return found if found._replace(keys=(), values=()) == nothing else nothing


def _in_float32(model: nn.Module) -> nn.Module:
    """On a CPU, a float32 copy of a model with other dtypes, because they multiply slowly."""
    dtypes = {x.dtype for _, x in tree_flatten(model.parameters())}
    if mx.default_device().type != mx.DeviceType.cpu or dtypes == {mx.float32}:
        return model
    return prepare_for_device(copy.deepcopy(model))


class _Rows:
    """A batch of texts for one model, with all that is the same for every layer.

    ``advance`` is called with the finished share of the reading and of the gradients. ``bases`` are
    those of ``places``.
    """

    def __init__(
        self,
        model: nn.Module,
        texts: list[list[int]],
        scored: int,
        advance: Callable[[float], None] = lambda share: None,
        places: Sequence[Compressible] = (),
    ):
        self.model = model
        prefix = min(_PREFIX_TOKENS, min(map(len, texts)) - scored)
        tokens = mx.array([text[: prefix + scored] for text in texts])
        self.scored = tokens[:, prefix:]
        self.caches = plain_caches(model)
        with watched(model) as watch:
            for start in range(0, prefix, _PIECE):
                model(tokens[:, start : min(start + _PIECE, prefix)], cache=self.caches)
                # A sample that is not evaluated would hold all queries.
                mx.eval([cache.state for cache in self.caches], list(watch.queries.values()))
                advance(start / (prefix + scored) / 2)
        self.bases = learned_bases(tokens[:, :prefix], places, self.caches, watch)
        self.layers = _layers(model)
        recorders = [_StandIn(layer) for layer in self.layers]
        self.exact = self._logits(recorders)
        self.probabilities = mx.softmax(self.exact, axis=-1)
        recorders = [each for each in recorders if each.input is not None]
        self.inputs = [each.input for each in recorders]
        self.outputs = [each.output for each in recorders]
        mx.eval(self.exact, self.probabilities, self.inputs, self.outputs)
        advance(1 / 2)
        self.can_skip = self._skipping_changes_nothing()
        self.gradients = self._gradients(advance) if self.can_skip else []
        self.scored = _repeated(self.scored)
        self.inputs = [_repeated(x) for x in self.inputs]
        for cache in self.caches:
            cache.state = tree_map(_repeated, cache.state)

    def divergences(self, place: Compressible, basis: Basis | None = None) -> list[list[float]]:
        """KL(exact || quantized), in nats, of a layer: for each of ``_ROWS`` and each text."""
        caches = copy.deepcopy(self.caches)
        cache = place.of(caches)
        is_latent = place.values is None
        for side in ("keys",) if is_latent else ("keys", "values"):
            exact = getattr(cache, side)[:: len(_ROWS)]
            are_keys = side == "keys" and not is_latent
            rows = [
                _quantized(exact, cache.offset, bits, are_keys, basis) if name == side else exact
                for name, bits in _ROWS
            ]
            setattr(cache, side, mx.stack(rows, axis=1).flatten(0, 1))
        find = self._estimated if self.gradients else self._computed
        return mx.maximum(find(place.layer, caches), LEAST_DIVERGENCE).T.tolist()

    def _estimated(self, layer: int, caches: list[Any]) -> mx.array:
        """The divergences (texts, rows) to second order in the change of what a layer returns."""
        replaced = [_StandIn(each, self.inputs[layer]) for each in self.layers]
        replaced[layer] = _StandIn(self.layers[layer])
        self._logits(replaced, caches)  # lazy: the output of the model is never computed
        rows = mx.unflatten(replaced[layer].output, 0, (-1, len(_ROWS))).astype(mx.float32)
        change = rows - self.outputs[layer][:, None]
        along = [(gradients[layer][:, None] * change).sum(axis=-1) for gradients in self.gradients]
        return mx.square(mx.stack(along)).mean(axis=(0, -1)) / 2

    def _computed(self, layer: int, caches: list[Any]) -> mx.array:
        """The divergences (texts, rows) of the output, computed from the changed ``layer`` on."""
        logits = self._logits(self._skipped(layer if self.can_skip else 0), caches)
        probabilities = self.probabilities[:, None]
        rise = mx.unflatten(logits, 0, (-1, len(_ROWS))) - self.exact[:, None]
        # A shift of all logits changes nothing. Without it the growth is never negative.
        rise = rise - (probabilities * rise).sum(axis=-1, keepdims=True)
        growth = (probabilities * mx.expm1(mx.minimum(rise, _MOST_RISE))).sum(axis=-1)
        return mx.log1p(mx.maximum(growth, 0)).mean(axis=-1)

    def _gradients(self, advance: Callable[[float], None]) -> list[list[mx.array]]:
        """For each random direction, the gradients (texts, tokens, hidden) of all layers' outputs.

        To second order, a change z of the logits has the divergence z^T F z / 2, where
        F = diag(p) - p p^T is the Fisher information of the softmax p. That is the mean of
        (c^T z)^2 / 2 over random vectors c with covariance F (Hutchinson's estimator). A gradient
        of c^T z gives it for a change of any layer.

        The list is empty if an operation has no gradient or one that is not finite. So it is for a
        model with experts: gradients do not see that a change chooses others.
        """
        if _has_experts(self.model):
            return []

        def logits(*shifts: mx.array) -> list[mx.array]:
            pairs = zip(self.layers, shifts)
            return [self._logits([_StandIn(layer, shift=shift) for layer, shift in pairs])]

        roots, found = mx.sqrt(self.probabilities), []
        try:
            zeros = [mx.zeros_like(x) for x in self.outputs]
            for seed in range(_DIRECTIONS):
                signs = mx.random.bernoulli(shape=roots.shape[1:], key=mx.random.key(seed))
                signed = mx.where(signs, roots, -roots)
                vectors = signed - self.probabilities * signed.sum(axis=-1, keepdims=True)
                found.append(mx.vjp(logits, zeros, [vectors])[1])
                if not all(mx.isfinite(x).all().item() for x in found[-1]):
                    return []
                advance((1 + len(found) / _DIRECTIONS) / 2)
        except Exception:  # an operation without a gradient may raise anything
            return []
        return found

    def _skipped(self, layer: int) -> list["_StandIn"]:
        """Stand-ins for all layers below a ``layer``, which gets its recorded input."""
        return [_StandIn(each, self.inputs[layer]) for each in self.layers[:layer]]

    def _logits(self, replaced: list["_StandIn"], caches: list[Any] | None = None) -> mx.array:
        """Logits of the scored tokens in all rows, with the first layers ``replaced``."""
        originals = self.layers[: len(replaced)]
        self.layers[: len(replaced)] = replaced
        try:
            logits = self.model(self.scored, cache=caches or copy.deepcopy(self.caches))
        finally:
            self.layers[: len(originals)] = originals
        return logits.astype(mx.float32)

    def _skipping_changes_nothing(self) -> bool:
        """Whether the model only calls its layers in order, so that the first can be skipped."""
        last = len(self.inputs) - 1
        if last < 1 or len(self.inputs) != len(self.caches):
            return False
        try:
            logits = self._logits(self._skipped(last))
        except Exception:  # an unusual model may raise anything
            return False
        return mx.allclose(logits, self.exact, atol=1e-3).item()


def _has_experts(model: nn.Module) -> bool:
    return any(isinstance(x, SwitchLinear | QuantizedSwitchLinear) for x in model.modules())


def _repeated(x: Any) -> Any:
    """An array (or another part of a cache's state) with each row repeated for ``_ROWS``."""
    has_rows = isinstance(x, mx.array) and x.ndim > 1
    return mx.repeat(x, len(_ROWS), axis=0) if has_rows else x


def _quantized(
    x: mx.array, count: int, bits: int, are_keys: bool, basis: Basis | None = None
) -> mx.array:
    """x (B, H, n, dim) with ``count`` tokens quantized, except the sinks and the last eighth."""
    end = count - int(_EXACT_PART * count)
    middle = x[:, :, _SINKS:end]
    quantizer = shared_quantizer(x.shape[3], bits, 0, basis if are_keys else None)
    mean = removable_mean(middle, 0.0 if are_keys else VALUE_MEAN_ENERGY)
    [packed] = quantize([middle], [mean], [quantizer])
    restored = (quantizer.dequantize(packed) + mean).astype(x.dtype)
    return mx.concatenate([x[:, :, :_SINKS], restored, x[:, :, end:]], axis=2)


class _StandIn:
    """Replaces a layer, and keeps its input and output.

    It returns ``output`` if that is given, and else what the layer returns plus ``shift``.
    """

    input: mx.array | None = None

    def __init__(
        self, layer: nn.Module, output: mx.array | None = None, shift: mx.array | None = None
    ):
        self.layer, self.output, self.shift = layer, output, shift

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __call__(self, x: mx.array, *arguments: Any, **keywords: Any) -> Any:
        self.input = x
        if self.output is None:
            output = self.layer(x, *arguments, **keywords)
            self.output = output if self.shift is None else output + self.shift
        return self.output


def _layers(model: nn.Module) -> list[nn.Module]:
    """The model's own list of layers (``model.layers`` may be a copy), or an empty list."""
    layers = getattr(model, "layers", [])
    for module in model.modules():
        for value in module.values():
            if isinstance(value, list) and len(value) == len(layers):
                if all(one is other for one, other in zip(value, layers)):
                    return value
    return []
