import resource
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import gguf
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import REPOSITORY
from gguf.quants import dequantize, quantize
from gguf_model import write_model
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny_gguf import (
    TEXT,
    byte_level_tokenizer,
    gguf_model,
    model_fields,
    model_tensors,
    sentencepiece_tokenizer,
    tokenizer_fields,
    write_gguf,
)
from tokenizers import Tokenizer
from tokens import random_tokens

ARCHITECTURES = {"smollm": "llama", "qwen2": "qwen2", "sentencepiece": "gemma3"}
# Versions of Unicode may differ in the normal form of unassigned characters.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
PARTS = st.one_of(
    st.text(CHARACTERS, max_size=8),
    st.sampled_from(["  ", "\n\n\n", "2024", "é", "e\u0301", "<table>", "日本"]),
    st.integers(0, len(TEXT)).map(lambda start: TEXT[start : start + 50]),
)
TEXTS = st.lists(PARTS, max_size=8).map("".join)


def model_for(kind: str, **settings) -> nn.Module:
    """A model with the vocabulary of a kind of tokenizer."""
    vocabulary = len(tokenizer_fields(kind)["tokenizer.ggml.tokens"])
    return gguf_model(ARCHITECTURES[kind], vocab_size=vocabulary, **settings)


def convert(
    folder: Path, model: nn.Module, fields: dict, tensors: dict | None = None, kind=None
) -> tuple[nn.Module, TokenizerWrapper]:
    """Write a model as a GGUF file, convert it, and return what mlx-lm loads."""
    file = folder / "model.gguf"
    write_gguf(file, {**model_fields(model), **fields}, tensors or model_tensors(model), kind)
    write_model(file, folder / "model")
    return mlx_lm.load(str(folder / "model"))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_model_comes_back_with_the_same_weights_and_logits(tmp_path, kind, is_tied):
    model = model_for(kind, is_tied=is_tied)
    loaded, _ = convert(tmp_path, model, tokenizer_fields(kind))
    expected, weights = (dict(tree_flatten(each.parameters())) for each in (model, loaded))
    assert weights.keys() == expected.keys()
    assert all(weights[name].dtype == mx.float16 for name in weights)
    assert all(mx.array_equal(weights[name], expected[name]) for name in weights)
    assert loaded.args.max_position_embeddings == model.args.max_position_embeddings
    tokens = random_tokens(2, 40, vocabulary=model.args.vocab_size)
    assert mx.array_equal(loaded(tokens), model(tokens))


def test_the_queries_and_keys_of_llama_files_have_rotary_pairs_side_by_side(tmp_path):
    model = model_for("smollm", rope_traditional=True)
    loaded, _ = convert(tmp_path, model, tokenizer_fields("smollm"))
    tokens = random_tokens(2, 40, vocabulary=model.args.vocab_size)
    for each in (model, loaded):
        each.set_dtype(mx.float32)
    # Logits have size 1; the 32 products of a query and a key are added in another order.
    assert mx.abs(loaded(tokens) - model(tokens)).max() < 1e-5


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantized_weights_are_what_the_file_says_in_float16(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    model = model_for("qwen2")
    tensors = model_tensors(model)
    for name, x in tensors.items():
        if x.ndim == 2:
            tensors[name] = quantize(x.astype(np.float32), kind)
    loaded, _ = convert(tmp_path, model, tokenizer_fields("qwen2"), tensors, kind)
    weights = model_tensors(loaded)
    assert weights.keys() == tensors.keys()
    for name, x in tensors.items():
        expected = dequantize(x, kind) if x.dtype == np.uint8 else x
        assert np.array_equal(weights[name], expected.astype(np.float16))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: tmp_path_factory.mktemp(kind) for kind in ARCHITECTURES}


@pytest.fixture(scope="module")
def tokenizers(folders) -> dict[str, TokenizerWrapper]:
    """The tokenizers that mlx-lm loads, by kind."""
    return {
        kind: convert(folder, model_for(kind), tokenizer_fields(kind))[1]
        for kind, folder in folders.items()
    }


@pytest.fixture(scope="module")
def tokenizer_files(folders, tokenizers) -> dict[str, Tokenizer]:
    """The tokenizers in the files; for that of Qwen2, mlx-lm loads a class of its own."""
    return {
        kind: Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
        for kind, folder in folders.items()
    }


@pytest.mark.parametrize("kind", ["smollm", "qwen2"])
@given(text=TEXTS)
def test_byte_level_tokens_are_those_of_the_tokenizer_and_make_up_the_text(
    tokenizers, tokenizer_files, kind, text
):
    tokens = byte_level_tokenizer(kind).encode(text).ids
    assert tokenizers[kind].encode(text) == tokens
    assert tokenizer_files[kind].encode(text).ids == tokens
    normal = unicodedata.normalize("NFC", text) if kind == "qwen2" else text
    assert tokenizers[kind].decode(tokens) == normal
    assert tokenizer_files[kind].decode(tokens) == normal


@given(text=TEXTS)
def test_sentencepiece_tokens_are_those_of_the_tokenizer_after_a_first_one(tokenizers, text):
    reference = sentencepiece_tokenizer()
    first, *tokens = tokenizers["sentencepiece"].encode(text)
    assert first == reference.bos_id()
    assert tokens == reference.encode(text)
    assert tokenizers["sentencepiece"].decode(tokens) == text.replace("▁", " ")


@pytest.mark.parametrize(
    "kind, special",
    [("smollm", "<|im_end|>"), ("qwen2", "<|im_start|>"), ("sentencepiece", "<start_of_turn>")],
)
def test_a_special_token_in_a_text_stays_one_token(tokenizers, kind, special):
    tokenizer = tokenizers[kind]
    [before, number, after] = (
        tokenizer.encode(text, add_special_tokens=False) for text in ("Who?", special, " I")
    )
    assert len(number) == 1
    tokens = tokenizer.encode(f"Who?{special} I", add_special_tokens=False)
    assert tokens == before + number + after
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "Who? I"


@pytest.mark.parametrize("kind, first", [("smollm", 1), ("sentencepiece", 2)])
@pytest.mark.parametrize("has_first", [True, False])
def test_the_file_says_if_a_token_stands_in_front_of_every_text(tmp_path, kind, first, has_first):
    fields = {**tokenizer_fields(kind), "tokenizer.ggml.add_bos_token": has_first}
    _, tokenizer = convert(tmp_path, model_for(kind), fields)
    text = tokenizer.encode("Hello", add_special_tokens=False)
    assert text[0] != first
    assert tokenizer.encode("Hello") == [first] * has_first + text


@pytest.mark.parametrize(
    "kind, first, last", [("smollm", 1, 2), ("qwen2", 1, 2), ("sentencepiece", 2, 1)]
)
def test_the_first_and_the_last_token_and_the_chat_template_are_kept(tokenizers, kind, first, last):
    tokenizer = tokenizers[kind]
    assert tokenizer.bos_token_id == first
    assert tokenizer.eos_token_ids == {last}
    messages = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>Hello"


def test_a_file_may_have_no_first_token_and_no_chat_template(tmp_path):
    fields = tokenizer_fields("qwen2")
    for field in ("ggml.bos_token_id", "ggml.add_bos_token", "chat_template"):
        del fields[f"tokenizer.{field}"]
    _, tokenizer = convert(tmp_path, model_for("qwen2"), fields)
    assert tokenizer.bos_token is None
    assert not tokenizer.has_chat_template


def contents(kind: str = "smollm") -> tuple[dict, dict]:
    """Fields and tensors of a file that can be converted."""
    model = model_for(kind)
    return {**model_fields(model), **tokenizer_fields(kind)}, model_tensors(model)


def refusal(folder: Path, fields: dict, tensors: dict, kind=None) -> str:
    """The message for a refused file, which leaves no other file behind."""
    file = folder / "bad.gguf"
    write_gguf(file, fields, tensors, kind)
    with pytest.raises(ValueError) as caught:
        write_model(file, folder / "models" / "new")
    assert list(folder.iterdir()) == [file]
    message = str(caught.value)
    assert message.startswith(f"{file} ")
    return message


@pytest.mark.parametrize(
    "field, value, reason",
    [
        (
            "general.architecture",
            "mamba",
            "has the architecture mamba: use a model of one of llama, qwen2, gemma3.",
        ),
        (
            "llama.rope.scaling.type",
            "yarn",
            "scales its rotary positions (yarn): use a model that does not.",
        ),
        (
            "tokenizer.ggml.model",
            "bert",
            "has a tokenizer of the kind bert: use a model with one of gpt2, llama.",
        ),
        (
            "tokenizer.ggml.pre",
            "gpt-2",
            "has a tokenizer that cuts words as 'gpt-2' does: "
            "use a model with one that does as qwen2 or smollm.",
        ),
    ],
)
def test_other_models_are_refused(tmp_path, field, value, reason):
    fields, tensors = contents()
    assert refusal(tmp_path, {**fields, field: value}, tensors).endswith(reason)


@pytest.mark.parametrize("changes", [{}, {"tokenizer.ggml.add_space_prefix": True}])
def test_a_tokenizer_that_puts_a_space_in_front_is_refused(tmp_path, changes):
    fields, tensors = contents("sentencepiece")
    del fields["tokenizer.ggml.add_space_prefix"]
    message = refusal(tmp_path, {**fields, **changes}, tensors)
    assert "puts a space in front of a text: use a model with one that does not" in message


@pytest.mark.parametrize(
    "kind, optional",
    [
        ("smollm", {"llama.attention.key_length", "tokenizer.ggml.bos_token_id"}),
        ("qwen2", {"tokenizer.ggml.bos_token_id"}),
        ("sentencepiece", {"tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix"}),
    ],
)
def test_a_file_without_a_field_that_is_needed_is_refused(tmp_path, kind, optional):
    fields, tensors = contents(kind)
    optional = optional | {"tokenizer.ggml.add_bos_token", "tokenizer.chat_template"}
    for field in fields.keys() - optional:
        others = {key: value for key, value in fields.items() if key != field}
        message = refusal(tmp_path, others, tensors)
        assert message.endswith(f"does not say its {field}: use a file that does.")


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.ffn_gate_inp.weight", "v.weight"])
def test_a_weight_that_the_architecture_has_not_is_refused(tmp_path, name):
    fields, tensors = contents()
    message = refusal(tmp_path, fields, {**tensors, name: np.ones(32, np.float32)})
    assert f"has a weight {name}, which a plain llama has not: use a model" in message


def test_weights_of_a_kind_that_cannot_be_read_are_refused(tmp_path):
    fields, tensors = contents()
    kind = gguf.GGMLQuantizationType.Q8_K
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    tensors["output.weight"] = np.zeros((block, nbytes), np.uint8)
    message = refusal(tmp_path, fields, tensors, kind)
    assert message.endswith(
        "has weights of the kind Q8_K: use a file with another quantization, as Q4_K_M or Q8_0."
    )


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory) -> tuple[bytes, int]:
    """A file that can be converted, and where its weights begin."""
    file = tmp_path_factory.mktemp("whole") / "whole.gguf"
    write_gguf(file, *contents())
    return file.read_bytes(), gguf.GGUFReader(file).data_offset


def assert_not_complete(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.gguf"
        file.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            write_model(file, file.with_name("new"))
        assert str(caught.value) == f"{file} is not a complete GGUF file: download it again."
        assert list(file.parent.iterdir()) == [file]


@given(data=st.data())
def test_a_file_that_is_cut_off_anywhere_is_refused(whole_file, data):
    content, weights = whole_file
    before, within = st.integers(0, weights), st.integers(weights, len(content) - 1)
    assert_not_complete(content[: data.draw(before | within)])


@given(st.binary(max_size=400), st.booleans())
def test_a_file_of_any_bytes_is_refused(content, has_magic):
    assert_not_complete(b"GGUF\3\0\0\0" * has_magic + content)


def test_a_folder_that_exists_is_left_as_it_is(tmp_path):
    file, folder = tmp_path / "model.gguf", tmp_path / "folder"
    write_gguf(file, *contents())
    folder.mkdir()
    (folder / "notes").write_text("mine")
    with pytest.raises(ValueError, match="folder exists: use the name of a new folder."):
        write_model(file, folder)
    assert [each.read_text() for each in folder.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, name):
    file = tmp_path / "model.gguf"
    write_gguf(file, *contents())
    write_model(file, tmp_path / "folder")
    nbytes = (tmp_path / "folder" / name).stat().st_size - 1
    shutil.rmtree(tmp_path / "folder")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))  # what fits on the disk
    try:
        with pytest.raises(OSError, match="folder cannot be written whole: is there space"):
            write_model(file, tmp_path / "folder")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [file]
    write_model(file, tmp_path / "folder")
    mlx_lm.load(str(tmp_path / "folder"))


def test_progress_is_told_of_every_weight_and_may_stop_the_work(tmp_path):
    file, told = tmp_path / "model.gguf", []
    fields, tensors = contents()
    write_gguf(file, fields, tensors)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_model(file, tmp_path / "folder", interrupt)
    assert list(tmp_path.iterdir()) == [file]
    write_model(file, tmp_path / "folder", lambda: told.append(1))
    assert len(told) == len(tensors)


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "examples" / "gguf_model.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_makes_a_folder(tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, *contents())
    result = run(file, tmp_path / "models" / "new")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    mlx_lm.load(str(tmp_path / "models" / "new"))


@pytest.mark.parametrize(
    "name, reason",
    [("missing.gguf", "No such file"), ("folder", "directory"), ("bad.gguf", "not a complete")],
)
def test_the_command_says_in_one_line_why_a_file_is_refused(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    before = set(tmp_path.iterdir())
    result = run(tmp_path / name, tmp_path / "new")
    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith("gguf_model: ") and name in line and reason in line
    assert set(tmp_path.iterdir()) == before
