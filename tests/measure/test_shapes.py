import mlx.core as mx
import pytest
from conftest import REPOSITORY
from mlx.utils import tree_flatten
from tokens import random_tokens

from mlx_turboquant import make_prompt_cache
from mlx_turboquant.cli.benchmark import shape_config
from mlx_turboquant.lm.loading import prepare_for_device, weight_nbytes
from mlx_turboquant.measure.shapes import SHAPES, random_model, unloaded_model

# Parameters of the published models, in billions; scales and biases of 4-bit groups add 1/32.
PARAMETERS = {
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "llama-3.1-8b": 8.03,
    "llama-3.3-70b": 70.55,
    "mistral-7b": 7.25,
    "mistral-small-24b": 23.57,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-32b": 32.76,
    "qwen3-30b-a3b": 30.53,
    "gemma-3-12b": 11.77,
    "gpt-oss-20b": 20.91,
}
SMALL = {
    **SHAPES["qwen3-30b-a3b"],
    **{"hidden_size": 128, "num_hidden_layers": 2, "num_experts": 8, "vocab_size": 512},
    **{"moe_intermediate_size": 64, "intermediate_size": 256, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 64},
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_of_its_model(name):
    parameters = [array for _, array in tree_flatten(unloaded_model(SHAPES[name]).parameters())]
    billions = sum(array.size for array in parameters) / 1e9
    assert billions == pytest.approx(PARAMETERS[name], rel=0.01)  # published numbers are rounded


def test_random_weights_have_four_bits_and_are_not_evaluated():
    model = random_model(SHAPES["llama-3.3-70b"])
    # 4.5 bits a weight and 16 for the few others.
    assert weight_nbytes(model) == pytest.approx(70.55e9 * 4.5 / 8, rel=0.01)


def test_a_random_model_keeps_the_size_of_what_it_reads():
    model = prepare_for_device(random_model(SMALL))
    cache = make_prompt_cache(model, 4, window=16)
    tokens = random_tokens(1, 200, vocabulary=512)
    logits = model(tokens, cache=cache)
    assert mx.isfinite(logits).all()
    # Outputs of a normalised vector and weights of variance 1 / inputs.
    assert 0.3 < mx.std(logits).item() < 3


def test_a_configuration_says_how_its_weights_are_quantized():
    config = shape_config(str(REPOSITORY / "examples" / "tiny-lm" / "config.json"))
    model = unloaded_model(config)
    assert model.model.layers[0].mlp.up_proj.bits == config["quantization"]["bits"] == 8


def test_a_configuration_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'llama-9' is not a shape .* use the config.json"):
        shape_config("llama-9")
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="it has no model_type"):
        shape_config(str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match="not supported"):
        unloaded_model({"model_type": "no-such-model"})
    with pytest.raises(ValueError, match="The configuration is not one of a model of mlx-lm"):
        unloaded_model({"model_type": "llama"})
