"""The vector index: its results, its contents and its errors."""

import importlib
import json
import random
import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokens import normal

from mlx_turboquant import TurboQuantizer, VectorIndex, files, save_prompt_cache, search
from mlx_turboquant.search import METRICS
from mlx_turboquant.stored_arrays import room_for_checksums

DIM = 32
metrics = pytest.mark.parametrize("metric", METRICS)


def vectors(count: int, dim: int = DIM, seed: int = 1) -> np.ndarray:
    """Vectors of different lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.uniform(0.5, 2, (count, 1))
    return (rng.standard_normal((count, dim)) * lengths).astype(np.float32)


def filled(metric: str = "cosine", count: int = 100, bits: int = 4) -> VectorIndex:
    index = VectorIndex(DIM, bits, metric)
    index.add(vectors(count))
    return index


def packed_scores(metric: str, x: np.ndarray, queries: np.ndarray, bits: int = 4) -> np.ndarray:
    """Scores (q, n) of all vectors, from their reconstruction; larger is nearer."""
    quantizer = TurboQuantizer(x.shape[1], bits, gain_search=False)
    restored = np.array(quantizer.dequantize(quantizer.quantize(mx.array(x))))
    products = queries @ restored.T
    if metric == "cosine":
        lengths = (np.linalg.norm(queries, axis=1)[:, None], np.linalg.norm(x, axis=1))
        return products / lengths[0] / lengths[1]
    if metric == "dot":
        return products
    return -((queries**2).sum(1)[:, None] - 2 * products + (x**2).sum(1))


def assert_nearest(result: search.SearchResult, scores: np.ndarray, metric: str, k: int) -> None:
    """Check for the k best scores (q, n) in order; the ids are the columns."""
    best = -np.sort(-scores, axis=1)[:, :k]
    found = np.array(result.scores) * (-1 if metric == "l2" else 1)
    # Sums of DIM products in float32; ids of equal scores may change places.
    np.testing.assert_allclose(found, np.minimum(best, 0) if metric == "l2" else best, atol=1e-4)
    ids = np.array(result.ids)
    np.testing.assert_allclose(np.take_along_axis(scores, ids, axis=1), best, atol=1e-4)
    assert all(len(set(row)) == k for row in ids)


def state(index: VectorIndex) -> dict[str, list]:
    used = {name: index._used(name).tolist() for name in index._buffers}
    return {**used, "next": index._next_id, "metric": index.metric}


@pytest.fixture
def tile(monkeypatch):
    """Tiles of 16 vectors and 4 queries."""
    monkeypatch.setattr(VectorIndex, "_tile", 16)
    monkeypatch.setattr(search, "_QUERY_TILE", 4)


@metrics
@pytest.mark.parametrize("count", [1, 15, 16, 17, 48, 100])
@pytest.mark.parametrize("bits", [1, 4, 5])
def test_it_finds_what_brute_force_over_the_dequantized_vectors_finds(tile, metric, count, bits):
    x, queries = vectors(count), vectors(9, seed=2)
    index = filled(metric, count, bits)
    scores = packed_scores(metric, x, queries, bits)
    for k in {1, min(5, count), min(16, count), count}:
        result = index.search(queries, k)
        assert result.ids.dtype == mx.int64 and result.scores.dtype == mx.float32
        assert_nearest(result, scores, metric, k)


@given(
    st.sampled_from(METRICS), st.integers(1, 90), st.integers(1, 8), st.data(), st.integers(0, 99)
)
def test_results_are_brute_force_for_any_sizes(metric, count, bits, data, seed):
    k = data.draw(st.integers(1, count))
    x, queries = vectors(count, seed=seed), vectors(3, seed=seed + 100)
    index = VectorIndex(DIM, bits, metric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VectorIndex, "_tile", data.draw(st.integers(1, 40)))
        index.add(x)
        assert_nearest(index.search(queries, k), packed_scores(metric, x, queries, bits), metric, k)


def test_of_equal_vectors_each_is_found_once(tile):
    """Ties span several tiles and the k-th place."""
    x = vectors(3).repeat(30, axis=0)
    index = VectorIndex(DIM, 4, "l2")
    index.add(x)
    for k in (1, 16, 29, 31, 60, 90):
        result = index.search(x[:1], k)
        assert_nearest(result, packed_scores("l2", x, x[:1]), "l2", k)


@metrics
def test_a_stored_vector_finds_itself(metric):
    """The product of a vector with its own code is exact, whatever the bits."""
    x = vectors(200)
    if metric == "dot":
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    result = filled_with(x, metric).search(x, 1)
    assert result.ids[:, 0].tolist() == list(range(200))
    expected = {"cosine": 1, "dot": 1, "l2": 0}[metric]
    # Differences of squared lengths up to 200 in float32.
    assert np.abs(np.array(result.scores) - expected).max() < 2e-4


def filled_with(x: np.ndarray, metric: str, bits: int = 4) -> VectorIndex:
    index = VectorIndex(x.shape[1], bits, metric)
    index.add(x)
    return index


def test_eight_bits_agree_with_the_exact_neighbours():
    """Also in a dimension without a Hadamard matrix."""
    x, queries = vectors(2000, 100), vectors(20, 100, seed=2)
    exact = np.argsort(-(queries @ x.T) / np.linalg.norm(x, axis=1), axis=1)[:, :10]
    found = np.array(filled_with(x, "cosine", 8).search(queries, 10).ids)
    # A few of 200 neighbours change, at the tenth place.
    assert sum(len(set(a) & set(b)) for a, b in zip(exact, found)) >= 190


@metrics
@given(cuts=st.lists(st.integers(0, 60), max_size=6))
def test_adding_in_portions_is_adding_at_once(metric, cuts):
    x = vectors(60)
    together, apart = filled_with(x, metric), VectorIndex(DIM, 4, metric)
    assert len(apart) == 0
    borders = [0, *sorted(cuts), 60]
    ids = [apart.add(x[a:b]).tolist() for a, b in zip(borders, borders[1:])]
    assert sum(ids, []) == list(range(60))
    # Float32 sums, and so the last bits of a scale, may depend on the number of rows.
    first, second = state(apart), state(together)
    np.testing.assert_allclose(first.pop("scales"), second.pop("scales"), rtol=1e-6)
    np.testing.assert_allclose(
        first.pop("squared_lengths", 0), second.pop("squared_lengths", 0), rtol=1e-6
    )
    assert first == second


def test_vectors_can_be_added_between_searches():
    x = vectors(50)
    index = VectorIndex(DIM, 4)
    for i in range(50):
        assert index.add(x[i : i + 1]).tolist() == [i]
        assert index.search(x[i], 1).ids.item() == i
    assert len(index) == 50 and index.ids.tolist() == list(range(50))


@pytest.mark.parametrize("make", [np.float16, np.float64, mx.float16, mx.bfloat16, list])
def test_any_array_of_floats_is_taken(make):
    x = vectors(5)
    if make is list:
        given = x.tolist()
    else:
        given = mx.array(x).astype(make) if isinstance(make, mx.Dtype) else x.astype(make)
    index = VectorIndex(DIM, 8)
    index.add(given)
    result = index.search(given, 1)
    assert result.ids.tolist() == [[0], [1], [2], [3], [4]]


def test_queries_have_any_leading_axes():
    index = filled()
    queries = vectors(6, seed=2)
    flat = index.search(queries, 3)
    shaped = index.search(queries.reshape(2, 3, DIM), 3)
    assert shaped.ids.tolist() == flat.ids.reshape(2, 3, 3).tolist()
    assert index.search(queries[0], 3).ids.tolist() == flat.ids[0].tolist()
    assert index.search(queries[:0], 3).scores.shape == (0, 3)


@metrics
@given(removed=st.sets(st.integers(0, 59)), more=st.integers(0, 5))
def test_removed_vectors_are_not_found_and_the_others_keep_their_ids(metric, removed, more):
    x = vectors(60 + more)
    index = filled_with(x[:60], metric)
    index.remove(sorted(removed))
    left = [i for i in range(60) if i not in removed]
    assert index.ids.tolist() == left and len(index) == len(left)
    # Free space is released, and ids are never reused.
    assert index.nbytes == len(left) * index.bits_per_value * DIM / 8
    assert index.add(x[60:]).tolist() == list(range(60, 60 + more))
    left += range(60, 60 + more)
    if left:
        result = index.search(x[:4], len(left))
        scores = packed_scores(metric, x, x[:4])
        gone = [i for i in range(60 + more) if i not in left]
        scores[:, gone] = -np.inf
        assert_nearest(result, scores, metric, len(left))


@pytest.mark.parametrize(
    "ids", [3, [3], [3, 3], np.array([3]), mx.array([3]), np.int64(3), range(3, 4)]
)
def test_ids_to_remove_come_in_any_form(ids):
    index = filled(count=5)
    index.remove(ids)
    assert index.ids.tolist() == [0, 1, 2, 4]


@metrics
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_everything_that_is_held_is_counted(metric, bits):
    index = filled(metric, 64, bits)
    held = 4 * bits * DIM // 32 + 4 + 8 + (4 if metric == "l2" else 0)
    assert index.bits_per_value == held * 8 / DIM
    assert index.nbytes == 64 * held
    index.add(vectors(1))
    # One more vector grows the buffers by half.
    assert index.nbytes == 96 * held


def test_many_small_additions_copy_little():
    """Buffers grow geometrically: 500 additions change their size a few times."""
    index, sizes = VectorIndex(DIM, 4), set()
    for i in range(500):
        index.add(vectors(1, seed=i))
        sizes.add(index.nbytes)
    assert len(sizes) < 20


@metrics
def test_neither_adding_nor_searching_makes_a_dense_copy(metric, monkeypatch):
    monkeypatch.setattr(VectorIndex, "_tile", 256)
    count, dim = 20_000, 256
    x = normal((count, dim), 1)
    mx.eval(x)
    index = VectorIndex(dim, 4, metric)

    def growth(work) -> int:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        work()
        return mx.get_peak_memory() - before

    # A tile of 256 vectors is 262 kB in float32; a dozen such arrays are alive at a time.
    tile = 16 * 256 * dim * 4
    assert growth(lambda: index.add(x)) < 2 * index.nbytes + tile < x.nbytes / 2
    assert growth(lambda: index.search(x[:3], 10)) < tile
    originals = np.array(x)
    assert growth(lambda: index.search(x[:3], 10, originals=originals.__getitem__)) < tile


@metrics
def test_re_ranking_is_exact_among_the_candidates(tile, metric):
    x, queries = vectors(100), vectors(9, seed=2)
    index = filled(metric, bits=2)
    asked = []

    def originals(ids: np.ndarray) -> np.ndarray:
        asked.append(len(ids))
        return x[ids]

    products = queries @ x.T
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(x, axis=1)
    distances = np.square(queries[:, None] - x).sum(-1)
    scores = {"cosine": products / lengths, "dot": products, "l2": -distances}[metric]
    everything = index.search(queries, 5, originals=originals, candidates=100)
    assert_nearest(everything, scores, metric, 5)
    assert asked == [100] * 9
    some = index.search(queries, 5, originals=originals)
    assert asked[9:] == [20] * 9
    candidates = np.array(index.search(queries, 20).ids)
    left_out = np.ones_like(scores, bool)
    np.put_along_axis(left_out, candidates, False, axis=1)
    scores[left_out] = -np.inf
    assert_nearest(some, scores, metric, 5)
    # With more candidates than vectors, all vectors are candidates.
    index.search(queries, 60, originals=originals)
    assert asked[18:] == [100] * 9


@metrics
@pytest.mark.parametrize("count", [0, 1, 70])
def test_a_saved_index_is_the_same_after_loading(tmp_path, metric, count):
    index = VectorIndex(DIM, 3, metric, seed=5)
    index.add(vectors(count + 2))
    index.remove([0, count + 1])
    file = index.save(tmp_path / "index")
    assert file == tmp_path / "index.safetensors" and list(tmp_path.iterdir()) == [file]
    loaded = VectorIndex.load(tmp_path / "index")
    assert state(loaded) == state(index)
    assert loaded.quantizer is index.quantizer
    if count:
        first, second = (i.search(vectors(3), count) for i in (index, loaded))
        assert mx.array_equal(first.scores, second.scores)
    # Both continue alike.
    assert loaded.add(vectors(9)).tolist() == index.add(vectors(9)).tolist()
    assert state(loaded) == state(index)
    # A file of ours may be replaced, also by the index that was loaded from it.
    assert state(VectorIndex.load(loaded.save(file))) == state(index)


def test_a_file_is_as_small_as_the_index(tmp_path):
    index = filled(count=1000)
    index.add(vectors(1))
    size = index.save(tmp_path / "index").stat().st_size
    assert 0 < size - 1001 * index.bits_per_value * DIM / 8 < 1000  # the header; no free space


@pytest.fixture
def saved(tmp_path) -> Path:
    return filled("l2", 20).save(tmp_path / "index")


def test_a_file_that_was_cut_anywhere_is_refused(saved):
    data = saved.read_bytes()
    for length in range(0, len(data), 7):
        saved.write_bytes(data[:length])
        with pytest.raises(ValueError, match="is not a complete safetensors file"):
            VectorIndex.load(saved)
    saved.write_bytes(data + bytes(8))
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        VectorIndex.load(saved)


def test_any_changed_bit_is_found(saved):
    data = saved.read_bytes()
    for place in random.Random(0).sample(range(len(data)), 300):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        saved.write_bytes(changed)
        with pytest.raises(ValueError, match=re.escape(str(saved))):
            VectorIndex.load(saved)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dim": "64"}, "a wrong shape or dtype"),
        ({"bits": "5"}, "a wrong shape or dtype"),
        ({"bits": "9"}, "9 bits"),
        ({"dim": "no"}, "invalid literal"),
        ({"metric": "cosine"}, "a wrong shape or dtype"),
        ({"metric": "hamming"}, "hamming"),
        ({"next_id": "19"}, "ids do not ascend"),
        ({"seed": None}, "seed"),
        ({"vector_index": "99"}, "vector_index version 99, this is version 2: build the index"),
        ({"codec": "99"}, "codec version 99, this is version 2: build the index again"),
    ],
)
def test_a_file_whose_description_is_wrong_is_refused(saved, change, reason):
    """Its checksum is valid, so that only the description is wrong."""
    rewrite(saved, metadata=change)
    with pytest.raises(ValueError, match=reason) as error:
        VectorIndex.load(saved)
    assert str(saved) in str(error.value)


def rewrite(file: Path, metadata: dict[str, str | None], arrays: dict | None = None) -> None:
    """Save the file again with other metadata (None removes an entry) or arrays."""
    content, old = mx.load(str(file), return_metadata=True)
    content = {name: mx.array(np.array(x)) for name, x in {**content, **(arrays or {})}.items()}
    room = room_for_checksums(sum(x.nbytes for x in content.values()))
    merged = {**old, **metadata, "checksums": room}
    merged = {name: text for name, text in merged.items() if text is not None}
    files.write_whole(file, lambda path: mx.save_safetensors(str(path), content, merged))


@pytest.mark.parametrize(
    "name, value",
    [
        ("ids", mx.zeros(20, mx.int64)),
        ("ids", mx.arange(20)),
        ("ids", -mx.arange(20).astype(mx.int64)),
        ("scales", mx.full(20, mx.nan)),
        ("squared_lengths", mx.full(20, mx.inf)),
        ("scales", mx.ones(21)),
        ("codes", mx.zeros((20, 5), mx.uint32)),
        ("more", mx.zeros(20)),
    ],
)
def test_a_file_whose_arrays_are_wrong_is_refused(saved, name, value):
    rewrite(saved, {}, {name: value})
    with pytest.raises(ValueError, match="is damaged"):
        VectorIndex.load(saved)


def test_foreign_files_are_refused_and_not_replaced(random_model, tmp_path):
    from mlx_turboquant import make_prompt_cache

    cache = save_prompt_cache(tmp_path / "c", make_prompt_cache(random_model), random_model)
    weights, text = tmp_path / "weights.safetensors", tmp_path / "text.safetensors"
    mx.save_safetensors(str(weights), {"weight": mx.zeros(3)})
    text.write_text("not a safetensors file, but long enough to hold a header length")
    for file in (cache, weights, text):
        content = file.read_bytes()
        with pytest.raises(ValueError, match="is not a"):
            VectorIndex.load(file)
        with pytest.raises(ValueError, match="use another"):
            filled().save(file)
        assert file.read_bytes() == content
    with pytest.raises(ValueError, match="does not exist"):
        VectorIndex.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="is not a folder: save to a folder that exists"):
        filled().save(tmp_path / "missing" / "index")


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    content = saved.read_bytes()

    def full(path, arrays, metadata):
        Path(path).write_bytes(content[:100])
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OSError, match="cannot be written whole"):
        filled().save(saved)
    assert saved.read_bytes() == content and list(saved.parent.iterdir()) == [saved]


def with_value(value: float) -> np.ndarray:
    x = vectors(40)
    x[33, 5] = value
    return x


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda i: i.add(vectors(3, DIM + 1)), rf"\(3, 33\).*add an array of shape \(n, {DIM}\)"),
        (lambda i: i.add(vectors(1)[0]), r"shape \(32,\)"),
        (lambda i: i.add(vectors(3).astype(int)), "int64"),
        (lambda i: i.add(with_value(np.nan)), "Vector 33 has the length nan: use finite values"),
        (lambda i: i.add(with_value(np.inf)), "Vector 33 has the length inf"),
        (lambda i: i.add(with_value(1e19)), r"Vector 33 .* from 1e-18 to 1e\+18"),
        (lambda i: i.add(vectors(40) * np.arange(40)[:, None]), "Vector 0 has the length 0"),
        (lambda i: i.search(vectors(3, DIM - 1), 1), "its last axis must be 32"),
        (lambda i: i.search(3.0, 1), "its last axis must be 32"),
        (lambda i: i.search(vectors(3).astype(int), 1), "int64"),
        (lambda i: i.search(with_value(np.nan), 1), "Query 33 has the length nan"),
        (lambda i: i.search(np.zeros(DIM, np.float32), 1), "Query 0 has the length 0"),
        (lambda i: i.search(vectors(3), 101), "101 results.*100 vectors: use k from 1 to 100"),
        (lambda i: i.search(vectors(3), 0), "use k from 1 to 100"),
        (lambda i: i.search(vectors(3), -1), "use k from 1 to 100"),
        (lambda i: i.search(vectors(3), 2.5), "use k from 1 to 100"),
        (lambda i: i.search(vectors(3), 5, originals=vectors, candidates=4), "use 5 or more"),
        (lambda i: i.search(vectors(3), 5, originals=lambda ids: vectors(3)), r"\(20, 32\)"),
        (lambda i: i.search(vectors(3), 9, originals=lambda ids: with_value(np.nan)[:36]), "nan"),
        (lambda i: i.remove(100), "1 of 1 ids are not in the index, the first is 100"),
        (lambda i: i.remove([3, -1, 500]), "2 of 3 ids are not in the index, the first is -1"),
        (lambda i: i.remove([3.5]), "float64"),
        (lambda i: i.remove({3}), "object cannot be removed: use an array of whole numbers"),
        (lambda i: i.remove(np.ones(100, bool)), "bool"),
    ],
)
def test_a_refused_call_leaves_the_index_as_it_was(tile, call, message):
    index = filled()
    before, held = state(index), index.nbytes
    with pytest.raises(ValueError, match=message) as error:
        call(index)
    assert str(error.value).count(". ") == 0  # one sentence
    assert state(index) == before and index.nbytes == held


def test_an_empty_index_is_not_searched():
    index = VectorIndex(DIM, 4)
    with pytest.raises(ValueError, match="The index is empty: add vectors"):
        index.search(vectors(1), 1)
    with pytest.raises(ValueError, match="1 of 1 ids"):
        index.remove(0)
    index.remove([])
    assert index.add(vectors(0)).tolist() == [] and len(index) == 0
    index.add(vectors(3))
    index.remove(range(3))
    with pytest.raises(ValueError, match="The index is empty"):
        index.search(vectors(1), 1)


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_vectors_without_a_direction_have_products_and_distances(metric):
    x = np.zeros((2, DIM), np.float32)
    x[1] = 1
    index = filled_with(x, metric)
    result = index.search(np.zeros(DIM, np.float32), 2)
    # A vector of length 1 only has the relative error of its rounded squared length.
    assert np.array(result.scores) == pytest.approx({"dot": [0, 0], "l2": [0, DIM]}[metric])


@metrics
def test_extreme_lengths_are_finite(metric):
    x = vectors(50)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for size in (0.99e18, 1.01e-18):
        result = filled_with(x * size, metric).search(x[:9] * size, 50)
        assert mx.isfinite(result.scores).all()
        assert result.ids[:, 0].tolist() == list(range(9)) or (metric, size) == ("l2", 1.01e-18)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: VectorIndex(7, 4), "7 values"),
        (lambda: VectorIndex(DIM, 9), "9 bits"),
        (lambda: VectorIndex(DIM, 4, "hamming"), "'hamming' is not known: use one of cosine, dot"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_description_of_a_file_is_plain_text(saved):
    """Nothing in it can be executed."""
    header = saved.read_bytes()
    length = int.from_bytes(header[:8], "little")
    metadata = json.loads(header[8 : 8 + length])["__metadata__"]
    assert {"vector_index", "codec", "dim", "bits", "metric", "seed", "next_id"} <= set(metadata)


def test_the_example_measures_our_index_and_says_what_is_missing(monkeypatch):
    example = importlib.import_module("search")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="faiss is not installed: pip install"):
        example.import_faiss()
    monkeypatch.setattr(example, "arms", lambda dim, bits: [example.turboquant(dim, bits, True)])
    x = example.clustered(300, DIM)
    assert np.linalg.norm(x, axis=1) == pytest.approx(np.ones(300), rel=1e-5)
    exact, ours = example.measure(x[100:], x[:100], [8])
    assert ours.arm.bytes == DIM + 4
    # After re-ranking, 8 bits change only the order of equal neighbours.
    assert exact.recalls == ours.recalls == [1.0] * len(example.KS)
    assert exact.recall_at_10 == ours.recall_at_10 == 1.0
