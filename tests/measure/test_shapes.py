import mlx.core as mx
import pytest
from conftest import REPOSITORY
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, RotatingKVCache
from tokens import random_tokens

from mlx_turboquant import make_prompt_cache
from mlx_turboquant.cache.single import TurboQuantKVCache
from mlx_turboquant.cli.benchmark import shape_config
from mlx_turboquant.lm.allocation import Vectors
from mlx_turboquant.lm.compressible import compressible_caches, text_arguments
from mlx_turboquant.lm.compression import treat_layers_alike
from mlx_turboquant.lm.loading import prepare_for_device, weight_nbytes
from mlx_turboquant.measure.cache_specs import EXACT
from mlx_turboquant.measure.footprint import chunk_nbytes, footprint
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
    "qwen3.8-27b": 26.90,
    "muse-glimmer-30b": 27.9,
    "hybrid-24-2": 34.41,  # computed by hand: there is no published model
}
NARROW = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512, "num_hidden_layers": 4}
FEW_EXPERTS = {"num_experts": 16, "moe_intermediate_size": 64}
FEW_STATES = {"linear_num_key_heads": 2, "linear_num_value_heads": 6}
SMALL = {
    "qwen3-30b-a3b": {**FEW_EXPERTS, "num_hidden_layers": 2, "head_dim": 64},
    "qwen3.8-27b": FEW_STATES,
    "hybrid-24-2": {**FEW_EXPERTS, **FEW_STATES, "shared_expert_intermediate_size": 64},
    "muse-glimmer-30b": {"sliding_window": 64},
}


def small(name: str) -> dict:
    """A shape of few layers and small widths; attention may keep its heads."""
    return {**SHAPES[name], **NARROW, **SMALL[name]}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_of_its_model(name):
    parameters = [array for _, array in tree_flatten(unloaded_model(SHAPES[name]).parameters())]
    billions = sum(array.size for array in parameters) / 1e9
    assert billions == pytest.approx(PARAMETERS[name], rel=0.01)  # published numbers are rounded


def test_the_hybrid_of_24_on_2_heads_has_a_quarter_of_the_experts_of_qwen_3_8_flash_next():
    config = {**SHAPES["hybrid-24-2"], "num_experts": 512}
    parameters = [array for _, array in tree_flatten(unloaded_model(config).parameters())]
    # 125 billion without its table of n-grams.
    assert sum(array.size for array in parameters) / 1e9 == pytest.approx(125, rel=0.01)


@pytest.mark.parametrize(
    "name, compressed, layers, query_heads, key_heads, dim, others",
    [
        ("qwen3.8-27b", 16, 64, 24, 4, 256, ArraysCache),
        ("hybrid-24-2", 12, 48, 24, 2, 256, ArraysCache),
        ("muse-glimmer-30b", 13, 52, 32, 2, 128, RotatingKVCache),
    ],
)
def test_every_fourth_layer_is_compressed_where_others_have_a_state_or_a_window(
    name, compressed, layers, query_heads, key_heads, dim, others
):
    model = unloaded_model(SHAPES[name])
    treat_layers_alike(model)
    cache = make_prompt_cache(model, 4)
    assert [type(layer) for layer in cache] == [*[others] * 3, TurboQuantKVCache] * compressed
    assert len(cache) == layers
    logits = model(mx.zeros((1, 1), mx.int32), cache=cache)  # lazy
    assert logits.shape == (1, 1, SHAPES[name]["vocab_size"])
    for place in compressible_caches(model):
        assert place.keys == place.values == Vectors(key_heads, dim)
        projection = model.layers[place.layer].self_attn.o_proj.weight
        assert projection.shape[1] == query_heads * dim


def test_three_of_four_layers_of_muse_glimmer_have_a_window_of_2048():
    foreseen = footprint(unloaded_model(SHAPES["muse-glimmer-30b"]), EXACT)
    token = 2 * 2 * 2 * 128  # keys and values of two bytes
    assert foreseen.bounded == ((token, 2048),) * 39
    assert foreseen.per_token == 13 * token


@pytest.mark.parametrize(
    "name, values", [("qwen3.8-27b", 16 * 4 * 256), ("hybrid-24-2", 12 * 2 * 256)]
)
def test_only_the_attention_of_a_hybrid_grows_with_the_text(name, values):
    foreseen = footprint(unloaded_model(SHAPES[name]), EXACT)
    assert foreseen.per_token == 2 * 2 * values  # keys and values of two bytes
    assert foreseen.bounded == () and foreseen.constant > 0


def test_the_sizes_of_a_model_may_be_those_of_its_text_config():
    config = SHAPES["qwen3.8-27b"]
    wrapped = unloaded_model({"model_type": config["model_type"], "text_config": config})
    assert text_arguments(wrapped).vocab_size == 248320
    assert chunk_nbytes(wrapped) == 8 * 2048 * 17408


def test_random_weights_have_four_bits_and_are_not_evaluated():
    model = random_model(SHAPES["llama-3.3-70b"])
    # 4.5 bits per weight, and 16 for the few others.
    assert weight_nbytes(model) == pytest.approx(70.55e9 * 4.5 / 8, rel=0.01)


@pytest.mark.parametrize("name", SMALL)
def test_a_random_model_keeps_the_size_of_what_it_reads(name):
    model = prepare_for_device(random_model(small(name)))
    cache = make_prompt_cache(model, 4, window=16)
    tokens = random_tokens(1, 100, vocabulary=512)
    for part in (tokens[:, :-1], tokens[:, -1:]):
        logits = model(part, cache=cache) / getattr(text_arguments(model), "output_multiplier", 1)
        assert mx.isfinite(logits).all()
        # Outputs of a normalised vector and weights of variance 1 / inputs.
        assert 0.3 < mx.std(logits).item() < 3


def test_a_convolution_of_a_random_model_keeps_the_size_of_what_it_reads():
    convolution = random_model(small("qwen3.8-27b")).layers[0].linear_attn.conv1d
    inputs = mx.random.normal((1, 20, convolution.weight.shape[0]), key=mx.random.key(0))
    assert mx.std(convolution(inputs)).item() == pytest.approx(1, rel=0.1)


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
