"""``mlx_turboquant generate``: mlx-lm's command, with a compressed cache."""

import importlib
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from ..lm.enable import make_prompt_cache
from ..lm.loading import model_errors, prepare_for_device
from ..lm.prompt_cache import check_fingerprint, load_prompt_cache
from ..lm.report import cache_report
from .calibrate import ensure_profile
from .options import add_cache_options, cache_settings, warn_without_effect
from .replaced import replaced

# The package mlx_lm hides the module behind the function of the same name.
_mlx_lm_generate = importlib.import_module("mlx_lm.generate")


def main(arguments: list[str]) -> None:
    """Run mlx-lm's own command with its parser, loader and generation wrapped."""
    parser = _mlx_lm_generate.setup_arg_parser()
    parser.prog, parser.description = "mlx_turboquant generate", __doc__
    parser.add_argument(
        "-v", dest="report", action="store_true", help="Show the cache of each kind of layer"
    )
    add_cache_options(parser)
    args = parser.parse_args(arguments)
    settings = cache_settings(args)
    defaults = ("kv_group_size", "quantized_kv_start")
    warn_without_effect(args, {option: parser.get_default(option) for option in defaults})
    args.kv_bits = None  # mlx-lm would convert the layers that are not compressed
    if args.prompt_cache_file is not None and settings:
        raise ValueError(
            f"{args.prompt_cache_file} was saved with settings of its own: "
            "leave out the options of the compressed cache."
        )
    run = _Run(args, settings)
    with replaced(
        _mlx_lm_generate,
        setup_arg_parser=lambda: SimpleNamespace(parse_args=lambda: args),
        load=run.load,
        load_prompt_cache=run.load_prompt_cache,
        generate=run.generate,
    ):
        _mlx_lm_generate.main()


class _Run:
    """One run of mlx-lm's command: the functions that stand in for its own."""

    def __init__(self, args: Namespace, settings: dict[str, Any]):
        self.args = args
        self.settings = settings
        self.fingerprint: str | None = None

    load_model = staticmethod(_mlx_lm_generate.load)
    generate_text = staticmethod(_mlx_lm_generate.generate)

    def load(self, *positional, **keywords):
        with model_errors(positional[0]):
            model, *rest = self.load_model(*positional, **keywords)
        prepare_for_device(model)
        if self.args.prompt_cache_file is None:
            ensure_profile(model, rest[0], self.args, self.settings)
        if self.fingerprint is not None:
            check_fingerprint(self.args.prompt_cache_file, self.fingerprint, model)
            self.fingerprint = None
        return (model, *rest)

    def load_prompt_cache(self, file: str, return_metadata: bool):
        """mlx-lm loads the cache before the model, so the model is checked when it is loaded."""
        cache, metadata = load_prompt_cache(file, return_metadata=True)
        self.fingerprint = metadata["fingerprint"]
        metadata = {"tokenizer_config": "{}", **metadata}
        # The fingerprint says whether it is the right model, whatever its name is now.
        return cache, {**metadata, "model": self.args.model or metadata.get("model")}

    def generate(self, model, tokenizer, prompt, *, prompt_cache, draft_model, verbose, **keywords):
        if prompt_cache is None:
            prompt_cache = make_prompt_cache(model, **self.settings)
            if draft_model is not None:
                prompt_cache += make_prompt_cache(draft_model, **self.settings)
        text = self.generate_text(
            model,
            tokenizer,
            prompt,
            prompt_cache=prompt_cache,
            draft_model=draft_model,
            verbose=verbose,
            **keywords,
        )
        if verbose:
            report = cache_report(prompt_cache, model)
            if self.args.report:
                print(report)
            print(f"Cache: {report.size}")
        return text
