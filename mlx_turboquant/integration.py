"""Switching compression on and off for a model of mlx-lm."""

import logging
import weakref
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from . import kernels
from .attention import MAX_DECODE_ROWS, decode_attention
from .batch_cache import CausalMask
from .cache import DEFAULT_SINK_TOKENS, DEFAULT_WINDOW, TurboQuantKVCache, fused_models
from .codebook import MAX_BITS, check_bits
from .kernels import BLOCK
from .latent_cache import TurboQuantLatentCache
from .method_cache import MethodKVCache, check_codec
from .protection import Limits, relative_error, single_precision
from .report import flat_caches
from .turns import announce

# Bits of keys and values, of which keys need more; the last eighth of the layers has one more of
# each. Measured with examples/sweep_presets.py, see docs/quality.md.
PRESETS = {2: (3, 1), 2.5: (3, 2), 3: (4, 2), 3.5: (4, 3), 4: (4, 4), 4.5: (5, 4)}

# The largest demands that a layer may have at the bits of its preset. Those of trained models
# without large biases, gains or outliers are below, see docs/quality.md.
_DEMANDS = (3.0, 2.0)
# KL divergence of the output for that of the weights of a layer, and for the squared error of its
# outputs: the largest of the trained models in docs/quality.md. The last layers have no other
# after them that would smooth an error out.
_SENSITIVITY = (0.01, 0.01)
_LAST_SENSITIVITY = (0.07, 0.03)
_DIM = 128  # whose relative errors stand for those of any dimension
_AUTO = "auto"
_AUTO_LEAST = (2, 1)
DEFAULT_KL_BUDGET = 0.005

_HOOKED_NAME = "scaled_dot_product_attention"

_log = logging.getLogger("mlx_turboquant")


def split_bits(
    bits: float | str = 4,
    key_bits: int | None = None,
    value_bits: int | None = None,
    evenly: bool = False,
) -> tuple[int, int]:
    """Key and value bits of a setting; ``key_bits`` and ``value_bits`` override the preset.

    With ``evenly`` there is no preset: keys have one bit more at a half and as many otherwise. With
    "auto" they are 8, for layers that cannot choose by themselves.

    Raises:
        ValueError: ``bits`` is neither "auto" nor 1 to 8 in half steps, or a side is not 1 to 8.
    """
    if bits == _AUTO:
        if (key_bits, value_bits) != (None, None):
            raise ValueError("auto chooses the bits of keys and values: leave them out.")
        return MAX_BITS, MAX_BITS
    if isinstance(bits, str):
        raise ValueError(f"{bits!r} bits are not supported: use a number or {_AUTO!r}.")
    if bits not in [half / 2 for half in range(2, 17)]:
        raise ValueError(f"{bits:g} bits are not supported: use 1 to 8 in steps of a half.")
    split = (int(bits + 0.5), int(bits))
    if not evenly:
        split = PRESETS.get(bits, split)
    key_bits = split[0] if key_bits is None else key_bits
    value_bits = split[1] if value_bits is None else value_bits
    check_bits(key_bits)
    check_bits(value_bits)
    return key_bits, value_bits


def make_prompt_cache(
    model: nn.Module,
    bits: float | str = 4,
    *,
    key_bits: int | None = None,
    value_bits: int | None = None,
    protect: bool = True,
    kl_budget: float | None = None,
    window: int = DEFAULT_WINDOW,
    sink_tokens: int = DEFAULT_SINK_TOKENS,
    max_size: int | None = None,
    seed: int = 0,
    backend: str | None = None,
    codec: str | None = None,
) -> list[Any]:
    """A compressed ``prompt_cache`` for mlx-lm: one cache per layer of ``model``.

    Layers for which mlx-lm would make a plain ``KVCache``, alone or in a ``CacheList``, are
    compressed, all others are left as they are; so are layers that choose tokens by an index of
    their own (DeepSeek's sparse attention). Also lets the model's attention read compressed
    tokens, which :func:`disable` undoes.

    Args:
        model: A model of mlx-lm.
        bits: Bits per value, 1 to 8 in half steps; how they are split is in ``PRESETS``. Or
            "auto": each layer chooses its own for a ``kl_budget``.
        key_bits: Bits per value of the keys, in place of the preset's.
        value_bits: Bits per value of the values, in place of the preset's.
        protect: Let a layer have more bits, up to 8, where the keys and queries of the prompt or
            its values demand it.
        kl_budget: KL divergence of the next-token distribution, in nats, that "auto" aims at;
            .005 if it is None.
        window: Recent tokens that stay exact.
        sink_tokens: First tokens that stay exact.
        max_size: Tokens that a layer holds at most, after which the oldest are forgotten.
        seed: Of the random rotation.
        backend: "metal", "cuda" or "reference" (plain MLX operations), for the whole process; None
            leaves the choice to ``MLX_TURBOQUANT_BACKEND`` and the machine.
        codec: One of :data:`.methods.METHODS` in place of ours, or two for keys and values, as
            "qjl+affine". For study: keys and values of all layers have the same bits (keys one more
            at a half), attention gets dequantized tokens, and there is neither protection nor a
            ``max_size`` nor batches nor files.

    Raises:
        ValueError: a setting out of range, or no layer that could be compressed.
    """
    if backend is not None:
        kernels.force_backend(backend)
    settings = {"window": window, "sink_tokens": sink_tokens, "max_size": max_size, "seed": seed}
    is_preset = bits != _AUTO and key_bits is None and value_bits is None
    if codec is not None:
        settings["codec"] = codec
        is_preset = False
    split = check_settings(bits, key_bits, value_bits, protect, kl_budget, **settings)
    caches = plain_caches(model)
    if codec is not None:
        _check_dims(model, codec, split)
    splits = [split] * len(caches)
    if is_preset:
        splits = [_with_more(split, is_last(i, len(caches))) for i in range(len(caches))]
    limits: list[Limits | None] = [None] * len(caches)
    if bits == _AUTO:
        limits = _budget_limits(kl_budget or DEFAULT_KL_BUDGET, len(caches))
    elif protect and codec is None:
        limits = [_preset_limits(pair) for pair in splits]
    compressed = _compressed(model, caches, splits, limits, settings)
    if not _compressed_layers(compressed):
        kinds = ", ".join(sorted({type(cache).__name__ for cache in caches})) or "none"
        raise ValueError(
            f"No layer of this model can be compressed (its caches: {kinds}): "
            "use a model with plain KVCache layers."
        )
    connect(model, compressed)
    return compressed


def check_settings(
    bits: float | str = 4,
    key_bits: int | None = None,
    value_bits: int | None = None,
    protect: bool = True,
    kl_budget: float | None = None,
    **settings: Any,
) -> tuple[int, int]:
    """The bits of keys and values of arguments of :func:`make_prompt_cache`.

    Raises:
        ValueError: arguments that are out of range or do not fit together.
    """
    split = split_bits(bits, key_bits, value_bits, evenly="codec" in settings)
    if bits == _AUTO and "codec" in settings:
        raise ValueError(f"Codec {settings['codec']} cannot choose its bits: use a number of bits.")
    _cache_class(settings)(*split, **settings)
    if bits == _AUTO and not protect:
        raise ValueError("auto is protection: leave out the option that switches it off.")
    if kl_budget is not None and (bits != _AUTO or not kl_budget > 0):
        raise ValueError(
            f"A KL budget of {kl_budget} with {bits} bits is not possible: "
            "use a positive number of nats with auto."
        )
    return split


def _cache_class(settings: dict[str, Any]) -> type[TurboQuantKVCache]:
    return MethodKVCache if "codec" in settings else TurboQuantKVCache


def _check_dims(model: nn.Module, codec: str, split: tuple[int, int]) -> None:
    """Raise ValueError unless ``codec`` can have the keys and values of every layer.

    A token is read only so far that the shapes are known: nothing is computed.
    """
    caches = plain_caches(model)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    for cache in flat_caches(caches):
        if type(cache) is mlx_lm_cache.KVCache and cache.keys is not None:
            check_codec(codec, *split, (cache.keys.shape[-1], cache.values.shape[-1]))


def _preset_limits(split: tuple[int, int]) -> Limits:
    """What the demands of most models are at these bits is allowed for those of all."""
    errors = (x * relative_error(_DIM, b) for x, b in zip(_DEMANDS, split))
    return Limits(*map(single_precision, errors), *split)


def _with_more(split: tuple[int, int], more: bool) -> tuple[int, int]:
    """The bits of a layer of a preset, one more of both if it is to have ``more``."""
    key_bits, value_bits = (min(bits + more, MAX_BITS) for bits in split)
    return key_bits, value_bits


def _budget_limits(budget: float, layers: int) -> list[Limits]:
    """The same part of the budget for keys and for values of every layer.

    An error falls by the same factor with every bit, so this is the cheapest division.
    """
    part = budget / (2 * layers)
    sensitivities = [
        _LAST_SENSITIVITY if is_last(i, layers) else _SENSITIVITY for i in range(layers)
    ]
    errors = [[single_precision(part / x) for x in pair] for pair in sensitivities]
    return [Limits(*pair, *_AUTO_LEAST) for pair in errors]


def is_last(index: int, layers: int) -> bool:
    """Whether a layer is one of the last eighth, or the last."""
    return index >= layers - max(1, layers // 8)


def enable(model: nn.Module, bits: float | str = 4, **settings) -> nn.Module:
    """Let every cache that mlx-lm makes for ``model`` be compressed; returns the model.

    Takes the arguments of :func:`make_prompt_cache` and raises its errors. Where there are kernels,
    the model runs over some fifty tokens, which compiles those that it needs and compares them
    with plain MLX; a warning names what is replaced.
    """
    make_prompt_cache(model, bits, **settings)  # refuses a bad setting now, not at generation
    if kernels.backend() != "reference":
        _use_kernels_once(model, bits, settings)
    replaced = model.__dict__.get("make_cache")
    if isinstance(replaced, _MakeCompressedCache):
        replaced = replaced.replaced
    model.make_cache = _MakeCompressedCache(model, bits, settings, replaced)
    return model


def disable(model: nn.Module) -> nn.Module:
    """Undo :func:`enable` and what :func:`make_prompt_cache` did to ``model``; returns the model.

    Compressed caches that exist keep working, without the fast path.
    """
    maker = model.__dict__.get("make_cache")
    if isinstance(maker, _MakeCompressedCache):
        del model.make_cache
        if maker.replaced is not None:
            model.make_cache = maker.replaced
    fused_models.discard(id(model))
    for scope in _attention_scopes(model):
        hook = scope[_HOOKED_NAME]
        if isinstance(hook, _AttentionHook):
            hook.models.discard(id(model))
            if not hook.models:
                scope[_HOOKED_NAME] = hook.original
    return model


def enabled_settings(model: nn.Module) -> dict[str, Any] | None:
    """The settings, besides the bits, that :func:`enable` was given; None without it."""
    maker = model.__dict__.get("make_cache")
    return maker.settings if isinstance(maker, _MakeCompressedCache) else None


def _use_kernels_once(model: nn.Module, bits: float | str, settings: dict[str, Any]) -> None:
    """A chunk to pack, one that reads packed tokens densely, and a decode step."""
    cache = make_prompt_cache(model, bits, **{**settings, "window": 0, "sink_tokens": 0})
    for tokens in (BLOCK, MAX_DECODE_ROWS + 1, 1):
        mx.eval(model(mx.ones((1, tokens), mx.int32), cache=cache))


def _compressed(
    model: nn.Module,
    caches: list[Any],
    splits: list[tuple[int, int]],
    limits: list[Limits | None],
    settings: dict[str, Any],
) -> list[Any]:
    compress = _Compression(model, settings)
    return [compress(*each) for each in zip(caches, _layers(model, caches), splits, limits)]


class _Compression:
    """Puts a compressed cache in the place of a plain one, as the layer needs it."""

    def __init__(self, model, settings):
        self.settings = settings
        self.shared = any(_calls(module, "keys_and_values") for module in model.modules())

    def __call__(
        self, cache: Any, layer: nn.Module, bits: tuple[int, int], limits: Limits | None
    ) -> Any:
        modules = [module for _, module in layer.named_modules()]
        if any("indexer" in module for module in modules):
            return cache
        if type(cache) is mlx_lm_cache.CacheList:
            return mlx_lm_cache.CacheList(
                *(self(part, layer, bits, limits) for part in cache.caches)
            )
        if type(cache) is not mlx_lm_cache.KVCache:
            return cache
        # Multi-head latent attention, with the projections of keys and values absorbed. Prompts
        # are read with keys and values of their own, so that nothing is known of its queries.
        if any("embed_q" in module for module in modules):
            if "codec" in self.settings:
                codec = self.settings["codec"]
                raise ValueError(f"Codec {codec} is not for latent attention: leave it out.")
            return TurboQuantLatentCache(max(bits), **self.settings)
        # Attention that is not hooked never shows its queries.
        limits = limits if any(_calls(module, _HOOKED_NAME) for module in modules) else None
        compressed = _cache_class(self.settings)(*bits, **self.settings, limits=limits)
        compressed.shared = self.shared
        return compressed


def _calls(module: nn.Module, name: str) -> bool:
    """Whether the module's own ``__call__`` uses a function or method of this name."""
    code = getattr(type(module).__call__, "__code__", None)
    return code is not None and name in code.co_names


def _layers(model: nn.Module, caches: list[Any]) -> list[nn.Module]:
    """The layer of each cache, or the whole model where there are not as many."""
    layers = getattr(model, "layers", [])
    return layers if len(layers) == len(caches) else [model] * len(caches)


def _compressed_layers(cache: list[Any]) -> list[TurboQuantKVCache]:
    return [layer for layer in flat_caches(cache) if isinstance(layer, TurboQuantKVCache)]


class _MakeCompressedCache:
    """``model.make_cache`` of an enabled model."""

    def __init__(self, model, bits, settings, replaced):
        self.model = weakref.ref(model)
        self.bits = bits
        self.settings = settings
        self.replaced = replaced

    def __call__(self) -> list[Any]:
        return make_prompt_cache(self.model(), self.bits, **self.settings)


def plain_caches(model: nn.Module) -> list[Any]:
    """The caches that mlx-lm makes for a model that is not enabled."""
    maker = model.__dict__.get("make_cache")
    if not isinstance(maker, _MakeCompressedCache):
        return mlx_lm_cache.make_prompt_cache(model)
    if maker.replaced is not None:
        return maker.replaced()
    if hasattr(type(model), "make_cache"):
        return type(model).make_cache(model)
    return [mlx_lm_cache.KVCache() for _ in model.layers]


class _AttentionHook:
    """Takes the place of ``scaled_dot_product_attention`` in the module of a model.

    Decode steps over packed tokens read them as they are. Everything else goes to the original
    function, which gets dense arrays.
    """

    def __init__(self, original):
        self.original = original
        self.models: set[int] = set()

    def __call__(self, queries, keys, values, *arguments, **keywords):
        tokens = getattr(keys, "tokens", None)
        if tokens is None or tokens is not getattr(values, "tokens", None):
            return self.original(queries, keys, values, *arguments, **keywords)
        if tokens.keys.count and queries.shape[2] <= MAX_DECODE_ROWS:
            return self._decode(queries, tokens, *arguments, **keywords)
        output = self.original(queries, keys, values, *arguments, **keywords)
        if queries.shape[2] > MAX_DECODE_ROWS:
            announce(output)
        self._protect(queries, *arguments, **keywords)
        return output

    @staticmethod
    def _protect(queries, cache, scale, mask=None, sinks=None):
        """The cache learns from the queries how many bits the layer needs."""
        if hasattr(cache, "protect"):
            cache.protect(queries, scale, mask)

    @staticmethod
    def _decode(queries, tokens, cache, scale, mask, sinks=None):
        if type(mask) is CausalMask:
            mask = None if queries.shape[2] == 1 else "causal"
        return decode_attention(queries, tokens, scale, mask, sinks)


def _attention_scopes(model: nn.Module) -> list[dict[str, Any]]:
    """The global scopes in which the layers of ``model`` look their attention function up."""
    calls = {type(module).__call__ for module in model.modules()}
    scopes = [getattr(call, "__globals__", {}) for call in calls]
    return [scope for scope in scopes if _HOOKED_NAME in scope]


def connect(model: nn.Module, cache: list[Any]) -> None:
    """Let the attention of ``model`` read compressed tokens as they are, those of ``cache``."""
    _hook_attention(model)
    if id(model) not in _needs_arrays:
        _needs_arrays[id(model)] = _raises_without_arrays(model)
        weakref.finalize(model, _needs_arrays.pop, id(model), None)
        weakref.finalize(model, fused_models.discard, id(model))
    if not _needs_arrays[id(model)]:
        fused_models.add(id(model))
    for number, layer in enumerate(_compressed_layers(cache)):
        layer.model_id, layer.layer = id(model), number


# Of models, by their ids.
_needs_arrays: dict[int, bool] = {}


def _raises_without_arrays(model: nn.Module) -> bool:
    """Whether anything but hooked attention uses the keys and values of one new token.

    Tried on a token after a packed block, read in steps that are not evaluated: nothing of the
    model is. What is not an array raises when it is used as one.
    """
    caches = plain_caches(model)
    settings = {"window": 0, "sink_tokens": 0}
    count = len(caches)
    cache = _compressed(model, caches, [(4, 4)] * count, [None] * count, settings)
    for layer in _compressed_layers(cache):
        layer.model_id = id(model)
    for _ in range(BLOCK // MAX_DECODE_ROWS):
        model(mx.zeros((1, MAX_DECODE_ROWS), mx.int32), cache=cache)
    fused_models.add(id(model))
    try:
        model(mx.zeros((1, 1), mx.int32), cache=cache)
        return False
    except (TypeError, AttributeError) as error:
        _log.info("Decoding makes dense keys and values as well, because of: %s", error)
        return True
    finally:
        fused_models.discard(id(model))


def _hook_attention(model: nn.Module) -> None:
    for scope in _attention_scopes(model):
        if not isinstance(scope[_HOOKED_NAME], _AttentionHook):
            scope[_HOOKED_NAME] = _AttentionHook(scope[_HOOKED_NAME])
        models = scope[_HOOKED_NAME].models
        if id(model) not in models:
            models.add(id(model))
            weakref.finalize(model, models.discard, id(model))
