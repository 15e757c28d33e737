import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_turboquant.lm.texts import (
    bundled_texts,
    contexts,
    encode,
    pieces,
    read_texts,
    start_tokens,
)


def test_the_bundled_texts_are_prose_and_source_and_long(tiny_lm):
    prose, *sources = bundled_texts()
    assert prose.count(" the ") > 3000
    assert all("import" in source for source in sources)
    lengths = [len(tokens) for tokens in encode(tiny_lm[1], [prose, *sources])]
    assert sum(lengths) > 150_000 and min(lengths) > 10_000


@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(1, 60), st.integers(1, 9))
def test_pieces_have_their_length_and_do_not_overlap(sizes, length, count):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    texts = [list(range(start, start + size)) for start, size in zip(starts, sizes)]
    if sum(sizes) < length:
        with pytest.raises(ValueError, match=f"has {sum(sizes)} tokens and {length} are needed"):
            pieces(texts, length, count)
        return
    cut = pieces(texts, length, count)
    assert 1 <= len(cut) <= count
    assert all(piece == list(range(piece[0], piece[0] + length)) for piece in cut)
    tokens = [token for piece in cut for token in piece]
    assert len(set(tokens)) == len(tokens)


def test_every_text_gives_its_first_piece_before_one_gives_a_second():
    assert pieces([[1, 2, 3, 4], [5, 6]], 2, 3) == [[1, 2], [5, 6], [3, 4]]


class WithStart:
    """A tokenizer of characters that begins a text with token 1, as Gemma's does with <bos>."""

    def encode(self, text, add_special_tokens=True, verbose=True):
        return [1] * add_special_tokens + [ord(character) for character in text]


def test_every_context_begins_with_the_start_tokens_of_the_model(tiny_lm):
    assert start_tokens(WithStart()) == [1] and start_tokens(tiny_lm[1]) == []
    assert contexts(WithStart(), ["abcdefg"], 4, 3) == [[1, *b"abc"], [1, *b"def"]]


def test_a_text_that_is_too_short_is_named():
    with pytest.raises(ValueError, match="book.txt has 3 tokens and 4 are needed: give a longer"):
        contexts(WithStart(), ["abc"], 5, 1, "book.txt")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "picture"
    file.write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match="picture is not UTF-8 text: convert it to UTF-8."):
        read_texts([file])
