"""Arrays in files can be read in parts, and are refused if they have changed."""

import os
import zlib
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_turboquant import stored_arrays
from mlx_turboquant.files import write_whole
from mlx_turboquant.stored_arrays import StoredFile, room_for_checksums

PIECE = 64
DTYPES = [mx.bool_, mx.uint8, mx.int16, mx.uint32, mx.int64, mx.float16, mx.bfloat16, mx.float32]


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    """Make pieces small, so that arrays of some bytes lie in several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_arrays, "PIECE_BYTES", PIECE)
        yield


def numbers(shape: tuple[int, ...], dtype: mx.Dtype = mx.uint32) -> mx.array:
    return mx.random.randint(0, 100, shape).astype(dtype)


def saved(file: Path, arrays: dict[str, mx.array]) -> StoredFile:
    metadata = {
        "checksums": room_for_checksums(sum(x.nbytes for x in arrays.values())),
        "a": "text",
    }
    write_whole(file, lambda path: mx.save_safetensors(str(path), arrays, metadata))
    return StoredFile(file)


def data_start(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_of_every_dtype_are_read_as_they_were_written(tmp_path, dtype):
    arrays = {str(shape): numbers(shape, dtype) for shape in ((), (0,), (5,), (2, 3, 40))}
    stored = saved(tmp_path / "x.safetensors", arrays)
    assert stored.metadata["a"] == "text"
    for name, x in zip(stored.arrays, stored.load(list(stored.arrays.values())), strict=True):
        assert x.dtype == dtype and mx.array_equal(x, arrays[name])


@given(data=st.data())
def test_any_beginning_along_the_third_axis_is_read(tmp_path_factory, data):
    size = st.integers(1, 5)
    shape = (data.draw(size), data.draw(size), data.draw(st.integers(1, 50)), data.draw(size))
    shape = shape[: data.draw(st.integers(3, 4))]
    before, x = numbers((data.draw(st.integers(0, 40)),)), numbers(shape)
    stored = saved(tmp_path_factory.mktemp("files") / "x.safetensors", {"before": before, "x": x})
    first, second = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 60))
    part = stored.arrays["x"]
    for count in (first, second):
        part, x = part[:, :, :count], x[:, :, :count]
        assert part.shape == x.shape
        assert mx.array_equal(stored.load([part])[0], x)


def test_of_a_beginning_little_more_is_read(tmp_path, monkeypatch):
    rows, tokens, row_bytes = 4, 100, 4000
    stored = saved(tmp_path / "x.safetensors", {"x": numbers((1, rows, 1000))})
    read, pread = [], os.pread

    def counted(*arguments) -> bytes:
        read.append(pread(*arguments))
        return read[-1]

    monkeypatch.setattr(os, "pread", counted)
    stored.load([stored.arrays["x"][:, :, :tokens]])
    assert (
        rows * 4 * tokens
        <= sum(map(len, read))
        <= rows * (4 * tokens + 2 * PIECE)
        < rows * row_bytes / 2
    )


def test_every_changed_bit_of_what_is_read_is_found_and_only_there(tmp_path):
    file = tmp_path / "x.safetensors"
    x = numbers((1, 1, 100))
    saved(file, {"x": x})
    data, start = file.read_bytes(), data_start(file)
    for place in range(len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        is_read = place < start + PIECE
        try:
            stored = StoredFile(file)
            [loaded] = stored.load([stored.arrays["x"][:, :, : PIECE // 4]])
        except (ValueError, KeyError):
            assert is_read
        else:
            assert not is_read and mx.array_equal(loaded, x[:, :, : PIECE // 4])


def test_checksums_are_those_of_the_header_and_of_each_piece(tmp_path):
    file = tmp_path / "x.safetensors"
    checksums = saved(file, {"x": numbers((40,))}).metadata["checksums"]
    start, contents = data_start(file), file.read_bytes()
    header = contents[:start].replace(checksums[:8].encode(), b"00000000", 1)
    pieces = (contents[i : i + PIECE] for i in range(start, len(contents), PIECE))
    assert checksums == "".join(f"{zlib.crc32(part):08x}" for part in (header, *pieces))


def test_a_file_that_becomes_shorter_while_it_is_read_is_damaged(tmp_path):
    file = tmp_path / "x.safetensors"
    stored = saved(file, {"x": numbers((100,))})
    os.truncate(file, data_start(file) + 100)
    with pytest.raises(ValueError, match="is damaged"):
        stored.load([stored.arrays["x"]])


def test_a_file_without_checksums_is_damaged(tmp_path):
    file = tmp_path / "x.safetensors"
    mx.save_safetensors(str(file), {"x": numbers((3,))}, {"format": "mlx"})
    stored = StoredFile(file)
    assert stored.arrays["x"].shape == (3,)
    with pytest.raises(ValueError, match="is damaged .its checksum does not match"):
        stored.load(list(stored.arrays.values()))
