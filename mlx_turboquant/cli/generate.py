"""This command completes a prompt as mlx_lm.generate does, with a compressed cache."""

import importlib
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..lm.compression import compression_of
from ..lm.enable import make_prompt_cache
from ..lm.prompt_cache import check_identity, load_prompt_cache
from ..lm.prompt_store import PromptStore, reading
from ..lm.report import cache_report
from ..lm.settings import Settings
from .loading import load_ready
from .options import add_store_options, given_prompt, given_settings, open_store, parse
from .replaced import replace
from .signals import stored_at_the_end

# The package mlx_lm hides the module behind the function of the same name.
_mlx_lm_generate = importlib.import_module("mlx_lm.generate")
_load, _generate = _mlx_lm_generate.load, _mlx_lm_generate.generate


def main(arguments: list[str]) -> None:
    """Run mlx-lm's own command with its parser, loader and generation wrapped."""
    parser = _mlx_lm_generate.setup_arg_parser()
    parser.prog, parser.description = "mlx_turboquant generate", __doc__
    text = "Show the cache of each kind of layer"
    parser.add_argument("-v", dest="report", action="store_true", help=text)
    add_store_options(parser)
    args, settings = parse(parser, arguments)
    if args.draft_model is not None and settings.max_size is not None:
        raise ValueError("--draft-model cannot be used with --max-kv-size: leave one of them out.")
    prompt = given_prompt(args.prompt)
    store = open_store(args)
    if args.prompt_cache_file is not None:
        if given_settings(args) or args.profile is not None:
            raise ValueError(
                f"{args.prompt_cache_file} was saved with settings of its own: "
                "leave out the options of the compressed cache."
            )
        args.profile, args.calibrate = None, False  # the file fixes the bits
    run = _Run(args, settings, store)
    replace(
        _mlx_lm_generate,
        sys=SimpleNamespace(stdin=prompt),
        setup_arg_parser=lambda: SimpleNamespace(parse_args=lambda: args),
        load=run.load,
        load_prompt_cache=run.load_prompt_cache,
        generate=run.generate,
    )
    with stored_at_the_end(store):
        _mlx_lm_generate.main()


class _Run:
    """The functions that replace mlx-lm's own in one run of its command."""

    def __init__(self, args: Namespace, settings: Settings, store: PromptStore | None):
        self.args = args
        self.settings = settings
        self.store = store
        self.saved: tuple[list[Any], dict[str, str]] | None = None

    def load(self, *positional, **keywords):
        model, *rest = load_ready(_load, self.args, self.settings, *positional, **keywords)
        if self.saved is not None:
            cache, metadata = self.saved
            check_identity(self.args.prompt_cache_file, metadata, model)
            compression_of(model).connect(cache)
            self.saved = None  # not for a draft model, which is loaded next
        return (model, *rest)

    def load_prompt_cache(self, file: str, return_metadata: bool):
        """Load a cache; mlx-lm does so before it loads the model, so ``load`` checks the model."""
        cache, metadata = load_prompt_cache(file, return_metadata=True)
        self.saved = cache, metadata
        # The identity tells whether it is the right model, so its name may have changed.
        model = self.args.model or metadata.get("model")
        return cache, {"tokenizer_config": "{}", **metadata, "model": model}

    def generate(self, model, tokenizer, prompt, *, prompt_cache, draft_model, **keywords):
        store = self.store if prompt_cache is None and draft_model is None else None
        if prompt_cache is None:
            prompt_cache = make_prompt_cache(model, self.settings)
            if draft_model is not None:
                prompt_cache += make_prompt_cache(draft_model, self.settings)
        name = Path(self.args.model or "").name
        options = {"name": name, "keeps_prompt": True}
        known_part = reading(store, model, tokenizer, list(prompt), prompt_cache, **options)
        with known_part as (prompt_cache, known, progress):
            if store is not None:
                print(f"Prompt: {known:,} of {len(prompt):,} tokens from the store")
            keywords |= {"prompt_cache": prompt_cache, "draft_model": draft_model}
            keywords["prompt_progress_callback"] = progress
            text = _generate(model, tokenizer, prompt[known:], **keywords)
        if self.args.verbose:
            report = cache_report(prompt_cache, model)
            if self.args.report:
                print(report)
            print(f"Cache: {report.size}")
        return text
