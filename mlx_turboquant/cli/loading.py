"""Load models for the commands and prepare them for a compressed cache."""

import argparse
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn
import mlx_lm

from ..files import read_errors
from ..lm.calibrate import calibrated
from ..lm.compression import compression_of, give_profile
from ..lm.loading import model_errors, prepare_for_device, reason_of
from ..lm.profile import fingerprints, load_profile, unfinished_path
from ..lm.settings import Settings

MODEL_HELP = "Folder of an mlx-lm model, or its name on the Hugging Face hub"


def load_lazily(name: str) -> tuple[nn.Module, Any]:
    """Load a model, whose weights are not read yet, and its tokenizer."""
    with model_errors(name):
        return mlx_lm.load(name, lazy=True)


def load_ready(
    load: Callable[..., tuple],
    args: argparse.Namespace,
    settings: Settings,
    name: str,
    *positional: Any,
    **keywords: Any,
) -> tuple:
    """Call mlx-lm's ``load``; the model that it returns is prepared and calibrated."""
    with model_errors(name):
        model, tokenizer, *rest = load(name, *positional, **keywords)
    prepare_for_device(model)
    ensure_profile(model, tokenizer, args, settings)
    return (model, tokenizer, *rest)


def ensure_profile(
    model: nn.Module, tokenizer: Any, args: argparse.Namespace, settings: Settings
) -> None:
    """Give a model the profile of ``--profile``, or calibrate it if it has none and needs one."""
    if args.profile is not None:
        with read_errors(args.profile):
            give_profile(model, load_profile(args.profile, fingerprints(model)))
        return
    if settings.is_fixed or not args.calibrate or compression_of(model).profile is not None:
        return
    # A server loads its models in a thread, which exceptions of signals do not reach.
    is_main = threading.current_thread() is threading.main_thread()
    effect = "continues without it" if is_main else "ends the server and keeps what is measured"
    print(
        "This model is calibrated once, to find out which layers need more bits. "
        f"Ctrl-C {effect}, --no-calibrate skips it.",
        file=sys.stderr,
    )
    try:
        with calibration_errors():
            give_profile(model, calibrated(model, tokenizer))
    except KeyboardInterrupt:
        is_kept = unfinished_path(fingerprints(model)[0]).exists()
        then = " The next start keeps the measured layers." if is_kept else ""
        print(f"Calibration was stopped: bits are chosen without a profile.{then}", file=sys.stderr)
    except ValueError as error:
        print(f"Bits are chosen without a profile: {error}", file=sys.stderr)


@contextmanager
def calibration_errors() -> Iterator[None]:
    """Turn any error of a model during calibration into a ValueError."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"The model cannot be calibrated ({reason_of(error)}): "
            "use --no-calibrate with the other commands."
        ) from error
