"""The command-line options of the compressed cache, shared by all commands."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..cache.blocks import DEFAULT_SINK_TOKENS, DEFAULT_WINDOW
from ..lm.settings import Settings

DEFAULT_BITS = 4.0
_SETTINGS = {
    "kv_bits": "bits",
    "key_bits": "key_bits",
    "value_bits": "value_bits",
    "kv_window": "window",
    "kv_sinks": "sink_tokens",
    "max_kv_size": "max_size",
    "uniform": "uniform",
}


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the cache to a parser of mlx-lm, in place of its own ``--kv-bits``."""
    parser.conflict_handler = "resolve"
    group = parser.add_argument_group("compressed cache")
    group.add_argument(
        "--kv-bits",
        type=float,
        help=f"Mean of bits per value, 2 to 8 in quarters (default: {DEFAULT_BITS:g})",
    )
    group.add_argument("--key-bits", type=int, help="Bits per value of all keys, 1 to 8")
    group.add_argument("--value-bits", type=int, help="Bits per value of all values, 1 to 8")
    add_allocation_options(group)
    add_exact_token_options(group)
    group.add_argument(
        "--max-kv-size",
        type=int,
        help="Tokens that a layer holds at most, after which the oldest are forgotten",
    )


def add_allocation_options(group: argparse._ActionsContainer) -> None:
    """Add the options of where the bits go."""
    group.add_argument(
        "--uniform",
        action="store_true",
        default=None,
        help="Give all layers the same bits, for comparison",
    )
    group.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="What `mlx_turboquant calibrate` wrote (default: that in the user's cache folder)",
    )
    group.add_argument(
        "--no-calibrate",
        dest="calibrate",
        action="store_false",
        help="Do without a profile if the model has none, rather than measure it",
    )


def add_exact_token_options(group: argparse._ActionsContainer) -> None:
    """Add the options of the tokens that stay exact."""
    group.add_argument(
        "--kv-window", type=int, help=f"Recent tokens that stay exact (default: {DEFAULT_WINDOW})"
    )
    group.add_argument(
        "--kv-sinks",
        type=int,
        help=f"First tokens that stay exact (default: {DEFAULT_SINK_TOKENS})",
    )


def add_presets_option(parser: argparse.ArgumentParser, presets: tuple[str, ...]) -> None:
    """Add the ``--kv-bits`` of several caches, each as :func:`.contenders.preset` reads it."""
    parser.add_argument(
        "--kv-bits",
        nargs="+",
        default=presets,
        metavar="BITS",
        help=f"Bits of our caches, as 4, 3.5 or K5V3 (default: {' '.join(presets)})",
    )


def add_comparison_options(parser: argparse.ArgumentParser, presets: tuple[str, ...]) -> None:
    """Add the options of caches that are put side by side on one model."""
    add_presets_option(parser, presets)
    add_allocation_options(parser)
    add_exact_token_options(parser)


def check_least(args: argparse.Namespace, least: dict[str, int]) -> None:
    """Raise ValueError if an option, or one of its numbers, is less than ``least`` allows."""
    for name, limit in least.items():
        given = getattr(args, name)
        smallest = min(given) if isinstance(given, list | tuple) else given
        if smallest < limit:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is {smallest}: use {limit} or more.")


def given_settings(args: argparse.Namespace, options: Iterable[str] = _SETTINGS) -> dict[str, Any]:
    """The arguments of ``make_prompt_cache`` for those of ``options`` that were given."""
    given = {_SETTINGS[option]: getattr(args, option) for option in options}
    return {name: value for name, value in given.items() if value is not None}


def cache_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``make_prompt_cache`` that were given on the command line.

    Raises:
        ValueError: a setting that is not possible.
    """
    given = given_settings(args)
    Settings(**given)  # before a model is loaded
    return given


def warn_without_effect(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Say on stderr which options of mlx-lm were given that do nothing here."""
    for option, default in defaults.items():
        if getattr(args, option) != default:
            name = "--" + option.replace("_", "-")
            print(f"{name} has no effect on the compressed cache.", file=sys.stderr)
