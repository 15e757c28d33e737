"""The command line, as ``python -m mlx_turboquant``."""

from .cli import main

main()
