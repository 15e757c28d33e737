"""Turn a trained model into models that break careless quantizers of the KV cache.

    python examples/studies/broken_models.py --model examples/tiny-lm

prints the KL divergence of each at a mean of 4 bits: of the plain codec, with the mean of keys
removed, and with allocated bits, without a profile and with one that is measured on other texts.

Each function changes a ``llama`` of mlx-lm in place, or returns a new model. The first three leave
attention with an exact cache as it was, or nearly: queries undo scales, softmax ignores offsets.
"""

import argparse
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3
from simulated import simulated_preset

from mlx_turboquant.lm import texts
from mlx_turboquant.lm.calibrate import calibrate
from mlx_turboquant.lm.compression import give_profile
from mlx_turboquant.lm.loading import prepare_for_device
from mlx_turboquant.lm.profile import find_profile, fingerprint, profile_path
from mlx_turboquant.measure.cache_specs import CacheSpec, preset
from mlx_turboquant.measure.evaluate import Comparison


def add_key_offsets(model: nn.Module, size: float) -> nn.Module:
    """Add +-``size`` to the eight key dimensions of a head that RoPE turns most slowly.

    The key biases of Qwen2.5 do this. A constant in all keys of a head leaves softmax attention
    nearly unchanged.
    """
    for index, attention in enumerate(_attentions(model)):
        heads, dim = attention.n_kv_heads, model.args.head_dim
        signs = mx.random.bernoulli(0.5, (heads, 2, 4), key=mx.random.key(index)) * 2.0 - 1
        offsets = mx.pad(signs * size, [(0, 0), (0, 0), (dim // 2 - 4, 0)]).reshape(-1)
        offsets = offsets.astype(attention.k_proj.weight.dtype)
        attention.k_proj.bias = offsets + attention.k_proj.get("bias", 0)
    return model


def scale_key_channels(model: nn.Module, factors: mx.array) -> nn.Module:
    """Multiply the channels of all keys by ``factors`` (head_dim / 2), one for each rotary pair.

    Queries are divided by them.
    """
    factors = mx.concatenate([factors, factors])
    for attention in _attentions(model):
        _scale_rows(attention.k_proj, mx.tile(factors, attention.n_kv_heads))
        _scale_rows(attention.q_proj, mx.tile(1 / factors, attention.n_heads))
    return model


def add_outlier_channels(model: nn.Module, variance: float = 30, pairs: int = 2) -> nn.Module:
    """Multiply the variance of the key channels of ``pairs`` rotary pairs of a head."""
    places = mx.arange(model.args.head_dim // 2)
    first = model.args.head_dim // 8
    outlier = (places >= first) & (places < first + pairs)
    return scale_key_channels(model, mx.where(outlier, variance**0.5, 1.0))


def with_head_dim(model: nn.Module, head_dim: int) -> nn.Module:
    """The model with heads of half or twice the dimension.

    With twice the dimension it computes the same: rotary pair i becomes pair 2 i, which turns as
    fast. In the other pairs keys are random and queries zero. Half keeps every second pair.
    """
    old = model.args.head_dim
    places = mx.arange(old // 2)
    if head_dim == 2 * old:
        pairs = 2 * places
        rows = mx.concatenate([pairs, pairs + old])
    else:
        rows = mx.concatenate([places[::2], places[::2] + old // 2])
    wider = head_dim > old
    scale = (head_dim / old) ** 0.25  # of the softmax, shared by queries and keys
    arguments = {**vars(model.args), "head_dim": head_dim}
    new = llama.Model(llama.ModelArgs(**arguments))
    weights = dict(tree_flatten(model.parameters()))
    for name in list(weights):
        if not any(part in name for part in ("q_proj", "k_proj", "v_proj", "o_proj")):
            continue
        weight = weights[name].T if "o_proj" in name else weights[name]
        heads = mx.unflatten(weight, 0, (-1, old))
        if wider:
            noise = 0.02 if "k_proj" in name else 0.0
            key = mx.random.key(len(name))
            taken = noise * mx.random.normal((len(heads), head_dim, *heads.shape[2:]), key=key)
            taken = taken.astype(heads.dtype)
            taken[:, rows] = heads
        else:
            taken = heads[:, rows]
        if "q_proj" in name or "k_proj" in name:
            taken = taken * scale
        taken = taken.flatten(0, 1)
        weights[name] = taken.T if "o_proj" in name else taken
    new.load_weights(list(weights.items()))
    return new


def with_query_and_key_norms(model: nn.Module, spread: float) -> nn.Module:
    """A ``qwen3`` with the weights of a ``llama``: queries and keys are normalized, then scaled.

    The gains of keys are log-normal over the rotary pairs with standard deviation ``spread``; those
    of queries are their inverse. The norms change the function of the ``llama``.
    """
    arguments = {**vars(model.args), "model_type": "qwen3", "rope_scaling": None}
    names = qwen3.ModelArgs.__dataclass_fields__
    new = qwen3.Model(qwen3.ModelArgs(**{k: v for k, v in arguments.items() if k in names}))
    new.load_weights(tree_flatten(model.parameters()), strict=False)
    half = model.args.head_dim // 2
    gains = mx.exp(spread * mx.random.normal((half,), key=mx.random.key(0)))
    gains = mx.concatenate([gains, gains])
    for layer in new.layers:
        layer.self_attn.k_norm.weight = 2 * gains
        layer.self_attn.q_norm.weight = 2 / gains
    return new


def _attentions(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn for layer in model.layers]


def _scale_rows(linear: nn.Linear, factors: mx.array) -> None:
    linear.weight = linear.weight * factors[:, None].astype(linear.weight.dtype)
    if "bias" in linear:
        linear.bias = linear.bias * factors.astype(linear.bias.dtype)


def variants(head_dim: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """The changes to a model with this head dimension, by name."""
    return {
        "unmodified": lambda model: model,
        **{
            f"offsets of {size} in 8 dimensions": lambda model, size=size: add_key_offsets(
                model, size
            )
            for size in (5, 20, 80)
        },
        "30 times the variance in 4 channels": add_outlier_channels,
        "300 times": lambda model: add_outlier_channels(model, 300),
        f"head_dim {head_dim // 2}": lambda model: with_head_dim(model, head_dim // 2),
        f"head_dim {2 * head_dim}": lambda model: with_head_dim(model, 2 * head_dim),
        **{
            f"query and key norms, gains spread by {spread}": lambda model, spread=spread: (
                with_query_and_key_norms(model, spread)
            )
            for spread in (0, 1)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--context", type=int, default=2048, help="tokens per text")
    parser.add_argument("--scored", type=int, default=256, help="last tokens to compare")
    parser.add_argument("--samples", type=int, default=4, help="texts")
    args = parser.parse_args()

    def load():
        model, tokenizer = mlx_lm.load(args.model)
        return prepare_for_device(model), tokenizer

    model, tokenizer = load()
    if find_profile([fingerprint(model)]) is not None:
        parser.error(
            f"Remove {profile_path(fingerprint(model))}: it would be used for all of them."
        )
    contexts = texts.contexts(tokenizer, texts.bundled_texts(), args.context + 1, args.samples)
    print("| model | perplexity | plain K4 V4 | K4 V4 | 4 bits without a profile | 4 bits |")
    print("|---|---|---|---|---|---|")
    for name, change in variants(model.args.head_dim).items():
        changed = change(load()[0])
        # The first preset is our codec without removing means.
        specs = [simulated_preset(name) for name in ("turboquant:4", "K4V4", "4")]
        exact, *others = compare(changed, specs, contexts, args.scored)
        give_profile(changed, calibrate(changed, tokenizer))
        others.append(compare(changed, [preset("4")], contexts, args.scored)[1])
        cells = " | ".join(f"{each['kl_mean']:.5f}" for each in others)
        print(f"| {name} | {exact['perplexity']:.2f} | {cells} |", flush=True)


def compare(
    model: nn.Module, specs: list[CacheSpec], contexts: list[list[int]], scored: int
) -> list[dict]:
    """The summaries of the exact cache and of all others, in this order."""
    comparison = Comparison(model, specs)
    for context in contexts:
        comparison.text(context, scored)
    return [scores.summary() for scores in comparison.scores]


if __name__ == "__main__":
    main()
