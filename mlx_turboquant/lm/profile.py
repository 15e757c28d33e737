"""Profiles, the results of calibration, and their files in the user's cache folder."""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from platformdirs import user_cache_path

from ..codec.basis import Basis
from ..codec.quantizer import CODEC_VERSION
from ..files import write_json
from .allocation import Layer, measured_layer
from .compressible import Compressible
from .identity import adapters_of

FORMAT_VERSION = "1"
# The numbers of bits at which calibration quantizes a side.
MEASURED_BITS = {"keys": (2, 3), "values": (1, 2)}
# The least divergence in a profile: smaller ones are lost in rounding.
LEAST_DIVERGENCE = 1e-9
_MAX_FILE_BYTES = 1 << 24

_log = logging.getLogger("mlx_turboquant")

# The divergences of one side of a layer in nats: by bits, one for each text.
Divergences = dict[int, tuple[float, ...]]


class Profile(NamedTuple):
    """KL divergences of the output of a model in nats, when one side of one layer is quantized.

    ``keys`` and ``values`` have one entry for each compressed layer, in the order of the layers. An
    entry of ``values`` is None for latent attention. ``tokens`` is the number of tokens that were
    scored in all ``texts`` together.
    """

    fingerprint: str
    texts: tuple[str, ...]
    tokens: int
    keys: tuple[Divergences, ...]
    values: tuple[Divergences | None, ...]
    bases: tuple[Basis | None, ...] = ()

    def layers(self, compressible: Sequence[Compressible], geometric: bool) -> list[Layer]:
        """The layers of the model with divergences averaged over the texts.

        Bits are chosen by ``geometric`` means, because a text that hardly uses a layer says little
        about it. Arithmetic means are the divergences to expect of a choice.

        Raises:
            ValueError: the profile and the model have different numbers of layers.
        """
        if len(compressible) != len(self.keys):
            raise ValueError(
                f"The profile has {len(self.keys)} layers and the model {len(compressible)}: "
                "calibrate the model again."
            )
        average = geometric_mean if geometric else fmean

        def means(side: Divergences | None) -> dict[int, float] | None:
            return side and {bits: average(texts) for bits, texts in side.items()}

        sides = zip(compressible, map(means, self.keys), map(means, self.values))
        return [measured_layer(place.keys, place.values, *measured) for place, *measured in sides]


def fingerprint(model: nn.Module) -> str:
    """A hash of the model's configuration, vectors (norm weights and biases) and adapters.

    It is the same for a model and its dequantized form, because vectors are not quantized. Caches
    need the stricter :mod:`.identity`, because they hold tokens.
    """
    return fingerprints(model)[0]


def fingerprints(model: nn.Module) -> list[str]:
    """The fingerprint of a model and, if it has adapters, that of the model without them."""
    adapters = adapters_of(model)
    vectors, own = {}, hashlib.sha256()
    for name, parameter in sorted(tree_flatten(model.parameters())):
        module, _, last = name.rpartition(".")
        wrapper = module.rpartition(".")[0]
        if module in adapters:
            own.update(f"{name} {parameter.shape}".encode())
            own.update(bytes(memoryview(parameter.astype(mx.float32))))
        elif isinstance(parameter, mx.array) and parameter.ndim == 1:
            # An adapter wraps the layer of the base model.
            vectors[f"{wrapper}.{last}" if wrapper in adapters else name] = parameter
    base = hashlib.sha256(repr(getattr(model, "args", type(model).__name__)).encode())
    for name, vector in sorted(vectors.items()):
        base.update(name.encode())
        base.update(bytes(memoryview(vector.astype(mx.float32))))
    own.update(base.digest())
    return [own.hexdigest(), base.hexdigest()] if adapters else [base.hexdigest()]


def profile_path(fingerprint: str) -> Path:
    """The file of a model's profile in the user's cache folder."""
    return user_cache_path("mlx_turboquant") / "profiles" / f"{fingerprint[:24]}.json"


def unfinished_path(fingerprint: str) -> Path:
    """The file of the layers that an interrupted calibration of a model has measured."""
    return profile_path(fingerprint).with_suffix(".unfinished")


def save_profile(profile: Profile, file: Path | None = None) -> Path:
    """Write a profile to ``file`` or to :func:`profile_path`, and return the path.

    The file of an interrupted calibration is removed.

    Raises:
        OSError: the file cannot be written.
    """
    file = file or profile_path(profile.fingerprint)
    contents = {"format": FORMAT_VERSION, "codec": CODEC_VERSION, **profile._asdict()}
    contents["layers"] = [
        {"keys": keys} if values is None else {"keys": keys, "values": values}
        for keys, values in zip(contents.pop("keys"), contents.pop("values"))
    ]
    write_json(file, contents)
    if file != unfinished_path(profile.fingerprint):
        with suppress(OSError):
            unfinished_path(profile.fingerprint).unlink()
    return file


def load_profile(file: Path, model_fingerprints: Sequence[str]) -> Profile:
    """Load a profile, which must have one of the :func:`fingerprints` of a model.

    Raises:
        ValueError: a file that is not a profile, is damaged, or has another model or version.
        OSError: the file cannot be read.
    """
    with file.open("rb") as content:
        text = content.read(_MAX_FILE_BYTES)
    try:
        contents = json.loads(text)
        versions = contents["format"], contents["codec"]
        found = contents["fingerprint"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{file} is not a profile: give a file that calibrate wrote, or calibrate again."
        ) from error
    if versions != (FORMAT_VERSION, CODEC_VERSION):
        raise ValueError(
            f"{file} is a profile of version {versions}, this is version "
            f"{(FORMAT_VERSION, CODEC_VERSION)}: calibrate the model again."
        )
    if found not in model_fingerprints:
        raise ValueError(
            f"{file} is the profile of another model (fingerprint {str(found)[:12]}, this model "
            f"has {model_fingerprints[0][:12]}): calibrate this model."
        )
    try:
        return _checked(contents)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): calibrate the model again.") from error


def find_profile(model_fingerprints: Sequence[str]) -> Profile | None:
    """The profile in the user's cache folder for the first of these fingerprints that has one.

    A file that cannot be used is skipped with a warning.
    """
    for each in model_fingerprints:
        try:
            return load_profile(profile_path(each), model_fingerprints)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (ValueError, OSError) as error:
            _log.warning("A profile is not used: %s", error)
    return None


def _checked(contents: dict[str, Any]) -> Profile:
    texts, tokens = tuple(contents["texts"]), contents["tokens"]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("its texts have no names")
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"{tokens} tokens were scored")
    layers = contents["layers"]
    sides = {
        name: tuple(_checked_side(layer.get(name), name, len(texts)) for layer in layers)
        for name in MEASURED_BITS
    }
    if not sides["keys"] or None in sides["keys"]:
        raise ValueError("a layer has no keys")
    return Profile(contents["fingerprint"], texts, tokens, **sides)


def _checked_side(side: dict[str, list[float]] | None, name: str, texts: int) -> Divergences | None:
    if side is None:
        return None
    if set(side) != set(map(str, MEASURED_BITS[name])):
        raise ValueError(f"a side was measured at {sorted(side)} bits")
    for numbers in side.values():
        if len(numbers) != texts or not all(type(x) is float for x in numbers):
            raise ValueError("a side does not have one divergence per text")
        if not all(0 < x < math.inf for x in numbers):
            raise ValueError("a divergence is not a positive number")
    return {bits: tuple(side[str(bits)]) for bits in MEASURED_BITS[name]}
