"""``mlx_turboquant cache_prompt``: mlx-lm's command, with a compressed cache."""

import importlib
from types import SimpleNamespace

from ..lm.enable import make_prompt_cache
from ..lm.loading import model_errors, prepare_for_device
from ..lm.prompt_cache import check_target, save_prompt_cache
from .calibrate import ensure_profile
from .options import add_cache_options, cache_settings, warn_without_effect
from .replaced import replaced

_mlx_lm_cache_prompt = importlib.import_module("mlx_lm.cache_prompt")


def main(arguments: list[str]) -> None:
    """Run mlx-lm's own command with its parser, loader, cache and saving wrapped."""
    parser = _mlx_lm_cache_prompt.setup_arg_parser()
    parser.prog, parser.description = "mlx_turboquant cache_prompt", __doc__
    add_cache_options(parser)
    args = parser.parse_args(arguments)
    settings = cache_settings(args)
    defaults = ("kv_group_size", "quantized_kv_start")
    warn_without_effect(args, {option: parser.get_default(option) for option in defaults})
    args.kv_bits = None  # mlx-lm would convert the layers that are not compressed
    check_target(args.prompt_cache_file)  # before the prompt is processed
    models = []

    def load(*positional, **keywords):
        with model_errors(positional[0]):
            model, *rest = _load(*positional, **keywords)
        models.append(prepare_for_device(model))
        ensure_profile(model, rest[0], args, settings)
        return (model, *rest)

    def save(file, cache, metadata):
        print(f"Saved {save_prompt_cache(file, cache, *models, metadata)}")

    _load = _mlx_lm_cache_prompt.load
    with replaced(
        _mlx_lm_cache_prompt,
        setup_arg_parser=lambda: SimpleNamespace(parse_args=lambda: args),
        load=load,
        make_prompt_cache=lambda model, max_kv_size: make_prompt_cache(model, **settings),
        save_prompt_cache=save,
    ):
        _mlx_lm_cache_prompt.main()
