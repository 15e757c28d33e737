"""Settings of decode_attention.metal that change its speed but not its result.

A table has defaults for each kind of GPU. Settings that ``mlx_turboquant tune`` measured on this
machine replace them; they are in a file of the user's cache folder.
"""

import hashlib
import json
import logging
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from platformdirs import user_cache_path

from ..files import write_json

_FORMAT_VERSION = 1
_MAX_FILE_BYTES = 1 << 20
# Allowed values of each number of an entry in the file.
_ALLOWED = {
    "packed_tokens": range(1 << 63),
    "rows": range(1, 17),
    "accumulators": (32, 64),
    "tokens": (1, 2),
    "batch": (2, 4, 8),
    "simds": range(1, 9),
    "threadgroups": range(1, (1 << 14) + 1),
    "pair_table": (0, 1),
}

_log = logging.getLogger("mlx_turboquant")


class Tuning(NamedTuple):
    """How decode_attention.metal divides its work.

    A threadgroup of ``simds`` SIMD groups takes at most ``rows`` query rows, for which a lane holds
    up to ``accumulators`` output floats. A lane scores ``tokens`` packed tokens at once and loads
    the value words of ``batch`` steps at once. ``threadgroups`` fill the GPU. With ``pair_table``
    levels of up to 4 bits are looked up in threadgroup memory, not computed.
    """

    rows: int
    accumulators: int
    tokens: int
    batch: int
    simds: int
    threadgroups: int
    pair_table: int = 0


class Target(NamedTuple):
    """Settings of a kind of GPU that do not depend on the context length.

    ``half_sums`` makes short sums pairs of halves, for GPUs with operations on pairs. ``ahead``
    loads words before they are used, for GPUs that hide the latency of memory by many registers,
    not by many SIMD groups. combine.metal loads ``combined`` floats of partial results at once.
    ``pair_bytes`` is the memory of a threadgroup for pairs of levels of trellis codes: one load of
    two levels takes little longer than one of a level where lanes wait for each other's banks.
    """

    half_sums: bool
    ahead: bool
    combined: int
    pair_bytes: int


# Tunings, each with the number of packed tokens of all heads from which it applies.
Tunings = tuple[tuple[int, Tuning], ...]

TARGETS = {"metal": Target(False, False, 16, 0), "cuda": Target(True, True, 48, 32768)}
_CUDA_SHORT = Tuning(4, accumulators=32, tokens=2, batch=4, simds=4, threadgroups=512)
# Eight rows need up to 255 registers, so that fewer threadgroups fit a multiprocessor. But a code
# is unpacked once for all of them, which pays from this many packed tokens on.
_CUDA_LONG = (96 * 1024, Tuning(8, accumulators=64, tokens=2, batch=8, simds=4, threadgroups=256))
_APPLE = Tuning(8, accumulators=32, tokens=2, batch=4, simds=4, threadgroups=0)
# Cores of the smallest GPU of each size of Apple's chips: base, Pro, Max, Ultra. MLX's
# "architecture" ends with the letter. Four threadgroups of four SIMD groups fit a core.
_CORES = {"g": 8, "s": 14, "c": 24, "d": 48}
_THREADGROUPS_OF_A_CORE = 4


def tunings(target: str, dim: int, value_dim: int, group_rows: int) -> Tunings:
    """Return the tunings for ``group_rows`` query rows per key head: saved, or of the table."""
    saved = saved_tunings().get(heads_key(dim, value_dim, group_rows))
    return saved or default_tunings(target, group_rows)


def tuning_for(tunings: Tunings, packed_tokens: int) -> Tuning:
    """Return the tuning for ``packed_tokens`` packed tokens of all heads."""
    return next(tuning for least, tuning in reversed(tunings) if packed_tokens >= least)


def heads_key(dim: int, value_dim: int, group_rows: int) -> str:
    """Return the name in a file of key heads of ``dim`` values with ``group_rows`` query rows."""
    widths = f"{dim}" if dim == value_dim else f"{dim} and {value_dim}"
    return f"{widths} values, {group_rows} query rows"


def default_tunings(target: str, group_rows: int) -> Tunings:
    """Return the tunings of the table."""
    if target == "cuda":
        short = (0, _CUDA_SHORT)
        return (short, _CUDA_LONG) if group_rows > _CUDA_SHORT.rows else (short,)
    cores = least_cores(str(mx.device_info().get("architecture", "")))
    return ((0, _APPLE._replace(threadgroups=cores * _THREADGROUPS_OF_A_CORE)),)


def least_cores(architecture: str) -> int:
    """Return the cores of the smallest GPU with this name in MLX, such as "applegpu_g13s"."""
    return _CORES.get(architecture[-1:], _CORES["g"])


def device_name() -> str:
    """Return MLX's name of the GPU."""
    return str(mx.device_info().get("device_name", "unknown"))


@cache
def kernel_version() -> str:
    """Return a hash of all files of ``metal/``, comments included: tunings are for one version."""
    digest = hashlib.sha256()
    for file in sorted(Path(str(files("mlx_turboquant.metal"))).glob("*.[hm]*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def tuning_path() -> Path:
    """Return the file of this machine's tunings."""
    return user_cache_path("mlx_turboquant") / "tunings.json"


def save_tunings(found: dict[str, Tunings]) -> Path:
    """Add tunings, by :func:`heads_key`, to this machine's file; kernels built later use them.

    Raises:
        OSError: the file cannot be written.
    """
    file = tuning_path()
    contents = {
        "format": _FORMAT_VERSION,
        "device": device_name(),
        "kernels": kernel_version(),
        "tunings": {
            heads: [{"packed_tokens": least, **tuning._asdict()} for least, tuning in each]
            for heads, each in (_load(file) | found).items()
        },
    }
    write_json(file, contents)
    saved_tunings.cache_clear()
    return file


def reset_tunings() -> bool:
    """Delete the tunings of this machine, and return whether there were any.

    Raises:
        OSError: the file cannot be removed.
    """
    existed = tuning_path().exists()
    tuning_path().unlink(missing_ok=True)
    saved_tunings.cache_clear()
    return existed


@cache
def saved_tunings() -> dict[str, Tunings]:
    """Return the tunings that were measured on this machine, by :func:`heads_key`.

    They are read once per process, so that all layers of a model agree.
    """
    return _load(tuning_path())


def _load(file: Path) -> dict[str, Tunings]:
    """Return the tunings in a file; none, with a warning, if they are invalid on this machine."""
    try:
        with file.open("rb") as content:
            contents = json.loads(content.read(_MAX_FILE_BYTES))
        made_for = contents["format"], contents["device"], contents["kernels"]
        if made_for != (_FORMAT_VERSION, device_name(), kernel_version()):
            raise ValueError(f"they are for {contents['device']}, version {made_for[::2]}")
        return {heads: _checked(each) for heads, each in contents["tunings"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        _log.warning(
            "The settings in %s are not used (%s): run `mlx_turboquant tune` again.", file, error
        )
        return {}


def _checked(entries: list[dict[str, Any]]) -> Tunings:
    found = []
    for entry in entries:
        least, *numbers = (entry[name] for name in _ALLOWED)
        for value, (name, allowed) in zip((least, *numbers), _ALLOWED.items()):
            if type(value) is not int or value not in allowed:
                raise ValueError(f"{name} is {value!r}")
        found.append((least, Tuning(*numbers)))
    if not found:
        raise ValueError("some heads have none")
    # The first one applies from zero tokens on.
    found.sort()
    return ((0, found[0][1]), *found[1:])
