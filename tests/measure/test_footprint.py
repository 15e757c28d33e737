import mlx.core as mx
import pytest
from conftest import variant
from mlx_lm.models import gemma3_text

from mlx_turboquant.lm.settings import Settings
from mlx_turboquant.measure.cache_specs import EXACT, MLX_LM, preset
from mlx_turboquant.measure.footprint import footprint

SPECS = (EXACT, *MLX_LM, preset("4"), preset("K3V2"))


@pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
@pytest.mark.parametrize("tokens", [700, 3000])
def test_a_cache_takes_the_bytes_that_were_foreseen(random_model, spec, tokens):
    cache = spec.make_cache(random_model)
    random_model(mx.ones((1, tokens), mx.int32), cache=cache)
    spec.after_chunk(cache)
    taken = sum(layer.nbytes for layer in cache)
    foreseen = footprint(random_model, spec).nbytes(tokens)
    # Buffers of 2 layers grow by 256 tokens, each with 2 x 2 x 64 values of 4 bytes.
    assert taken - 256 * 2 * 1024 <= foreseen <= taken * 1.2


def test_a_sliding_window_takes_no_more_than_its_tokens():
    arguments = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 128, "head_dim": 64}
    arguments |= {"num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = gemma3_text.Model(
        gemma3_text.ModelArgs(model_type="gemma3_text", sliding_window=512, **arguments)
    )
    foreseen = footprint(model, EXACT)
    token = 2 * 64 * 4
    assert foreseen.nbytes(400) == 6 * 400 * token
    assert foreseen.nbytes(10_000) == 10_000 * token + 5 * 512 * token


def test_a_limited_cache_takes_no_more_than_its_limit(random_model):
    limited = preset("4", Settings(max_size=512))
    foreseen, cache = footprint(random_model, limited), limited.make_cache(random_model)
    assert foreseen.nbytes(10_000) == foreseen.nbytes(512) < foreseen.nbytes(400) * 1.2
    random_model(mx.ones((1, 3000), mx.int32), cache=cache)
    assert sum(layer.nbytes for layer in cache) <= foreseen.prompt_nbytes(3000)


def test_the_longest_context_is_the_last_that_fits(random_model):
    foreseen = footprint(random_model, preset("4"))
    longest = foreseen.longest(1e8)
    assert foreseen.prompt_nbytes(longest) <= 1e8 < foreseen.prompt_nbytes(longest + 1)
    assert foreseen.longest(0) == 0


def test_fewer_bits_fit_more(random_model):
    longest = [footprint(variant(random_model), spec).longest(1e9) for spec in SPECS]
    assert longest[0] < longest[3] < longest[4]
