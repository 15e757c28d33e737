"""Tiny models and tokenizers as GGUF files, in llama.cpp's names and layout."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import sentencepiece
from mlx.utils import tree_flatten, tree_map
from tiny_families import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from mlx_turboquant.lm.texts import bundled_texts

TEXT = "".join(text[:30_000] for text in bundled_texts()) + "2024 12345 e = mc2, don't!\n" * 99
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}"
_CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_USER_DEFINED_TOKENS = ["\n", "\n\n", "▁▁", "▁▁▁", "<table>"]
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
_SETTINGS = {
    "llama": _SMALL,
    "qwen2": {**_SMALL, "hidden_size": 128},
    "gemma3": {
        **_SMALL,
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 32,
        "sliding_window_pattern": 6,
    },
}


def gguf_model(architecture: str, is_tied: bool = True, **settings) -> nn.Module:
    """A float16 model with random weights, including norms and biases."""
    model = tiny_model(
        architecture,
        tie_word_embeddings=is_tied,
        **{"rms_norm_eps": 1e-4, "rope_theta": 5000.0, **_SETTINGS[architecture], **settings},
    )
    if architecture == "gemma3" and is_tied:
        model.sanitize({})

    def random(parameter: mx.array) -> mx.array:
        if parameter.ndim < 2:
            # Multiples of 1/1024 below 2 are exact in float16; one more is exact in float32.
            parameter = mx.random.randint(-1024, 1024, parameter.shape) / 1024
        return parameter.astype(mx.float16)

    model.update(tree_map(random, model.parameters()))
    mx.eval(model.parameters())
    return model


def model_fields(model: nn.Module) -> dict[str, Any]:
    """The fields of a GGUF file about a model."""
    arguments = model.args
    architecture = arguments.model_type.removesuffix("_text")
    fields = {
        "context_length": arguments.max_position_embeddings,
        "embedding_length": arguments.hidden_size,
        "block_count": arguments.num_hidden_layers,
        "feed_forward_length": arguments.intermediate_size,
        "attention.head_count": arguments.num_attention_heads,
        "attention.head_count_kv": arguments.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": arguments.rms_norm_eps,
        "rope.freq_base": arguments.rope_theta,
    }
    if architecture != "qwen2":
        fields["attention.key_length"] = arguments.head_dim
    if architecture == "gemma3":
        fields["attention.sliding_window"] = arguments.sliding_window
    named = {f"{architecture}.{key}": value for key, value in fields.items()}
    return {"general.architecture": architecture, **named}


def model_tensors(model: nn.Module) -> dict[str, np.ndarray]:
    """The weights of a model in llama.cpp's names and layout."""
    arguments = model.args
    architecture = arguments.model_type.removesuffix("_text")
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[architecture.upper()], arguments.num_hidden_layers
    )
    tensors = {}
    for name, weight in tree_flatten(model.parameters()):
        x = np.array(weight)
        has_halves = architecture == "llama" and not arguments.rope_traditional
        if has_halves and ("q_proj" in name or "k_proj" in name):
            pairs = x.reshape(-1, 2, arguments.head_dim // 2, *x.shape[1:])
            x = pairs.swapaxes(1, 2).reshape(x.shape)
        if x.ndim == 1:
            x = x.astype(np.float32) + (architecture == "gemma3")
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = x
    return tensors


@cache
def byte_level_tokenizer(kind: str) -> Tokenizer:
    """A small tokenizer that splits text into words as SmolLM2's or Qwen2's does."""
    if kind == "smollm":
        tokenizer = Tokenizer(models.BPE())
        words = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Qwen2Tokenizer().backend_tokenizer
        words = tokenizer.pre_tokenizer
    # It learns tokens across words, so that another way to split words would show.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=_CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer.pre_tokenizer = words
    return tokenizer


def tokenizer_fields(kind: str) -> dict[str, Any]:
    """The fields of a GGUF file about a tokenizer: smollm, qwen2 or sentencepiece."""
    fields = _sentencepiece_fields() if kind == "sentencepiece" else _byte_level_fields(kind)
    return {**fields, "tokenizer.chat_template": CHAT_TEMPLATE}


def _byte_level_fields(kind: str) -> dict[str, Any]:
    tokenizer = byte_level_tokenizer(kind)
    tokens = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            _CONTROL if token in _CONTROL_TOKENS else _NORMAL for token in tokens
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


@cache
def sentencepiece_tokenizer() -> sentencepiece.SentencePieceProcessor:
    """A small tokenizer with the settings of Gemma's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        control_symbols=["<start_of_turn>"],
        user_defined_symbols=_USER_DEFINED_TOKENS,
        minloglevel=1,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def _sentencepiece_fields() -> dict[str, Any]:
    tokenizer = sentencepiece_tokenizer()
    numbers = range(len(tokenizer))
    tokens, kinds = tokenizer.id_to_piece(list(numbers)), [_NORMAL] * len(tokenizer)
    for number in numbers:
        if tokenizer.is_unknown(number):
            kinds[number] = _UNKNOWN
        elif tokenizer.is_control(number):
            kinds[number] = _CONTROL
        elif tokenizer.is_byte(number):
            kinds[number] = _BYTE
        elif tokens[number] in _USER_DEFINED_TOKENS:
            kinds[number] = _USER_DEFINED
            tokens[number] = tokens[number].replace("▁", " ")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": tokenizer.get_score(list(numbers)),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id(),
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id(),
        "tokenizer.ggml.unknown_token_id": tokenizer.unk_id(),
        "tokenizer.ggml.add_space_prefix": False,
    }


def write_gguf(
    file: Path,
    fields: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kind: gguf.GGMLQuantizationType | None = None,
) -> None:
    """Write a GGUF file; arrays of uint8 hold weights of the ``kind``."""
    writer = gguf.GGUFWriter(file, "")
    writer.kv_data[0].clear()  # an architecture, which may not be among the fields
    for key, value in fields.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, x in tensors.items():
        writer.add_tensor(name, x, raw_dtype=kind if x.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
