"""Functions that damage files: each takes the contents of a file and returns damaged ones."""

import random


def truncated(contents: bytes) -> bytes:
    return contents[: len(contents) // 2]


def with_flipped_bits(contents: bytes) -> bytes:
    """Flip 200 random bits."""
    contents, rng = bytearray(contents), random.Random(0)
    for place in rng.sample(range(len(contents)), 200):
        contents[place] ^= 1 << rng.randrange(8)
    return bytes(contents)


def claiming_terabytes(contents: bytes) -> bytes:
    return (1 << 42).to_bytes(8, "little") + contents[8:]


def emptied(contents: bytes) -> bytes:
    return b""
