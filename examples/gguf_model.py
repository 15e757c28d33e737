"""Make a model folder for mlx-lm from a GGUF file: weights, configuration and tokenizer.

    pip install ".[real]"
    python examples/gguf_model.py MODEL.gguf FOLDER

It takes models of the architectures llama, qwen2 and gemma3. Quantized weights are restored and
stored in float16.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from mlx_turboquant.stored_arrays import StoredFile

ARCHITECTURES = ("llama", "qwen2", "gemma3")

_WHOLE_MODEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = {
    **_LAYER,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

# Qwen2 splits a text into these words before it looks for tokens in them.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Kinds of tokens in a GGUF file.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


class GGUFModel:
    """The contents of a GGUF file, in the form that mlx-lm needs.

    Raises:
        ValueError: an incomplete file, or a model that this module cannot convert.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            self._reader = gguf.GGUFReader(file)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise ValueError(f"{file} is not a complete GGUF file: download it again.") from error
        self.architecture = self._get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"{file} has the architecture {self.architecture}: "
                f"use a model of one of {', '.join(ARCHITECTURES)}."
            )
        self._tokens: list[str] = self._get("tokenizer.ggml.tokens")
        scaling = self._get(f"{self.architecture}.rope.scaling.type", "none")
        if scaling != "none":
            raise ValueError(
                f"{file} scales its rotary positions ({scaling}): use a model that does not."
            )

    def weights(self) -> Iterator[tuple[str, mx.array]]:
        """Yield the weights in float16 under the names of mlx-lm, one at a time."""
        for tensor in self._reader.tensors:
            name = self._weight_name(tensor.name)
            try:
                x = dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise ValueError(
                    f"{self.file} has weights of the kind {tensor.tensor_type.name}: "
                    "use a file with another quantization, as Q4_K_M or Q8_0."
                ) from error
            yield name, mx.array(self._as_in_mlx_lm(name, x)).astype(mx.float16)

    @property
    def tensor_count(self) -> int:
        """The number of weights."""
        return len(self._reader.tensors)

    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        is_gemma = self.architecture == "gemma3"
        config = {
            "model_type": "gemma3_text" if is_gemma else self.architecture,
            "hidden_size": self._field("embedding_length"),
            "num_hidden_layers": self._field("block_count"),
            "intermediate_size": self._field("feed_forward_length"),
            "num_attention_heads": self._field("attention.head_count"),
            "num_key_value_heads": self._field("attention.head_count_kv"),
            "rms_norm_eps": self._field("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._field("rope.freq_base"),
            "max_position_embeddings": self._field("context_length"),
            "vocab_size": len(self._tokens),
            "tie_word_embeddings": all(t.name != "output.weight" for t in self._reader.tensors),
            "eos_token_id": self._get("tokenizer.ggml.eos_token_id"),
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id", None),
        }
        head_dim = self._field("attention.key_length", None)
        if head_dim is not None:
            config["head_dim"] = head_dim
        if is_gemma:
            config |= {
                "query_pre_attn_scalar": self._field("attention.key_length"),
                "sliding_window": self._field("attention.sliding_window"),
                "sliding_window_pattern": 6,
                "rope_local_base_freq": 10_000.0,
            }
        return config

    def tokenizer(self) -> Tokenizer:
        """The contents of tokenizer.json."""
        kind = self._get("tokenizer.ggml.model")
        makers = {"gpt2": self._byte_level_tokenizer, "llama": self._sentencepiece_tokenizer}
        if kind not in makers:
            raise ValueError(
                f"{self.file} has a tokenizer of the kind {kind}: "
                f"use a model with one of {', '.join(makers)}."
            )
        tokenizer = makers[kind]()
        kinds = list(zip(self._tokens, self._get("tokenizer.ggml.token_type")))
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t, k in kinds if k == _CONTROL]
        )
        tokenizer.add_tokens(
            [AddedToken(t, normalized=False) for t, k in kinds if k == _USER_DEFINED]
        )
        if self._get("tokenizer.ggml.add_bos_token", kind == "llama"):
            number = self._get("tokenizer.ggml.bos_token_id")
            first = self._tokens[number]
            tokenizer.post_processor = TemplateProcessing(
                single=f"{first} $A", special_tokens=[(first, number)]
            )
        return tokenizer

    def tokenizer_config(self) -> dict[str, Any]:
        """The contents of tokenizer_config.json, with the chat template if there is one."""
        tokens = self._tokens
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self._field("context_length"),
            "eos_token": tokens[self._get("tokenizer.ggml.eos_token_id")],
        }
        bos = self._get("tokenizer.ggml.bos_token_id", None)
        if bos is not None:
            config["bos_token"] = tokens[bos]
        template = self._get("tokenizer.chat_template", None)
        if template is not None:
            config["chat_template"] = template
        return config

    def _weight_name(self, name: str) -> str:
        parts = name.split(".")
        layer = _GEMMA_LAYER if self.architecture == "gemma3" else _LAYER
        if len(parts) == 2 and parts[0] in _WHOLE_MODEL:
            return f"{_WHOLE_MODEL[parts[0]]}.{parts[1]}"
        if len(parts) == 4 and parts[0] == "blk" and parts[2] in layer:
            return f"model.layers.{parts[1]}.{layer[parts[2]]}.{parts[3]}"
        raise ValueError(
            f"{self.file} has a weight {name}, which a plain {self.architecture} has not: "
            "use a model without it."
        )

    def _as_in_mlx_lm(self, name: str, x: np.ndarray) -> np.ndarray:
        if self.architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            # A rotary pair is side by side in llama.cpp and half a head apart in mlx-lm.
            side = "head_count" if "q_proj" in name else "head_count_kv"
            heads = self._field(f"attention.{side}")
            pairs = x.reshape(heads, -1, 2, *x.shape[1:])
            return pairs.swapaxes(1, 2).reshape(x.shape)
        if self.architecture == "gemma3" and name.endswith("norm.weight"):
            return x - 1  # mlx-lm adds 1 itself, and llama.cpp has already added it
        return x

    def _byte_level_tokenizer(self) -> Tokenizer:
        vocabulary = {token: number for number, token in enumerate(self._tokens)}
        merges = [tuple(pair.split(" ", 1)) for pair in self._get("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        byte_level, kind = pre_tokenizers.ByteLevel, self._get("tokenizer.ggml.pre")
        if kind == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
            words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
            to_bytes = byte_level(add_prefix_space=False, use_regex=False)
        elif kind == "smollm":
            words = pre_tokenizers.Digits(individual_digits=True)
            to_bytes = byte_level(add_prefix_space=False)
        else:
            raise ValueError(
                f"{self.file} has a tokenizer that cuts words as {kind!r} does: "
                "use a model with one that does as qwen2 or smollm."
            )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentencepiece_tokenizer(self) -> Tokenizer:
        """A BPE tokenizer whose merges are ranked by SentencePiece's scores."""
        if self._get("tokenizer.ggml.add_space_prefix", True):
            raise ValueError(
                f"{self.file} has a tokenizer that puts a space in front of a text: "
                "use a model with one that does not."
            )
        vocabulary = {token: number for number, token in enumerate(self._tokens)}
        scores, kinds = (self._get(f"tokenizer.ggml.{key}") for key in ("scores", "token_type"))
        ranked = sorted(
            (-scores[number], number, (token[:cut], token[cut:]))
            for token, number in vocabulary.items()
            if kinds[number] == _NORMAL
            for cut in range(1, len(token))
            if token[:cut] in vocabulary and token[cut:] in vocabulary
        )
        model = models.BPE(
            vocab=vocabulary,
            merges=[pair for _, _, pair in ranked],
            unk_token=self._tokens[self._get("tokenizer.ggml.unknown_token_id")],
            fuse_unk=True,
            byte_fallback=True,
        )
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        return tokenizer

    def _field(self, key: str, *default: Any) -> Any:
        return self._get(f"{self.architecture}.{key}", *default)

    def _get(self, key: str, *default: Any) -> Any:
        field = self._reader.fields.get(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise ValueError(f"{self.file} does not say its {key}: use a file that does.")


def write_model(file: Path, folder: Path, progress: Callable[[], Any] = lambda: None) -> None:
    """Convert a GGUF file into a complete folder, or none. ``progress`` is called per weight.

    Raises:
        ValueError: a file that cannot be converted, or a folder that already exists.
        OSError: the folder cannot be written, for example because the disk is full.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists: use the name of a new folder.")
    model = GGUFModel(file)
    texts = {
        "config.json": json.dumps(model.config(), indent=1) + "\n",
        "tokenizer_config.json": json.dumps(model.tokenizer_config(), indent=1) + "\n",
        "tokenizer.json": model.tokenizer().to_str(pretty=True),
    }
    weights = {}
    for name, weight in model.weights():
        mx.eval(weight)
        weights[name] = weight
        progress()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        weights_file = unfinished / "model.safetensors"
        try:
            for name, text in texts.items():
                (unfinished / name).write_text(text, encoding="utf-8")
            mx.save_safetensors(str(weights_file), weights, metadata={"format": "mlx"})
            StoredFile(weights_file)  # MLX does not notice a truncated file
        except (OSError, RuntimeError, ValueError) as error:
            raise OSError(f"{folder} cannot be written whole: is there space for it?") from error
        unfinished.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="MODEL.gguf")
    parser.add_argument("folder", type=Path, help="folder to make")
    args = parser.parse_args()
    try:
        write_model(args.file, args.folder)
    except (ValueError, OSError) as error:
        print(f"gguf_model: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
