"""Models of known architectures with random weights: speed and memory without a download."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes


def _shape(
    kind: str, hidden: int, intermediate: int, layers: int, heads: int, **others: Any
) -> dict[str, Any]:
    widths = {"hidden_size": hidden, "intermediate_size": intermediate}
    counts = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8}
    limit = {"max_position_embeddings": 131072, "tie_word_embeddings": False}
    return {"model_type": kind, **widths, **counts, **limit, **others}


def _llama(*sizes: int, **others: Any) -> dict[str, Any]:
    return _shape("llama", *sizes, **{"rms_norm_eps": 1e-5, "rope_theta": 500000.0, **others})


def _llama_3(*sizes: int, factor: float = 8.0, **others: Any) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return _llama(*sizes, vocab_size=128256, rope_scaling=scaling, **others)


def _qwen3(*sizes: int, kind: str = "qwen3", **others: Any) -> dict[str, Any]:
    common = {"head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6}
    common |= {"rope_theta": 1000000.0, "max_position_embeddings": 40960}
    return _shape(kind, *sizes, **common, **others)


def _hybrid(*sizes: int, kind: str = "qwen3_5", **others: Any) -> dict[str, Any]:
    """Gated delta nets in three of four layers, and attention over all tokens in the fourth."""
    common = {"head_dim": 256, "vocab_size": 248320, "rms_norm_eps": 1e-6}
    common |= {"full_attention_interval": 4, "max_position_embeddings": 262144}
    # Qwen writes "rope_type"; mlx-lm would rename it, within this very dictionary.
    rope = {"type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    heads = {"linear_num_key_heads": 16, "linear_num_value_heads": 48}
    dims = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}
    return _shape(kind, *sizes, **common, **heads, **dims, rope_parameters=rope, **others)


_TIED = {"tie_word_embeddings": True}
_SHORT = {"max_position_embeddings": 32768}
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
_EXPERTS |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
_GEMMA_3 = {"head_dim": 256, "vocab_size": 262208, "sliding_window": 1024}
_GEMMA_3 |= {"sliding_window_pattern": 6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
_YARN |= {"original_max_position_embeddings": 4096}
_GPT_OSS = {"head_dim": 64, "vocab_size": 201088, "num_local_experts": 32}
_GPT_OSS |= {"num_experts_per_tok": 4, "sliding_window": 128, "rope_theta": 150000}
_HYBRID_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 10, "moe_intermediate_size": 640}
_HYBRID_EXPERTS |= {"shared_expert_intermediate_size": 640}
_MUSE_GLIMMER = {"head_dim": 128, "vocab_size": 202048, "sliding_window": 2048}

# The published configurations of these models, as far as they affect shapes.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama_3(2048, 8192, 16, 32, factor=32.0, **_TIED),
    "llama-3.2-3b": _llama_3(3072, 8192, 28, 24, factor=32.0, head_dim=128, **_TIED),
    "llama-3.1-8b": _llama_3(4096, 14336, 32, 32),
    "llama-3.3-70b": _llama_3(8192, 28672, 80, 64),
    "mistral-7b": _llama(4096, 14336, 32, 32, vocab_size=32768, rope_theta=1e6, **_SHORT),
    "mistral-small-24b": _llama(
        5120, 32768, 40, 32, head_dim=128, vocab_size=131072, rope_theta=1e8, **_SHORT
    ),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, **_TIED),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "qwen3-30b-a3b": _qwen3(
        2048, 6144, 48, 32, kind="qwen3_moe", **{**_EXPERTS, "num_key_value_heads": 4}
    ),
    "gemma-3-12b": _shape("gemma3_text", 3840, 15360, 48, 16, **_GEMMA_3, **_TIED),
    "gpt-oss-20b": _shape("gpt_oss", 2880, 2880, 24, 64, **_GPT_OSS, rope_scaling=_YARN),
    "qwen3.8-27b": _hybrid(5120, 17408, 64, 24, num_key_value_heads=4),
    # Three of four layers have a sliding window.
    "muse-glimmer-30b": _shape(
        "muse_glimmer", 6656, 19968, 52, 32, num_key_value_heads=2, **_MUSE_GLIMMER
    ),
    # Not a published model: it has the heads and widths of Qwen3.8-Flash-Next, which mlx-lm does
    # not support, and a quarter of its experts. It lacks the index of tokens, hyper-connections
    # and table of n-grams.
    "hybrid-24-2": _hybrid(
        2560, 640, 48, 24, kind="qwen3_5_moe", num_key_value_heads=2, **_HYBRID_EXPERTS
    ),
}


def unloaded_model(config: dict[str, Any]) -> nn.Module:
    """The model of an mlx-lm ``config.json`` as shapes only: no array of it is evaluated.

    Its weights are quantized as the configuration says, otherwise bfloat16. ValueError for a
    configuration that mlx-lm has no model for.
    """
    try:
        model_class, arguments = _get_classes(config)
        model = model_class(arguments.from_dict(config))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The configuration is not one of a model of mlx-lm ({type(error).__name__}: {error}): "
            "use the config.json of such a model."
        ) from error
    if config.get("tie_word_embeddings") and "lm_head" in model:
        # These models tie embeddings only once they load weights without a head.
        model.tie_word_embeddings = True
        model.pop("lm_head")
    model.set_dtype(mx.bfloat16)
    if config.get("quantization") is not None:
        _quantize(model, config)
    return model.eval()


def random_model(config: dict[str, Any]) -> nn.Module:
    """The model of a configuration with random weights of 4 bits, in groups of 64.

    Outputs are as large as inputs, as in a trained model, and experts are chosen evenly. The
    weights are not evaluated.
    """
    model = unloaded_model({**config, "quantization": {"group_size": 64, "bits": 4}})
    for module in model.modules():
        if "scales" in module:
            _fill(module)
        elif isinstance(module, nn.Conv1d):
            # With the variance 1 / inputs; MLX's own weights count the inputs of all groups.
            shape = module.weight.shape
            scale = (shape[1] * shape[2]) ** -0.5
            module.weight = mx.random.normal(shape, mx.bfloat16, scale=scale)
    return model


def _quantize(model: nn.Module, config: dict[str, Any]) -> None:
    quantization = config["quantization"]
    usual = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    group_size, mode = quantization["group_size"], quantization.get("mode", "affine")

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size:
            return False
        # The configuration may have entries for single layers.
        return quantization[path] if path in quantization else usual(path, module)

    nn.quantize(model, group_size, quantization["bits"], mode=mode, class_predicate=predicate)


def _fill(module: nn.Module) -> None:
    """Fill with random codes, and with scales that give weights the variance 1 / inputs."""
    half_words = (*module.weight.shape[:-1], 2 * module.weight.shape[-1])
    module.weight = mx.random.randint(0, 2**16, half_words).astype(mx.uint16).view(mx.uint32)
    inputs = module.weight.shape[-1] * 32 // module.bits
    scale = 12**0.5 / 2**module.bits / inputs**0.5
    module.scales = mx.full(module.scales.shape, scale, mx.bfloat16)
    if "biases" in module:
        offset = -scale * (2**module.bits - 1) / 2
        module.biases = mx.full(module.scales.shape, offset, mx.bfloat16)
