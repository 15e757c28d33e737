"""The command-line options of the compressed cache, shared by all commands."""

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from ..cache import DEFAULT_SINK_TOKENS, DEFAULT_WINDOW
from ..integration import DEFAULT_KL_BUDGET, check_settings

DEFAULT_BITS = 4.0
_SETTINGS = {
    "kv_bits": "bits",
    "key_bits": "key_bits",
    "value_bits": "value_bits",
    "kv_window": "window",
    "kv_sinks": "sink_tokens",
    "max_kv_size": "max_size",
    "protect": "protect",
    "kl_budget": "kl_budget",
}


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the cache to a parser of mlx-lm, in place of its own ``--kv-bits``."""
    parser.conflict_handler = "resolve"
    group = parser.add_argument_group("compressed cache")
    group.add_argument(
        "--kv-bits",
        type=_bits,
        help="Bits per value, 1 to 8 in half steps, or auto: each layer's own for --kl-budget "
        f"(default: {DEFAULT_BITS:g})",
    )
    group.add_argument("--key-bits", type=int, help="Bits per value of the keys, 1 to 8")
    group.add_argument("--value-bits", type=int, help="Bits per value of the values, 1 to 8")
    add_protection_options(group)
    add_exact_token_options(group)
    group.add_argument(
        "--max-kv-size",
        type=int,
        help="Tokens that a layer holds at most, after which the oldest are forgotten",
    )


def add_protection_options(group: argparse._ActionsContainer) -> None:
    """Add the options of the bits that layers choose by themselves."""
    group.add_argument(
        "--no-protect",
        dest="protect",
        action="store_false",
        default=None,
        help="Keep to the bits where the keys of a layer demand more",
    )
    group.add_argument(
        "--kl-budget",
        type=float,
        metavar="NATS",
        help=f"KL divergence that auto aims at (default: {DEFAULT_KL_BUDGET})",
    )


def _bits(text: str) -> float | str:
    return text if text == "auto" else float(text)


def add_exact_token_options(group: argparse._ActionsContainer) -> None:
    """Add the options of the tokens that stay exact."""
    group.add_argument(
        "--kv-window",
        type=int,
        help=f"Recent tokens that stay exact (default: {DEFAULT_WINDOW})",
    )
    group.add_argument(
        "--kv-sinks",
        type=int,
        help=f"First tokens that stay exact (default: {DEFAULT_SINK_TOKENS})",
    )


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
    check_settings(**given)  # before a model is loaded
    return given


def warn_without_effect(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Say on stderr which options of mlx-lm were given that do nothing here."""
    for option, default in defaults.items():
        if getattr(args, option) != default:
            name = "--" + option.replace("_", "-")
            print(f"{name} has no effect on the compressed cache.", file=sys.stderr)
