"""Nearest-neighbour search over packed vectors: an index that needs no training."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from . import files
from .codec.packing import words_per_vector
from .codec.quantizer import CODEC_VERSION, QuantizedVectors, TurboQuantizer, check_vectors
from .kernels.quantize import inner_product
from .stored_arrays import Damaged, StoredFile, room_for_checksums

METRICS = ("cosine", "dot", "l2")
# Changes whenever the file format of an index changes.
FORMAT_VERSION = "2"

_KIND = "vector_index"
_VERSIONS = {_KIND: FORMAT_VERSION, "codec": CODEC_VERSION}
# The products and squares of two lengths up to this one are finite in float32.
_LONGEST = 1e18
# The square of this length is not rounded to zero, so the vector has a direction.
_SHORTEST = 1e-18
_QUERY_TILE = 256
# Candidates for re-ranking per result, by default.
_CANDIDATES = 4
# A gain search takes ten times as long and does not change recall at embedding dimensions.
_quantizer = cache(partial(TurboQuantizer, gain_search=False))


class SearchResult(NamedTuple):
    """The nearest vectors of each query, best first: int64 ids and float32 scores (..., k)."""

    ids: mx.array
    scores: mx.array


class VectorIndex:
    """An index of vectors at ``bits`` bits per value, searched by inner products with the codes.

    TurboQuant (arXiv 2504.19874, section 4.4) needs no training: vectors can be added at any time
    and in any portions, with the same result. Inner products of queries and packed vectors are
    unbiased over the rotation (:class:`.TurboQuantizer`, scale "unbiased").

    The index holds codes, a float32 scale and an int64 id of each vector, and for "l2" its squared
    length in float32. It has free space after it has grown. ``bits_per_value`` counts everything
    but the free space. A search unpacks tiles of a bounded size; a kernel unpacks none.

    Args:
        dim: Values per vector, 8 to 8,192.
        bits: Bits per value, 1 to 8.
        metric: How the nearest vectors are chosen: "cosine" (largest cosine), "dot" (largest inner
            product) or "l2" (smallest distance).
        seed: Seed of the rotation, see :class:`.TurboQuantizer`.

    Raises:
        ValueError: an argument outside these ranges.
    """

    def __init__(self, dim: int, bits: int, metric: str = "cosine", *, seed: int = 0):
        if metric not in METRICS:
            raise ValueError(f"Metric {metric!r} is not known: use one of {', '.join(METRICS)}.")
        self.metric = metric
        self.quantizer = _quantizer(dim, bits, seed=seed)
        self._count = 0
        self._next_id = 0
        self._buffers = {name: mx.zeros(*column) for name, column in self._columns(0).items()}
        one_vector = self._columns(1).values()
        self.bits_per_value = 8 * sum(prod(shape) * dtype.size for shape, dtype in one_vector) / dim

    def __len__(self) -> int:
        return self._count

    @property
    def ids(self) -> mx.array:
        """The ids of all vectors, ascending: int64 (n,)."""
        return self._used("ids")

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, free space included."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def add(self, vectors: Any) -> mx.array:
        """Pack vectors (n, dim), an array of numpy or mlx, and return their ids, int64 (n,).

        Ids count up from 0, are never reused, and stay valid when other vectors are removed.
        Vectors are float16, bfloat16 or float32; float64 of numpy is rounded. They are read in
        tiles, so the array may be memory-mapped.

        Raises:
            ValueError: another shape or dtype, a value that is not finite, a length above 1e18,
                or for "cosine" a length below 1e-18. Nothing is added then.
        """
        if not hasattr(vectors, "shape"):
            vectors = mx.array(vectors)
        if len(vectors.shape) != 2 or vectors.shape[1] != self.quantizer.dim:
            raise ValueError(
                f"An array of shape {tuple(vectors.shape)} does not hold vectors of "
                f"{self.quantizer.dim} values: add an array of shape (n, {self.quantizer.dim})."
            )
        tiles = [(first, self._pack(x, first)) for first, x in _tiles(vectors, self._tile)]
        start, stop = self._count, self._count + vectors.shape[0]
        ids = mx.arange(self._next_id, self._next_id + stop - start, dtype=mx.int64)
        self._reserve(stop)
        self._buffers["ids"][start:stop] = ids
        for first, tile in tiles:
            for name, x in tile.items():
                self._buffers[name][start + first : start + first + len(x)] = x
        mx.eval(ids, *self._buffers.values())
        self._count, self._next_id = stop, self._next_id + ids.size
        return ids

    def search(
        self,
        queries: Any,
        k: int,
        *,
        originals: Callable[[np.ndarray], Any] | None = None,
        candidates: int | None = None,
    ) -> SearchResult:
        """The ``k`` nearest vectors of each of the queries (..., dim), best first.

        Scores estimate the cosine, the inner product or the squared distance. The order of equal
        scores is undefined.

        Args:
            queries: An array of numpy or mlx, of the dtypes that :meth:`add` takes.
            k: Results per query, from 1 to the number of vectors.
            originals: A function for exact re-ranking, called once per query. It maps ids,
                int64 (m,), to the original vectors (m, dim), which the index does not hold:
                ``lambda ids: array[ids]`` for an array of all added vectors in order.
            candidates: How many of the best estimates are re-ranked, ``k`` or more (default: 4 k).

        Raises:
            ValueError: an empty index, ``k`` out of range, fewer candidates than ``k``, queries
                that :meth:`add` would not take, or originals that are not (m, dim).
        """
        queries = mx.array(queries)
        check_vectors(queries, self.quantizer.dim)
        if self._count == 0:
            raise ValueError("The index is empty: add vectors before you search.")
        if k not in range(1, self._count + 1):
            raise ValueError(
                f"{k} results cannot be found among {self._count} vectors: "
                f"use k from 1 to {self._count}."
            )
        if candidates is not None and candidates < k:
            raise ValueError(
                f"{candidates} candidates are not enough for k = {k}: use {k} or more."
            )
        candidates = min(candidates or _CANDIDATES * k, self._count)
        shape = (*queries.shape[:-1], int(k))
        if 0 in shape:
            return SearchResult(mx.zeros(shape, mx.int64), mx.zeros(shape))
        found = []
        for start, x in _tiles(queries.reshape(-1, self.quantizer.dim), _QUERY_TILE):
            lengths = self._lengths(x, "Query", start)
            x = x.astype(mx.float32) / (lengths[:, None] if self.metric == "cosine" else 1)
            closeness, ids = self._nearest(x, k if originals is None else candidates)
            if originals is not None:
                closeness = self._exact_closeness(x, ids, originals)
            order = mx.argsort(-closeness, axis=-1)[:, :k]
            found.append([mx.take_along_axis(y, order, axis=-1) for y in (ids, closeness)])
            mx.eval(found[-1])
        ids, closeness = (mx.concatenate(parts) for parts in zip(*found))
        scores = mx.maximum(-closeness, 0) if self.metric == "l2" else closeness
        return SearchResult(ids.reshape(shape), scores.reshape(shape))

    def remove(self, ids: int | Sequence[int] | np.ndarray | mx.array) -> None:
        """Remove the vectors with these ids, an integer or an array of integers.

        Each call copies the remaining packed vectors once and releases the free space. Remove many
        vectors in one call.

        Raises:
            ValueError: an id that is not in the index. Nothing is removed then.
        """
        removed = np.unique(np.array(ids))
        held = np.array(self.ids)
        if removed.size and removed.dtype.kind not in "iu":
            raise ValueError(
                f"Ids of dtype {removed.dtype} cannot be removed: use an array of whole numbers."
            )
        missing = removed[~np.isin(removed, held)]
        if missing.size:
            raise ValueError(
                f"{missing.size} of {removed.size} ids are not in the index, the first is "
                f"{missing[0]}: remove ids that add has returned and that were not removed before."
            )
        kept = mx.array(np.flatnonzero(~np.isin(held, removed)))
        buffers = {name: buffer[kept] for name, buffer in self._buffers.items()}
        mx.eval(buffers)
        self._buffers, self._count = buffers, kept.size

    def save(self, file: str | Path) -> Path:
        """Save the index atomically, packed as it is; return its path, which ends in .safetensors.

        Raises:
            ValueError: the folder does not exist, or the file exists and is not an index.
            OSError: the file cannot be written completely, for example because the disk is full.
        """
        file = files.check_target(file, _KIND, "vector index")
        metadata = {name: str(getattr(self.quantizer, name)) for name in ("dim", "bits", "seed")}
        metadata |= {"metric": self.metric, "next_id": str(self._next_id)}
        arrays = {name: self._used(name) for name in self._buffers}
        room = room_for_checksums(sum(x.nbytes for x in arrays.values()))
        metadata |= _VERSIONS | {"checksums": room}
        files.write_whole(file, lambda path: mx.save_safetensors(str(path), arrays, metadata))
        return file

    @classmethod
    def load(cls, file: str | Path) -> "VectorIndex":
        """Load an index that :meth:`save` saved.

        Raises:
            ValueError: a file that is not an index, is damaged, or has another version.
            OSError: the file cannot be read.
        """
        file = files.safetensors_path(file)
        stored = StoredFile(file)
        saved = stored.metadata
        if _KIND not in saved:
            raise ValueError(
                f"{file} is not a vector index of mlx_turboquant: use a file that it has saved."
            )
        files.check_versions(file, saved, _VERSIONS, "build the index again")
        arrays = dict(zip(stored.arrays, stored.load(list(stored.arrays.values()))))
        mx.eval(arrays)
        try:
            dim, bits, seed, next_id = (int(saved[k]) for k in ("dim", "bits", "seed", "next_id"))
            index = cls(dim, bits, saved["metric"], seed=seed)
            count = arrays["scales"].size
            if {name: (x.shape, x.dtype) for name, x in arrays.items()} != index._columns(count):
                raise ValueError(f"arrays of {count} vectors have a wrong shape or dtype")
            ids = np.array(arrays["ids"])
            if (np.diff(ids, prepend=-1) <= 0).any() or (ids >= next_id).any():
                raise ValueError("ids do not ascend")
            for name in ("scales", "squared_lengths"):
                if name in arrays and not mx.isfinite(arrays[name]).all():
                    raise ValueError(f"{name} are not finite")
        except Exception as error:
            raise Damaged(file, str(error)) from error
        index._buffers, index._count, index._next_id = arrays, count, next_id
        return index

    @property
    def _tile(self) -> int:
        """Vectors per tile: few enough for the cache of a CPU, or enough to keep a GPU busy."""
        gpu = mx.default_device().type == mx.DeviceType.gpu
        return min(1 << 16, (1 << 24 if gpu else 1 << 18) // self.quantizer.dim)

    def _columns(self, count: int) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        """The shape and the dtype of each array that stores ``count`` vectors."""
        words = words_per_vector(self.quantizer.dim, self.quantizer.bits)
        columns = {"codes": ((count, words), mx.uint32), "scales": ((count,), mx.float32)}
        if self.metric == "l2":
            columns["squared_lengths"] = ((count,), mx.float32)
        return columns | {"ids": ((count,), mx.int64)}

    def _used(self, name: str) -> mx.array:
        return self._buffers[name][: self._count]

    def _pack(self, x: mx.array, first: int) -> dict[str, mx.array]:
        """Pack a tile of vectors into columns without ids; errors count rows from ``first``."""
        lengths = self._lengths(x, "Vector", first)
        tile = self.quantizer.quantize(x)._asdict()
        if self.metric == "cosine":
            tile["scales"] = tile["scales"] / lengths
        if self.metric == "l2":
            tile["squared_lengths"] = lengths * lengths
        mx.eval(tile)
        return tile

    def _lengths(self, x: mx.array, what: str, first: int) -> mx.array:
        """|x| of x (n, dim); ValueError if x or a length is not allowed."""
        check_vectors(x, self.quantizer.dim)
        lengths = mx.linalg.norm(x.astype(mx.float32), axis=-1)
        least = _SHORTEST if self.metric == "cosine" else 0
        # Infinite and NaN lengths fail one of these comparisons.
        wrong = ~((lengths >= least) & (lengths <= _LONGEST))
        if wrong.any():
            index = mx.argmax(wrong).item()
            raise ValueError(
                f"{what} {first + index} has the length {lengths[index].item():.3g}: "
                f"use finite values and a length from {least:g} to {_LONGEST:g}."
            )
        return lengths

    def _reserve(self, count: int) -> None:
        """Make room for ``count`` vectors; buffers grow by at least a half."""
        capacity = self._buffers["scales"].size
        if count > capacity:
            free = max(count, capacity + capacity // 2) - self._count
            grown = {
                name: mx.pad(self._used(name), [(0, free)] + [(0, 0)] * (buffer.ndim - 1))
                for name, buffer in self._buffers.items()
            }
            mx.eval(grown)
            self._buffers = grown

    def _nearest(self, queries: mx.array, k: int) -> tuple[mx.array, mx.array]:
        """Float32 closeness and ids, both (q, k), of the k vectors nearest to queries (q, dim)."""
        nearest = mx.zeros((len(queries), 0)), mx.zeros((len(queries), 0), mx.uint32)
        for start in range(0, self._count, self._tile):
            closeness = self._closeness(queries, start, min(start + self._tile, self._count))
            slots = mx.arange(start, start + closeness.shape[1], dtype=mx.uint32)
            tile = closeness, mx.broadcast_to(slots, closeness.shape)
            nearest = [mx.concatenate(pair, axis=-1) for pair in zip(nearest, tile)]
            if nearest[0].shape[1] > k:
                best = mx.argpartition(-nearest[0], k - 1, axis=-1)[:, :k]
                nearest = [mx.take_along_axis(x, best, axis=-1) for x in nearest]
            mx.eval(nearest)
        closeness, slots = nearest
        return closeness, self._buffers["ids"][slots]

    def _closeness(self, queries: mx.array, start: int, stop: int) -> mx.array:
        """Estimates (q, n) for a tile: cosines, products or negative squared distances."""
        packed = QuantizedVectors(
            self._buffers["codes"][start:stop], self._buffers["scales"][start:stop]
        )
        products = inner_product(queries, packed, self.quantizer)
        if self.metric != "l2":
            return products
        squared = queries.square().sum(axis=-1, keepdims=True)
        return 2 * products - self._buffers["squared_lengths"][start:stop] - squared

    def _exact_closeness(self, queries: mx.array, ids: mx.array, originals) -> mx.array:
        """Exact closeness (q, m) of queries (q, dim) to the originals of their ids (q, m)."""
        rows = []
        for query, row in zip(queries, np.array(ids)):
            x = mx.array(originals(row)).astype(mx.float32)
            if x.shape != (row.size, query.size):
                raise ValueError(
                    f"originals returned an array of shape {x.shape} for {row.size} ids: "
                    f"return one of shape {(row.size, query.size)}."
                )
            lengths = self._lengths(x, "Original", 0)
            if self.metric == "l2":
                rows.append(-(x - query).square().sum(axis=-1))
            else:
                rows.append(x @ query / (lengths if self.metric == "cosine" else 1))
        return mx.stack(rows)


def _tiles(x: Any, rows: int) -> Iterator[tuple[int, mx.array]]:
    """The first row of each tile of x (n, dim), and the tile."""
    for start in range(0, x.shape[0], rows):
        yield start, mx.array(x[start : start + rows])
