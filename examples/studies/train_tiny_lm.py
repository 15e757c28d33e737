"""Train examples/tiny-lm: a small Llama that writes Python and finds codes in 8192 tokens.

    python examples/studies/train_tiny_lm.py --out my-tiny-lm

The text is Python source code, by default this interpreter's standard library. Some sequences hide
passkeys (see examples/hidden_codes.py) and end with questions about them. Short contexts,
in which the lookup is learned quickly, come first. The model is quantized to 8 bits, saved in
mlx-lm's format, loaded again and evaluated. An H200 takes eight minutes. To try all on a CPU:
``--steps 6 --scale 0.02 --passkey-prompts 1 --held-out-tokens 8192``.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model, load, quantize_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parent.parent))  # of the examples

import hidden_codes

from mlx_turboquant.measure.passages import random_names

CONFIG = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=4096, hidden_size=320,
    intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1,
    head_dim=128, max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5,
    attention_bias=False, mlp_bias=False, tie_word_embeddings=True, hidden_act="silu",
    bos_token_id=0, eos_token_id=0, torch_dtype="bfloat16",
)  # fmt: skip
END = "<|endoftext|>"
# (context, rows per batch, share of all steps, share of rows that hide passkeys)
STAGES = [(512, 64, 0.06, 0.6), (2048, 32, 0.74, 0.2), (8192, 8, 0.20, 0.5)]
PEAK_LEARNING_RATE = 2e-3
# Strong weight decay and dropout prevent memorization: the text is read many times.
WEIGHT_DECAY = 1.0
DROPOUT = 0.15
ANSWER_WEIGHT = 4.0


class DropoutBlock(llama.TransformerBlock):
    """mlx-lm's block with dropout on both residual branches; parameters keep their names."""

    def __init__(self, arguments):
        super().__init__(arguments)
        self.dropout = nn.Dropout(DROPOUT)

    def __call__(self, x, mask=None, cache=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


def make_model():
    """The model with random weights, in float32."""
    arguments = llama.ModelArgs.from_dict(CONFIG)
    model = llama.Model(arguments)
    model.model.layers = [DropoutBlock(arguments) for _ in model.layers]
    return model


def read_texts(folders):
    """Two lists of source texts: about 19 of 20 file names for training, the others held out.

    The file name decides, so that two versions of a module are on the same side.
    """
    sides, seen = ([], []), set()
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("*.py")):
            # Encodings are tables of numbers, and installed packages have other licences.
            if {"site-packages", "dist-packages", "encodings"} & set(path.parts):
                continue
            data = path.read_bytes()
            digest = hashlib.sha256(data).digest()
            try:
                text = data.decode("utf-8").strip()
            except UnicodeDecodeError:
                continue  # a few of the library's tests are in other encodings
            if digest not in seen and len(text) > 200:
                held_out = hashlib.sha256(path.name.encode()).digest()[0] % 20 == 0
                sides[held_out].append(text)
                seen.add(digest)
    if not all(sides):
        raise SystemExit(f"Too few Python files in {folders}: give other folders with --text.")
    return sides


def train_tokenizer(texts):
    """A byte-level BPE tokenizer in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer, texts):
    """All texts in random order as one array of tokens, with END after each."""
    texts = random.Random(0).sample(texts, len(texts))
    encoded = [e.ids + [0] for e in tokenizer.encode_batch(texts)]
    return np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded])


def prepare(folder, texts):
    """The tokenizer and the training and held-out tokens, made once and kept in ``folder``."""
    if not (folder / "tokens.npz").exists():
        folder.mkdir(parents=True, exist_ok=True)
        training, held_out = read_texts(texts)
        tokenizer = train_tokenizer(training)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        sides = {"training": training, "held_out": held_out}
        np.savez(folder / "tokens.npz", **{k: tokenize(tokenizer, v) for k, v in sides.items()})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = np.load(folder / "tokens.npz")
    return tokenizer, tokens["training"], tokens["held_out"]


class WordEncoder:
    """A tokenizer that caches words and digits, for the many short lines of passkeys."""

    def __init__(self, tokenizer):
        self.tokenizer, self.words = tokenizer, {}
        self.pieces = [tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())]

    def encode(self, text, add_special_tokens=False):
        tokens = []
        for word in re.findall(r"\d|\s+(?=\d)|\s?[^\s\d]+|\s", text):
            if word not in self.words:
                self.words[word] = self.tokenizer.encode(word).ids
            tokens += self.words[word]
        return tokens

    def decode(self, tokens):
        return self.pieces[tokens[0]]


def passkey_row(encoder, text, context, rng):
    """Tokens and weights, ``context + 1`` each: text with hidden codes, then all the questions."""
    count = rng.randint(1, min(8, context // 96))
    # In every other row names share words, so both words of a name must be looked up.
    names = random_names(count, rng, words=rng.choice((3, 64)))
    codes = [hidden_codes.random_code(rng) for _ in names]
    lines = [hidden_codes.code_line(*pair) for pair in zip(names, codes, strict=True)]
    tail, weights = [], []
    for name, code in rng.sample(list(zip(names, codes, strict=True)), count):
        asked = encoder.encode("\n" + hidden_codes.question(name))
        answered = encoder.encode(hidden_codes.answer(code)) + [0]
        tail += asked + answered
        weights += [1.0] * len(asked) + [ANSWER_WEIGHT] * len(answered)
    length = context + 1 - len(tail)
    body = hidden_codes.hide_lines(encoder, text, length, lines, rng)
    return body + tail, [1.0] * length + weights


def make_batch(encoder, stream, stage, scale, seed, step):
    """Tokens (rows, context + 1) and their weights in the loss; the same for the same seed."""
    context, rows, _, share = stage
    rng = random.Random(f"{seed} {step}")
    batch = []
    for _ in range(max(1, round(rows * scale))):
        start = rng.randrange(len(stream) - context)
        text = stream[start : start + context + 1].tolist()
        row = text, [1.0] * len(text)
        if rng.random() < share:
            try:
                row = passkey_row(encoder, text, context, rng)
            except ValueError:
                pass  # a text of very long lines has no room for codes and stays unchanged
        batch.append(row)
    tokens, weights = zip(*batch, strict=True)
    return np.array(tokens, dtype=np.int32), np.array(weights, dtype=np.float32)


def stage_of_step(steps):
    """The stage of each step, a list of ``steps`` entries."""
    ends = np.cumsum([share for _, _, share, _ in STAGES]) * steps
    return [STAGES[int(np.searchsorted(ends, step, side="right"))] for step in range(steps)]


def token_losses(model, tokens):
    """Cross-entropy of each next token, (rows, context), in float32."""
    logits = model(tokens[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="none")


def held_out_loss(model, tokens, context):
    """The mean loss of tokens in windows of ``context`` tokens, each read from its start."""
    windows = len(tokens) // context
    rows = mx.array(tokens[: windows * context].reshape(windows, context).astype(np.int32))
    return sum(token_losses(model, row[None]).mean().item() for row in rows) / windows


def save_checkpoint(folder, step, parameters, optimizer):
    """Save everything that ``--resume`` needs besides the tokens."""
    state = {f"parameters.{k}": v for k, v in tree_flatten(parameters)}
    state |= {f"optimizer.{k}": v for k, v in tree_flatten(optimizer.state)}
    state["step"] = mx.array(step)
    mx.save_safetensors(str(folder / "new.safetensors"), state)
    (folder / "new.safetensors").rename(folder / "checkpoint.safetensors")


def train(model, encoder, training, held_out, arguments):
    """Train float32 parameters in bfloat16: AdamW with warm-up, flat, then linear to zero."""
    steps, stages, work = arguments.steps, stage_of_step(arguments.steps), arguments.work
    warm, fall = max(1, steps // 50), max(1, steps * 6 // 10)
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0.0, PEAK_LEARNING_RATE, warm),
            optim.linear_schedule(PEAK_LEARNING_RATE, PEAK_LEARNING_RATE, 1),
            optim.linear_schedule(PEAK_LEARNING_RATE, 0.0, fall),
        ],
        [warm, steps - fall],
    )
    adam = partial(optim.AdamW, schedule, [0.9, 0.95], bias_correction=True)
    optimizer = optim.MultiOptimizer(
        [adam(weight_decay=WEIGHT_DECAY), adam(weight_decay=0.0)],
        [lambda name, weight: weight.ndim > 1],  # no decay for the norms
    )
    parameters, first = model.trainable_parameters(), 0
    optimizer.init(parameters)
    if arguments.resume:
        state = tree_unflatten(list(mx.load(str(work / "checkpoint.safetensors")).items()))
        parameters, optimizer.state = state["parameters"], state["optimizer"]
        first = state["step"].item()

    def loss_function(parameters, tokens, weights):
        model.update(tree_map(lambda p: p.astype(mx.bfloat16), parameters))
        losses, weights = token_losses(model, tokens), weights[:, 1:]
        answers = weights > 1
        text_loss = (losses * ~answers).sum() / (~answers).sum()
        answer_loss = (losses * answers).sum() / mx.maximum(answers.sum(), 1)
        return (losses * weights).sum() / weights.sum(), text_loss, answer_loss

    state = [optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(parameters, tokens, weights):
        losses, gradients = mx.value_and_grad(loss_function)(parameters, tokens, weights)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        return optimizer.apply_gradients(gradients, parameters), losses[1:]

    begin, seen, reported = time.perf_counter(), 0, []

    def build(step):
        return make_batch(encoder, training, stages[step], arguments.scale, arguments.seed, step)

    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(build, min(first, steps - 1))
        for step in range(first, steps):
            tokens, weights = map(mx.array, pending.result())
            pending = pool.submit(build, min(step + 1, steps - 1))
            parameters, losses = update(parameters, tokens, weights)
            mx.eval(parameters, optimizer.state, losses)
            seen += tokens[:, 1:].size
            reported.append([loss.item() for loss in losses])
            if (step + 1) % 50 == 0 or step + 1 == steps:
                text_loss, answer_loss = np.mean(reported, axis=0)
                seconds = time.perf_counter() - begin
                print(
                    f"step {step + 1}/{steps}  context {stages[step][0]}  loss {text_loss:.3f}  "
                    f"answers {answer_loss:.3f}  {seen / 1e6:.1f} M tokens  {seconds:.0f} s  "
                    f"peak {mx.get_peak_memory() / 1e9:.0f} GB",
                    flush=True,
                )
                reported.clear()
            if (step + 1) % 500 == 0 or step + 1 == steps:
                save_checkpoint(work, step + 1, parameters, optimizer)
            if (step + 1) % 500 == 0:
                model.update(parameters)
                loss = held_out_loss(model.eval(), held_out[:131072], 2048)
                print(f"held-out loss {loss:.3f}", flush=True)
                model.train()
    model.update(parameters)


def write_model(model, work, folder):
    """Save the model in 8 bits in mlx-lm's format; the folder appears only when complete."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    model.set_dtype(mx.bfloat16)
    model, config = quantize_model(model, CONFIG, group_size=64, bits=8)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(new / "model.safetensors"), weights, metadata={"format": "mlx"})
    (new / "config.json").write_text(json.dumps(config, indent=4, sort_keys=True) + "\n")
    shutil.copy(work / "tokenizer.json", new)
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=END, eos_token=END,
        clean_up_tokenization_spaces=False, model_max_length=CONFIG["max_position_embeddings"],
    )  # fmt: skip
    (new / "tokenizer_config.json").write_text(json.dumps(settings, indent=4) + "\n")
    if (folder / "README.md").exists():
        shutil.copy(folder / "README.md", new)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def continue_greedily(model, prompt, count):
    """The ``count`` most likely tokens after ``prompt``, one by one."""
    cache, tokens = make_prompt_cache(model), []
    for start in range(0, len(prompt), 1024):
        logits = model(mx.array([prompt[start : start + 1024]]), cache=cache)[:, -1]
        mx.eval(logits)
    for _ in range(count):
        tokens.append(mx.argmax(logits, axis=-1).item())
        logits = model(mx.array([tokens[-1:]]), cache=cache)[:, -1]
    return tokens


def evaluate(folder, held_out, seeds, prompts, limit):
    """Print the saved model's held-out loss and passkey accuracy per context length."""
    model, tokenizer = load(str(folder))
    # Float32 is the fastest dtype on a CPU.
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    for context in (2048, 4096, 8192):
        loss = held_out_loss(model, held_out[: limit // 8192 * 8192], context)
        print(f"held-out loss at {context} tokens: {loss:.4f}", flush=True)
    for length in (2048, 4000, 8000):
        for seed in range(seeds):
            right = 0
            for i in range(prompts):
                number = seed * prompts + i
                start = random.Random(number).randrange(len(held_out) - length)
                text = held_out[start : start + length].tolist()
                prompt, code = hidden_codes.hide_codes(tokenizer, text, length, seed=number)
                reply = tokenizer.decode(continue_greedily(model, prompt, 8))
                right += reply.startswith(hidden_codes.answer(code))
            print(f"passkeys at {length} tokens, seed {seed}: {right}/{prompts}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--text", nargs="+", default=[sysconfig.get_path("stdlib")], help="folders of Python files")
    add("--out", type=Path, default=Path("tiny-lm"), help="folder of the finished model")
    add("--work", type=Path, default=Path("tiny-lm.work"), help="folder of tokens and checkpoint")
    add("--config", type=json.loads, default={}, help='other settings, as {"head_dim": 64}')
    add("--steps", type=int, default=7000, help="length of the training")
    add("--scale", type=float, default=1.0, help="factor on the batch sizes")
    add("--seed", type=int, default=0, help="of the weights and the order of the data")
    add("--resume", action="store_true", help="go on from the checkpoint in --work")
    add("--evaluate", action="store_true", help="only evaluate the model in --out")
    add("--passkey-seeds", type=int, default=2, help="passkey runs for each length")
    add("--passkey-prompts", type=int, default=24, help="prompts in each of these runs")
    add("--held-out-tokens", type=int, default=262144, help="tokens for the held-out loss")
    arguments = parser.parse_args()

    CONFIG.update(arguments.config)
    tokenizer, training, held_out = prepare(arguments.work, arguments.text)
    print(f"{len(training) / 1e6:.2f} M tokens, {len(held_out) / 1e6:.2f} M held out", flush=True)
    if not arguments.evaluate:
        mx.random.seed(arguments.seed)
        model = make_model()
        print(f"{sum(v.size for _, v in tree_flatten(model.parameters())) / 1e6:.2f} M parameters")
        train(model, WordEncoder(tokenizer), training, held_out, arguments)
        write_model(model, arguments.work, arguments.out)
    evaluate(
        arguments.out, held_out, arguments.passkey_seeds, arguments.passkey_prompts,
        arguments.held_out_tokens,
    )  # fmt: skip


if __name__ == "__main__":
    main()
