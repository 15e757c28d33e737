"""The command-line options of the compressed cache, shared by all commands."""

import argparse
import io
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..codec.quantizer import CODECS
from ..lm.prompt_store import PromptStore
from ..lm.settings import Settings

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_TEXTS = ("prompt", "system_prompt", "prefill_response")
# The seed of the rotation has no option: ``--seed`` is mlx-lm's, for sampling.
_SETTINGS = [field.name for field in fields(Settings) if field.name != "seed"]


def parse(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    without_effect: tuple[str, ...] = ("kv_group_size", "quantized_kv_start"),
) -> tuple[argparse.Namespace, Settings]:
    """Parse the options of an mlx-lm command, with our cache options in place of its own.

    Given options that are ``without_effect`` are named on stderr; invalid ones raise ValueError.
    """
    _add_cache_options(parser)
    for each, text in [(parser, "description"), *((x, "help") for x in parser._actions)]:
        setattr(each, text, (getattr(each, text) or "").replace("`", ""))  # of mlx-lm
    args = parser.parse_args(arguments)
    for name in _TEXTS:
        if getattr(args, name, None) is not None:
            setattr(args, name, _valid(getattr(args, name)))
    settings = settings_of(args)
    adapter = args.adapter_path
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(
            f"The adapter path {adapter} has no adapter_config.json: give the folder of an adapter "
            "that mlx-lm trained."
        )
    for name in without_effect:
        if getattr(args, name) != parser.get_default(name):
            print(f"{_option(name)} has no effect on the compressed cache.", file=sys.stderr)
    return args, settings


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of :class:`.Settings` that were given on the command line."""
    given = {name: getattr(args, name, None) for name in _SETTINGS}
    return {name: value for name, value in given.items() if value is not None}


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of the command line; ValueError if they are invalid."""
    profile = getattr(args, "profile", None)
    if profile is not None and not profile.is_file():
        raise ValueError(f"The profile {profile} does not exist: give a file that calibrate wrote.")
    return Settings(**given_settings(args))


def _add_cache_options(parser: argparse.ArgumentParser) -> None:
    parser.conflict_handler = "resolve"
    group = parser.add_argument_group("compressed cache")
    text = f"Mean bits per value, 2 to 8 in steps of 0.25 (default: {Settings.bits})"
    group.add_argument("--kv-bits", dest="bits", type=_mean_bits, help=text)
    group.add_argument("--key-bits", type=int, help="Bits per value of all keys, 1 to 8")
    group.add_argument("--value-bits", type=int, help="Bits per value of all values, 1 to 8")
    add_allocation_options(group)
    add_exact_token_options(group)
    text = "Maximum number of tokens in a layer, beyond which the oldest are evicted"
    group.add_argument("--max-kv-size", dest="max_size", type=int, help=text)
    # With these mlx-lm would convert the layers that are not compressed, and its server would
    # answer one request at a time.
    parser.set_defaults(kv_bits=None, max_kv_size=None)


def _mean_bits(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number: use 2 to 8 in quarters, or --key-bits and --value-bits"
        ) from None


def add_allocation_options(group: argparse._ActionsContainer) -> None:
    """Add the options for the kind of codes and the allocation of bits."""
    text = (
        "Kind of codes; trellis codes have less error up to 4 bits, and prompts are read more "
        f"slowly, on a CPU a quarter to half as fast (default: {Settings.codec})"
    )
    group.add_argument("--kv-codec", dest="codec", choices=CODECS, help=text)
    text = "Give all layers the same bits, for comparison"
    group.add_argument("--uniform", action="store_true", default=None, help=text)
    text = "Profile written by calibrate (default: the one in the user's cache folder)"
    group.add_argument("--profile", type=Path, metavar="FILE", help=text)
    text = "Skip the calibration of a model that has no profile"
    group.add_argument("--no-calibrate", dest="calibrate", action="store_false", help=text)


def add_exact_token_options(group: argparse._ActionsContainer) -> None:
    """Add the options for the tokens that stay exact."""
    text = f"Number of recent tokens that stay exact (default: {Settings.window})"
    group.add_argument("--kv-window", dest="window", type=int, help=text)
    text = f"Number of first tokens that stay exact (default: {Settings.sink_tokens})"
    group.add_argument("--kv-sinks", dest="sink_tokens", type=int, help=text)


def add_store_options(parser: argparse.ArgumentParser) -> argparse._ActionsContainer:
    """Add the options of the prompt store, and return their group."""
    group = parser.add_argument_group("prompt store")
    text = "Folder in which packed prompts are kept, so that none is prefilled twice"
    group.add_argument("--prompt-store", metavar="DIR", help=text)
    text = (
        "Maximum size of the store, like 20GB, or 20 for short; the least recently used "
        "prompts are evicted first (default: %(default)s)"
    )
    group.add_argument("--prompt-store-size", metavar="SIZE", default="20GB", help=text)
    return group


def open_store(args: argparse.Namespace) -> PromptStore | None:
    """Open the prompt store of the options, if any, with the errors of :class:`.PromptStore`."""
    if args.prompt_store is None:
        return None
    return PromptStore(args.prompt_store, parse_size(args.prompt_store_size))


def parse_size(text: str) -> int:
    """Bytes of a size like "16GB", "24GiB" or "512MB"; a bare number below 1,024 is in GB.

    Raises:
        ValueError: a text of another form, or a size below 1 byte (a bare number below 1).
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?|)(B?)\s*", text.upper())
    size = 0 if match is None else float(match[1]) * _UNITS[match[2]]
    if size < 1:
        raise ValueError(f"{text!r} is not a size of memory: use one like 16GB, 24GiB or 16.")
    return int(size * 10**9 if size < 1024 and not match[2] + match[3] else size)


def given_prompt(prompt: str) -> io.StringIO:
    """The prompt ("-" reads standard input) as a stream for mlx-lm; ValueError if empty."""
    sys.stdin.reconfigure(errors="surrogateescape")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ValueError("The prompt is empty: give a text as --prompt, or - to read stdin.")
    return io.StringIO(_valid(text))


def add_presets_option(parser: argparse.ArgumentParser, *presets: str) -> None:
    """Add a ``--kv-bits`` for several caches, each of a form that ``preset`` reads."""
    text = (
        "Bits per value of each cache, like 3.5, or K5V3 for keys and values, or trellis:3 with "
        f"another codec (default: {' '.join(presets)})"
    )
    parser.add_argument("--kv-bits", nargs="+", default=presets, metavar="BITS", help=text)


def add_comparison_options(parser: argparse.ArgumentParser, *presets: str) -> None:
    """Add the options of caches that are compared on one model."""
    add_presets_option(parser, *presets)
    add_allocation_options(parser)
    add_exact_token_options(parser)


def add_count(parser: argparse.ArgumentParser, option: str, default: int, text: str) -> None:
    """Add an integer option with its default in the help."""
    parser.add_argument(option, type=int, default=default, help=f"{text} (default: {default})")


def add_out(parser: argparse.ArgumentParser, folder: str, files: str) -> None:
    """Add ``--out``, the folder of results, with its default and its files in the help."""
    text = f"Folder to write {files} to (default: {folder})"
    parser.add_argument("--out", type=Path, default=Path(folder), help=text)


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raise ValueError if an option, or one of its numbers, is less than ``least`` allows."""
    for name, limit in least.items():
        given = getattr(args, name)
        smallest = min(given) if isinstance(given, list | tuple) else given
        if smallest < limit:
            raise ValueError(f"{_option(name)} is {smallest}: use {limit} or more.")


def _valid(text: str) -> str:
    """A text with "?" for each byte that is not UTF-8."""
    return text.encode(errors="replace").decode()


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
