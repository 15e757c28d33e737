"""Tiny models with random weights, one for each use of caches in mlx-lm's models."""

import importlib

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

_VOCABULARY = 512
_COMMON = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
_ALTERNATING = ["sliding_attention", "full_attention"]
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
_DEEPSEEK = {
    **_LATENT,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_YARN = {
    "type": "yarn",
    "factor": 1.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_GEMMA3N = {
    "model_type": "gemma3n_text",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "intermediate_size": [128] * 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": _VOCABULARY,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": _VOCABULARY,
    "sliding_window": 16,
    "max_position_embeddings": 4096,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1e6,
    "final_logit_softcapping": 30.0,
    "layer_types": _ALTERNATING * 3,
    "activation_sparsity_pattern": [0.0] * 6,
    "hidden_size_per_layer_input": 16,
    "altup_num_inputs": 4,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
    "rope_scaling": None,
}
_LLAMA4 = {
    "model_type": "llama4_text",
    "attention_bias": False,
    "attention_chunk_size": 16,
    "head_dim": 64,
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 128,
    "num_experts_per_tok": 1,
    "num_local_experts": 2,
    "rope_scaling": None,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
}
# The module of mlx_lm.models, and the differences from _COMMON.
FAMILIES = {
    "llama": ("llama", {"hidden_size": 256, "head_dim": 64}),
    "llama, sliding": (
        "llama",
        {
            "hidden_size": 256,
            "head_dim": 64,
            "sliding_window": 16,
            "layer_types": _ALTERNATING * 2,
        },
    ),
    "qwen2": ("qwen2", {"hidden_size": 256}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "phi3": (
        "phi3",
        {"hidden_size": 384, "rope_scaling": None, "original_max_position_embeddings": 4096},
    ),
    "gemma2": ("gemma2", {"head_dim": 64}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "rms_norm_eps": 1e-6,
        },
    ),
    "gemma3n": ("gemma3n", {"text_config": _GEMMA3N}),
    "gemma4": (
        "gemma4_text",
        {
            "num_hidden_layers": 6,
            "head_dim": 64,
            "global_head_dim": 128,
            "rms_norm_eps": 1e-6,
            "num_kv_shared_layers": 2,
            "sliding_window": 16,
            "layer_types": _ALTERNATING * 3,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": _VOCABULARY,
            "attention_k_eq_v": False,
            "num_global_key_value_heads": None,
            "enable_moe_block": False,
            "final_logit_softcapping": 30.0,
            "rope_parameters": {
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
                "full_attention": {
                    "rope_theta": 1e6,
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                },
            },
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "layer_types": _ALTERNATING * 2,
            "rope_scaling": None,
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {**_DEEPSEEK, "topk_method": "gready", "rope_scaling": _YARN},
    ),
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK),
    "deepseek_v32": (
        "deepseek_v32",
        {**_DEEPSEEK, "index_head_dim": 32, "index_n_heads": 4, "index_topk": 16},
    ),
    "minicpm3": (
        "minicpm3",
        {
            **_LATENT,
            "dim_model_base": 64,
            "scale_depth": 1.4,
            "scale_emb": 1.0,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [1.0] * 8,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            "head_dim": 64,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [],
            "moe_intermediate_size": 32,
            "partial_rotary_factor": 0.25,
            "full_attention_interval": 2,
            "norm_topk_prob": True,
        },
    ),
    "llama4": ("llama4", {"text_config": {**_COMMON, **_LLAMA4}}),
    "llama4, text": (
        "llama4_text",
        {
            "head_dim": 64,
            "intermediate_size_mlp": 128,
            "no_rope_layers": [1, 1, 1, 0],
            "use_qk_norm": True,
        },
    ),
    "longcat_flash": (
        "longcat_flash",
        {
            **_LATENT,
            "num_layers": 2,
            "ffn_hidden_size": 128,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "zero_expert_type": "identity",
            "routed_scaling_factor": 1.0,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "attention_method": "MLA",
            "attention_bias": False,
            "norm_topk_prob": False,
            "router_bias": False,
        },
    ),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        {
            "head_dim": 48,
            "v_head_dim": 32,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 48,
            "swa_v_head_dim": 32,
            "hybrid_layer_pattern": [0, 1, 1, 0],
            "moe_layer_freq": [0] * 4,
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "sliding_window_size": 16,
            "swa_rope_theta": 10000.0,
            "layernorm_epsilon": 1e-5,
            "n_routed_experts": 4,
            "n_shared_experts": None,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "n_group": 1,
            "topk_group": 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "routed_scaling_factor": 1.0,
            "moe_intermediate_size": 32,
            "partial_rotary_factor": 0.5,
            "attention_bias": False,
            "attention_value_scale": None,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            "head_dim": 32,
            "mamba_d_ssm": 64,
            "mamba_d_state": 16,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_conv": 4,
            "mamba_chunk_size": 32,
        },
    ),
}


def tiny_model(family: str, **settings) -> nn.Module:
    """A model of ``FAMILIES`` in float32, whose weights are the same at every call."""
    module, changes = FAMILIES[family]
    library = importlib.import_module(f"mlx_lm.models.{module}")
    arguments = {**_COMMON, "model_type": module, **changes, **settings}
    mx.random.seed(0)
    model = library.Model(library.ModelArgs.from_dict(arguments))

    def random(parameter: mx.array) -> mx.array:
        if not mx.issubdtype(parameter.dtype, mx.floating):
            return parameter
        if parameter.ndim < 2:
            return parameter.astype(mx.float32)
        return 0.08 * mx.random.normal(parameter.shape)

    model.update(tree_map(random, model.parameters()))
    mx.eval(model.parameters())
    return model
