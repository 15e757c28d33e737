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

from ..codec.basis import Basis, restored_basis
from ..codec.quantizer import CODEC_VERSION
from ..files import check_target, files_at_once, make_folder, write_json, write_sealed
from ..stored_arrays import StoredFile, room_for_checksums
from .allocation import Layer, measured_layer
from .compressible import Compressible
from .identity import adapters_of

FORMAT_VERSION = "2"
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
    scored in all ``texts`` together. ``bases`` of the keys are one for each layer, or none at all.
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

    def bases_of(
        self, compressible: Sequence[Compressible], group: mx.distributed.Group | None
    ) -> list[Basis | None]:
        """The bases of the layers, or an empty list.

        A machine of a ``group`` that holds a part of the heads gets the bases of its own.

        Raises:
            ValueError: a basis is that of keys with other heads or sizes.
        """
        bases: list[Basis | None] = []
        for place, basis in zip(compressible, self.bases):
            heads, dim = place.keys
            if basis is not None and basis.axes.shape[:2] != (heads, dim):
                if group is None:
                    raise ValueError(
                        f"The profile has a basis for {len(basis.axes)} heads of "
                        f"{basis.axes.shape[2]} values and the keys of layer {place.layer} have "
                        f"{heads} heads of {dim}: calibrate the model again."
                    )
                # mlx-lm gives the heads to the machines in order; where it does not, a random
                # rotation serves any of them.
                own = slice(heads * group.rank(), heads * (group.rank() + 1))
                are_parts = basis.axes.shape[:2] == (heads * group.size(), dim)
                basis = Basis(basis.axes[own], basis.weights[own]) if are_parts else None
            bases.append(basis)
        return bases


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


def beside_profile(file: Path) -> Path:
    """The name of the file for the bases of a profile."""
    return file.with_suffix(".safetensors")


def bases_path(file: Path) -> Path:
    """The file for the bases of a profile, beside its own, in a folder that is made if needed.

    Raises:
        ValueError: the profile's own name has another ending than ".json", so that two profiles
            could share the file; or it exists and holds something else.
        OSError: the folder cannot be made or written to.
    """
    beside = beside_profile(file)
    if file.suffix != ".json":
        raise ValueError(f"{file} is no name for a profile: use one that ends with .json.")
    make_folder(file.parent)
    if file.parent != profile_path("").parent:  # where all files are our own, damaged ones too
        check_target(beside, "bases_of", "file of axes")
    return beside


def save_profile(profile: Profile, file: Path | None = None) -> Path:
    """Write a profile to ``file`` or to :func:`profile_path`, and return the path.

    Bases are written beside it, to a file with the suffix ".safetensors". The file of an
    interrupted calibration is removed.

    Raises:
        ValueError: the file of the bases is none that this function has written.
        OSError: a file cannot be written.
    """
    file = file or profile_path(profile.fingerprint)
    contents = {"format": FORMAT_VERSION, "codec": CODEC_VERSION, **profile._asdict()}
    contents["layers"] = [
        {"keys": keys} if values is None else {"keys": keys, "values": values}
        for keys, values in zip(contents.pop("keys"), contents.pop("values"))
    ]
    make_folder(file.parent)
    beside = bases_path(file) if profile.bases else None
    with files_at_once(file.parent, file) as folder:  # so that no file is replaced alone
        contents["bases"] = beside and _save_bases(profile, folder, beside)
        write_json(folder / file.name, contents)
    if file != unfinished_path(profile.fingerprint):
        with suppress(OSError, ValueError):
            unfinished_path(profile.fingerprint).unlink(missing_ok=True)
            if not profile.bases:  # of the profile before
                bases_path(file).unlink(missing_ok=True)
    return file


def _save_bases(profile: Profile, folder: Path, file: Path) -> str:
    """Write what will be the file of bases to a temporary folder, and return its SHA-256."""
    arrays = {
        f"{layer}.{name}": getattr(basis, name)
        for layer, basis in enumerate(profile.bases)
        for name in ("axes", "weights")
        if basis is not None
    }
    checksums = room_for_checksums(sum(x.nbytes for x in arrays.values()))
    about = {"bases_of": profile.fingerprint, "checksums": checksums}
    return _sha256(
        write_sealed(folder, file, lambda path: mx.save_safetensors(str(path), arrays, about))
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def load_profile(file: Path, model_fingerprints: Sequence[str]) -> Profile:
    """Load a profile, which must have one of the :func:`fingerprints` of a model.

    Raises:
        ValueError: a file that is not a profile, is damaged, or has another model or version; or
            the file of its bases is missing, damaged or that of another profile.
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
        profile, bases = _checked(contents), contents["bases"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): calibrate the model again.") from error
    return profile if bases is None else _with_bases(profile, file, bases)


def _with_bases(profile: Profile, file: Path, digest: str) -> Profile:
    """A profile with the bases beside its file, whose SHA-256 is ``digest``."""
    beside = beside_profile(file)
    try:
        if not beside.is_file():
            raise ValueError("it is missing")
        if _sha256(beside) != digest:
            raise ValueError("it has changed since, or belongs to another profile")
        stored = StoredFile(beside)
        if (found := stored.metadata.get("bases_of")) != profile.fingerprint:
            raise ValueError(f"it belongs to another model, with fingerprint {str(found)[:12]}")
        arrays = dict(zip(stored.arrays, stored.load(list(stored.arrays.values()))))
        bases = tuple(
            restored_basis(*(arrays.pop(f"{layer}.{name}", None) for name in ("axes", "weights")))
            for layer in range(len(profile.keys))
        )
        if arrays:
            raise ValueError(f"it has {min(arrays)} and the profile {len(bases)} layers")
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{beside}, the axes of {file}, cannot be used ({str(error).rstrip('.')}): "
            "copy both files, or calibrate the model again."
        ) from error
    return profile._replace(bases=bases)


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
