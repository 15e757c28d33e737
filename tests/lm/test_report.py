import logging

import mlx.core as mx
import pytest
from conftest import profile_of
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache
from tiny_families import tiny_model
from tokens import basis_of, keys_and_values

from mlx_turboquant import TurboQuantKVCache, cache_report, cache_size, make_prompt_cache
from mlx_turboquant.lm.profile import Profile, fingerprint


def filled(cache, count: int):
    cache.update_and_fetch(*keys_and_values(count))
    return cache


@pytest.fixture
def mixed():
    """Two compressed layers, one of them in a list, and two that are not."""
    compressed = [filled(TurboQuantKVCache(4, 2, window=16), 300) for _ in range(2)]
    return [
        compressed[0],
        CacheList(ArraysCache(size=2), compressed[1]),
        filled(RotatingKVCache(max_size=16), 300),
    ]


def test_the_report_tells_layers_apart_and_why(mixed):
    kinds = {kind.cache: kind for kind in cache_report(mixed).kinds}
    assert kinds["TurboQuantKVCache"].layers == 2
    assert kinds["TurboQuantKVCache"].bits == 3  # the mean of 4 for keys and 2 for values
    assert kinds["TurboQuantKVCache"].nbytes == mixed[0].nbytes + mixed[1][1].nbytes
    assert kinds["TurboQuantKVCache"].remark == "256 tokens a layer packed, 44 exact"
    assert kinds["RotatingKVCache"].bits is None
    assert "sliding window" in kinds["RotatingKVCache"].remark
    assert "recurrent" in kinds["ArraysCache"].remark


def test_the_report_counts_every_byte_of_the_cache(mixed):
    report = cache_report(mixed)
    assert report.size == cache_size(mixed)
    assert report.size.nbytes == sum(layer.nbytes for layer in mixed)
    assert sum(kind.nbytes for kind in report.kinds) == report.size.nbytes
    assert report.size.tokens == 300
    # Two tokens of 64 16-bit values and two heads, in the compressed layers.
    assert report.kinds[0].fp16_nbytes == 2 * 300 * 2 * 2 * 64 * 2


def test_a_cache_of_which_nothing_is_packed_yet_says_how_many_tokens_stay_exact():
    """Four sinks, a window of 16, and an incomplete block of 32."""
    short = str(cache_size([filled(TurboQuantKVCache(4, 4, window=16), 51)]))
    assert short.startswith("51 tokens,") and "ratio" not in short
    assert short.endswith("MB (nothing is packed yet: the first 51 tokens stay exact)")
    longer = str(cache_size([filled(TurboQuantKVCache(4, 4, window=16), 52)]))
    assert longer.endswith("in fp16: exact tokens outweigh the packed ones)")
    assert "ratio" in str(cache_size([filled(TurboQuantKVCache(4, 4, window=16), 520)]))
    assert "ratio 1.00" in str(cache_size([filled(KVCache(), 10)]))


def test_the_report_is_an_aligned_table(mixed):
    lines = str(cache_report(mixed)).splitlines()
    assert len(lines) == 7
    assert lines[1].split()[:3] == ["TurboQuantKVCache", "2", "3"]
    columns = {line.index(word) for line, word in zip(lines, ("bits", " 3 ", " exact"))}
    assert len(columns) == 2  # the heading, and the same column after a space


def test_the_report_lists_the_bits_of_all_layers_and_the_bytes_of_a_token(mixed):
    report = cache_report(mixed)
    assert (report.key_bits, report.value_bits) == ([4, 4], [2, 2])
    # Two layers of two heads of 64 values, and a scale in 16 bits.
    assert report.token_nbytes == 2 * 2 * (64 * (4 + 2) // 8 + 2 * 2)
    assert str(report).splitlines()[-3:] == [
        "bits of keys    4 4",
        "bits of values  2 2",
        f"{report.token_nbytes} bytes a token",
    ]


def test_the_report_says_which_layers_have_axes_of_their_own():
    basis = basis_of(64, 2, 2)
    layers = [filled(TurboQuantKVCache(4, 4, basis=each), 300) for each in (basis, None)]
    report = cache_report(layers)
    assert report.has_axes == [True, False]
    assert "axes of keys    + -  (+ learned, - random rotation)" in str(report).splitlines()
    assert "axes of keys" not in str(cache_report(layers[1:]))


def test_with_a_profile_the_report_says_what_to_expect_and_what_weighs_most(random_model):
    keys, values = {2: (0.1,), 3: (0.02,)}, {1: (0.4,), 2: (0.001,)}
    lighter = {2: (0.01,), 3: (0.002,)}
    profile = Profile(fingerprint(random_model), ("text",), 9, (keys, lighter), (values, values))
    cache = make_prompt_cache(random_model, key_bits=3, value_bits=2, profile=profile)
    random_model(mx.ones((1, 3), mx.int32), cache=cache)
    report = cache_report(cache, random_model)
    assert report.divergence == pytest.approx(0.02 + 0.002 + 2 * 0.001)
    assert report.heaviest == ["keys of layer 0", "keys of layer 1", "values of layer 1"]
    assert "expected divergence 0.024 nats, most of it from keys of layer 0, " in str(report)


def test_codes_of_a_trellis_are_named_and_expected_to_diverge_less(random_model):
    profile = profile_of(random_model, 0.1, 0.1)
    scalar, trellis = (
        make_prompt_cache(random_model, key_bits=3, value_bits=5, profile=profile, codec=codec)
        for codec in ("scalar", "trellis")
    )
    expected, report = (cache_report(cache, random_model) for cache in (scalar, trellis))
    assert 0.6 < report.divergence / expected.divergence < 0.7
    assert report.kinds[0].remark == expected.kinds[0].remark + ", trellis codes up to 4 bits"


def test_a_cache_of_which_nothing_is_compressed_is_reported_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "mlx_turboquant"):
        report = cache_report([filled(KVCache(), 10)])
    assert "No layer of this cache is compressed (its caches: KVCache)" in caplog.text
    assert str(report).endswith("Nothing is compressed.")


def test_a_batch_is_reported_as_its_sequences_are():
    batch = TurboQuantKVCache(4, 4, window=16).merge(
        [filled(TurboQuantKVCache(4, 4, window=16), count) for count in (100, 200)]
    )
    (kind,) = cache_report([batch]).kinds
    assert (kind.bits, kind.nbytes) == (4, batch.nbytes)
    assert kind.remark == "224 tokens a layer packed, 76 exact"
    # 200 columns for two sequences.
    assert cache_size([batch]).fp16_nbytes == 2 * (2 * 200 * 2 * 2 * 64)


def test_the_mean_of_bits_counts_the_values_of_each_side():
    """Keys of minicpm3 are three times as wide as its values here."""
    model = tiny_model("minicpm3")
    cache = make_prompt_cache(model, key_bits=6, value_bits=2)
    model(mx.ones((1, 40), mx.int32), cache=cache)
    widths = {(layer.side_values[0], layer.side_values[1]) for layer in cache}
    [(keys, values)] = widths
    assert keys == 3 * values
    assert [kind.bits for kind in cache_report(cache).kinds] == [(3 * 6 + 2) / 4]
