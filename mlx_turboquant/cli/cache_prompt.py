"""This command processes a prompt and saves its compressed cache, as mlx_lm.cache_prompt does."""

from functools import partial
from types import SimpleNamespace

from mlx_lm import cache_prompt

from ..lm.enable import make_prompt_cache
from ..lm.prompt_cache import check_target, save_prompt_cache
from .loading import load_ready
from .options import given_prompt, parse
from .replaced import replace


def main(arguments: list[str]) -> None:
    """Run mlx-lm's own command with its parser, loader, cache and saving wrapped."""
    parser = cache_prompt.setup_arg_parser()
    parser.prog, parser.description = "mlx_turboquant cache_prompt", __doc__
    args, settings = parse(parser, arguments)
    check_target(args.prompt_cache_file)  # before the prompt is processed
    prompt = given_prompt(args.prompt)
    models = []

    def make_cache(model, max_kv_size):
        models.append(model)
        return make_prompt_cache(model, settings)

    def save(file, cache, metadata):
        print(f"Saved {save_prompt_cache(file, cache, *models, metadata)}")

    replace(
        cache_prompt,
        sys=SimpleNamespace(stdin=prompt),
        setup_arg_parser=lambda: SimpleNamespace(parse_args=lambda: args),
        load=partial(load_ready, cache_prompt.load, args, settings),
        make_prompt_cache=make_cache,
        save_prompt_cache=save,
    )
    cache_prompt.main()
