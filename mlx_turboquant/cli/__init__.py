"""The command line: ``mlx_turboquant COMMAND``."""

import importlib
import sys

COMMANDS = {
    "generate": "complete a prompt, as mlx_lm.generate does",
    "chat": "talk to a model",
    "server": "answer requests over HTTP, as mlx_lm.server does",
    "cache_prompt": "process a prompt once and save it, as mlx_lm.cache_prompt does",
    "store": "list, check, prune, remove or clear what --prompt-store keeps",
    "calibrate": "measure where in a model bits matter",
    "evaluate": "measure what the compressed cache does to the output of a model",
    "benchmark": "measure speed and memory of a model with different caches",
    "plan": "say what context fits into memory, before anything is downloaded",
    "doctor": "check the kernels on this machine",
    "tune": "find the fastest settings of the kernels on this machine",
}
_USAGE = "usage: mlx_turboquant COMMAND [options]\n\ncommands:\n" + "".join(
    f"  {name:13} {purpose}\n" for name, purpose in COMMANDS.items()
)


def main() -> None:
    """Run the command that ``sys.argv`` names; a wrong input is one sentence and exit status 2."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(_USAGE + "\nmlx_turboquant COMMAND --help lists the options of a command.")
        return
    if command not in COMMANDS:
        sys.exit(_failure(f"{command!r} is not a command: use one of {', '.join(COMMANDS)}."))
    module = importlib.import_module(f".{command}", __name__)
    try:
        module.main(arguments)
    except (ValueError, OSError) as error:
        sys.exit(_failure(f"{command}: {error}"))
    except KeyboardInterrupt:
        sys.exit(130)


def _failure(message: str) -> int:
    print(f"mlx_turboquant {message}", file=sys.stderr)
    return 2
