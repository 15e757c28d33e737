"""The command line: ``mlx_turboquant COMMAND``."""

import difflib
import importlib
import os
import signal
import sys

from .. import __version__

COMMANDS = {
    "generate": "complete a prompt, as mlx_lm.generate does",
    "chat": "talk to a model",
    "server": "answer requests over HTTP, as mlx_lm.server does",
    "cache_prompt": "process a prompt once and save it, as mlx_lm.cache_prompt does",
    "store": "list, check, prune, remove or clear what --prompt-store keeps",
    "calibrate": "measure which layers of a model need more bits",
    "evaluate": "measure how a compressed cache changes the output of a model",
    "benchmark": "measure speed and memory of a model with different caches",
    "plan": "show which context length fits into memory, before a download",
    "doctor": "check the kernels on this machine",
    "tune": "find the fastest settings of the kernels on this machine",
}
_USAGE = "usage: mlx_turboquant COMMAND [options]\n\ncommands:\n" + "".join(
    f"  {name:13} {purpose}\n" for name, purpose in COMMANDS.items()
)


def main() -> None:
    """Run the command in ``sys.argv``; invalid input prints one sentence and exits with 2."""
    command, *arguments = sys.argv[1:] or ["--help"]
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next open file would get its number
            setattr(sys, name, open(os.devnull, mode))
    try:
        try:
            _run(command, arguments)
        finally:
            print(end="", flush=True)  # at exit, an error would print a traceback
    except BrokenPipeError:
        # The reader has gone, as head does: discard the rest of the output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError) as error:
        sys.exit(_failure(f"{command}: {error}"))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _run(command: str, arguments: list[str]) -> None:
    if command in ("-h", "--help"):
        print(_USAGE + "\nmlx_turboquant COMMAND --help lists the options of a command.")
    elif command == "--version":
        print(f"mlx_turboquant {__version__}")
    elif command in COMMANDS:
        interrupt = signal.getsignal(signal.SIGINT)
        if interrupt is signal.default_int_handler:  # which makes any exception of an import
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        module = importlib.import_module(f".{command}", __name__)
        signal.signal(signal.SIGINT, interrupt)
        module.main(arguments)
    else:
        similar = difflib.get_close_matches(command, COMMANDS, 1)
        advice = f"did you mean {similar[0]}?" if similar else f"use one of {', '.join(COMMANDS)}."
        sys.exit(_failure(f"{command!r} is not a command: {advice}"))


def _failure(message: str) -> int:
    print(f"mlx_turboquant {message}", file=sys.stderr)
    return 2
