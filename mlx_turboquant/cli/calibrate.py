"""This command measures which layers of a model need more bits."""

import argparse
import sys
from pathlib import Path

import mlx.core as mx

from ..files import make_folder, make_way
from ..kernels.storage import layouts_of
from ..lm.allocation import allocate, chosen_sides, expected_divergence
from ..lm.bit_plan import BitPlan
from ..lm.calibrate import calibrate
from ..lm.compression import give_profile
from ..lm.loading import check_memory, prepare_for_device
from ..lm.profile import (
    bases_path,
    beside_profile,
    fingerprint,
    profile_path,
    save_profile,
    unfinished_path,
)
from ..lm.texts import read_texts
from .loading import MODEL_HELP, calibration_errors, load_lazily
from .results import print_rows

_BUDGETS = (8, 6, 5, 4, 3.5, 3, 2.5, 2)
_MEANING = (
    "The divergence measures how far predictions are from those with an exact cache.\n"
    "It is estimated from a few hundred tokens; `mlx_turboquant evaluate` measures it.\n"
    "Below 0.001 nats no one will notice; at 0.01 a greedy answer departs after some\n"
    "tens of tokens; above 0.05 answers differ noticeably."
)


def main(arguments: list[str]) -> None:
    """Calibrate a model, save the profile and print the divergence expected at each budget."""
    args = _parser().parse_args(arguments)
    texts = dict(zip(map(str, args.text), read_texts(args.text))) if args.text else None
    if args.out is not None:
        make_way(args.out, '"fingerprint":', "profile")
        bases_path(args.out)  # raises errors here, not after the calibration
    model, tokenizer = load_lazily(args.model)
    check_memory(model)
    prepare_for_device(model)
    mx.eval(model.parameters())
    own = fingerprint(model)
    if args.out is None:
        make_folder(profile_path(own).parent)
    try:
        with calibration_errors():
            profile = calibrate(model, tokenizer, texts, True, unfinished_path(own))
    except KeyboardInterrupt:
        is_kept = texts is None and unfinished_path(own).exists()
        then = "the next one keeps the measured layers" if is_kept else "nothing is kept"
        print(f"Calibration was stopped: {then}.", file=sys.stderr)
        raise
    try:
        file = save_profile(profile, args.out)
    finally:  # results are printed even if the disk is full
        print_rows(_rows(give_profile(model, profile).plan()))
        print(_MEANING)
    written = f"{file} and {beside_profile(file).name}" if profile.bases else file
    print(f"{profile.tokens:,} tokens of {', '.join(profile.texts)} were scored. Wrote {written}")


def _rows(plan: BitPlan) -> list[dict[str, str]]:
    """Bytes per token and expected divergence at each budget."""
    rows = []
    for budget in _BUDGETS:
        bits = allocate(plan.layers, budget)
        nbytes = sum(
            side.vectors.heads * layouts_of(b, None)[0].vector_nbytes(side.vectors.dim)
            for side, b in chosen_sides(plan.layers, bits)
        )
        keys, values = zip(*bits)
        row = {"--kv-bits": f"{budget:g}", "bytes a token": f"{nbytes:,}"}
        row["divergence"] = f"{expected_divergence(plan.expected, bits):.2g} nats"
        rows.append({**row, "bits of keys": _span(keys), "bits of values": _span(values)})
    return rows


def _span(bits: tuple[int, ...]) -> str:
    least, most = min(bits), max(bits)
    return f"{least}" if least == most else f"{least} to {most}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_turboquant calibrate", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help=MODEL_HELP)
    text = (
        "Text files to measure on, each one separately, up to 560 tokens of each (default: "
        "bundled texts, of prose, code, other languages and numbers). Several kinds of text are "
        "better than one."
    )
    add("--text", type=Path, nargs="+", help=text)
    text = (
        "File to write the profile to (default: in the user's cache folder, where all "
        "commands look for it; an older profile of the model is replaced). Axes of the keys go to "
        "a file beside it, with the suffix .safetensors"
    )
    add("--out", type=Path, metavar="FILE", help=text)
    return parser
