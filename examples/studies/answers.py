"""Print a model's answers about a long text with the exact cache, mlx-lm's 4 bits and ours.

    python examples/studies/answers.py --model MODEL --kv-bits 4 3 2

The text is the beginning of a file, by default of a module of Python. The question is about it, so
that every word of the answer is read from the quantized cache. A model without a chat template
continues the text. Prints a table in Markdown; answers are greedy.
"""

import argparse
import sys
from itertools import islice, takewhile
from pathlib import Path

import mlx.core as mx
import mlx_lm

from mlx_turboquant.lm import texts
from mlx_turboquant.lm.loading import model_errors, prepare_for_device
from mlx_turboquant.measure.cache_specs import EXACT, MLX_LM, preset
from mlx_turboquant.measure.evaluate import following_tokens, read_first_chunk, read_on

QUESTION = "What is this Python module for? Answer in three sentences."
_BUNDLED = 4  # the bundled text with the source of pickle


def long_prompt(tokenizer, text: str, length: int, question: str, name: str) -> list[int]:
    """``length`` tokens of a text, and a question about it if there is a chat template.

    Raises:
        ValueError: the text is shorter; the message calls it ``name``.
    """
    [context] = texts.contexts(tokenizer, [text], length, 1, name)
    if not tokenizer.has_chat_template:
        return context
    content = f"{tokenizer.decode(context, skip_special_tokens=True)}\n\n{question}"
    message = {"role": "user", "content": content}
    return list(tokenizer.apply_chat_template([message], add_generation_prompt=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--kv-bits", nargs="+", default=["4", "3", "2"], help="of our caches (default: 4 3 2)")
    add("--text", type=Path, help="file to ask about (default: the source of pickle)")
    add("--question", default=QUESTION)
    add("--context", type=int, default=1500, help="tokens of the text (default: 1500)")
    add("--tokens", type=int, default=80, help="of an answer, at most (default: 80)")
    args = parser.parse_args()
    try:
        specs = [EXACT, MLX_LM[1], *map(preset, args.kv_bits)]
        text = texts.read_texts([args.text])[0] if args.text else texts.bundled_texts()[_BUNDLED]
        with model_errors(args.model):
            model, tokenizer = mlx_lm.load(args.model)
        name = str(args.text or "The bundled text")
        prompt = long_prompt(tokenizer, text, args.context, args.question, name)
    except (ValueError, OSError) as error:
        print(f"answers: {error}", file=sys.stderr)
        sys.exit(2)
    prepare_for_device(model)
    tokens = mx.array(prompt[:-1])
    print("| cache | answer |\n|---|---|")
    caches = read_first_chunk(model, specs, tokens)
    for spec, cache in zip(specs, caches):
        try:
            read_on(model, spec, cache, tokens)
        except NotImplementedError as error:  # mlx-lm does not quantize every kind of cache
            print(f"| {spec.name} | not possible: {error} |", flush=True)
            continue
        reply = islice(following_tokens(model, cache, prompt[-1]), args.tokens)
        reply = list(takewhile(lambda token: token not in tokenizer.eos_token_ids, reply))
        answer = tokenizer.decode(reply).strip().replace("|", "\\|").replace("\n", "<br>")
        print(f"| {spec.name} | {answer} |", flush=True)


if __name__ == "__main__":
    main()
