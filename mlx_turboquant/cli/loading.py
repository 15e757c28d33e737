"""What the commands do to have a model that is ready for a compressed cache."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import mlx_lm
from tqdm import tqdm

from ..lm.calibrate import calibrate
from ..lm.compression import compression_of, give_profile
from ..lm.loading import model_errors, prepare_for_device, reason_of
from ..lm.profile import Profile, fingerprints, load_profile, save_profile
from ..lm.settings import Settings

MODEL_HELP = "Folder of a model of mlx-lm, or its name on the hub"


def load_lazily(name: str) -> tuple[nn.Module, Any]:
    """A model, of which no weights are read yet, and its tokenizer."""
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
    """What ``load`` of mlx-lm returns for a model, with the model prepared and calibrated."""
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
        give_profile(model, load_profile(args.profile, fingerprints(model)))
        return
    if settings.is_fixed or not args.calibrate or compression_of(model).profile is not None:
        return
    print(
        "This model has no profile of where bits matter: it is calibrated once, which takes about "
        "as long as reading 16 000 tokens (--no-calibrate does without).",
        file=sys.stderr,
    )
    try:
        profile = measured_profile(model, tokenizer)
    except ValueError as error:
        print(f"Bits are chosen without a profile: {error}", file=sys.stderr)
        return
    give_profile(model, profile)
    try:
        print(f"Its profile is kept in {save_profile(profile)}.", file=sys.stderr)
    except OSError as error:
        print(f"Its profile cannot be kept: {error}", file=sys.stderr)


def measured_profile(
    model: nn.Module, tokenizer: Any, texts: dict[str, str] | None = None
) -> Profile:
    """:func:`.calibrate` with a progress bar; whatever the model raises becomes a ValueError."""
    # The delay keeps the bar away from an error before the first step, which is one line.
    with tqdm(unit="layers", desc="Calibrating", mininterval=0, delay=1e-3) as bar:

        def progress(finished: int, total: int) -> None:
            bar.total = total
            bar.update(finished - bar.n)

        try:
            return calibrate(model, tokenizer, texts, progress)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"The model cannot be calibrated ({reason_of(error)}): "
                "use --no-calibrate with the other commands."
            ) from error
