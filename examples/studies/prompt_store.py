"""Measure a prompt store: time to first token, bytes, tokens of a session, decode rate.

    python examples/studies/prompt_store.py --model MODEL --tokens 8000
    python examples/studies/prompt_store.py --shape llama-3.1-8b --tokens 30000

A shape has random weights and reads random tokens. A restart is simulated by a new store on the
same folder and an empty memory.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable

import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from tqdm import tqdm

from mlx_turboquant import enable
from mlx_turboquant.lm import texts
from mlx_turboquant.lm.loading import prepare_for_device
from mlx_turboquant.lm.prompt_store import PromptStore
from mlx_turboquant.lm.report import cache_report
from mlx_turboquant.measure.shapes import SHAPES, random_model

CHUNK = 2048
# Tokens of the instructions and tools that begin all prompts, and of one turn.
SYSTEM, TURN = 4000, (40, 160)
TURNS, RESTART_EVERY = 40, 5


def read(model, cache, tokens: list[int]) -> int:
    """Read tokens in chunks, as mlx-lm does, and return the most probable next one."""
    for start in range(0, len(tokens), CHUNK):
        logits = model(mx.array([tokens[start : start + CHUNK]]), cache=cache)
        mx.eval(logits[:, -1], [layer.state for layer in cache])
    return logits[0, -1].argmax().item()


def first_token(model, tokens: list[int], folder: str) -> None:
    """Time the first token of a long prompt, and of one that departs from it after a quarter."""
    read(model, make_prompt_cache(model), tokens[:CHUNK])  # compiles the kernels
    begin = time.perf_counter()
    cache = make_prompt_cache(model)
    expected = read(model, cache, tokens)
    reading = time.perf_counter() - begin
    store = PromptStore(folder, delay=0)
    store.keep(model, tokens, cache)
    store.close()
    for prompt in (tokens, [*tokens[: len(tokens) // 4], tokens[0]]):
        begin = time.perf_counter()
        found, known = PromptStore(folder).find(model, prompt, cache)
        token = read(model, found, prompt[known:])
        after = time.perf_counter() - begin
        print(f"First token of {len(prompt):,} tokens, {known:,} of them from disk: {after:.3f} s")
        if prompt is tokens:
            print(f"Reading them: {reading:.2f} s, ratio {after / reading:.4f}")
            print(f"The same token: {token == expected}")
    written, fp16 = store.statistics()["bytes"], cache_report(cache, model).size.fp16_nbytes
    print(f"On disk {written / 1e6:.1f} MB, to the float16 cache {written / fp16:.3f}")


def speed_while_writing(model, tokens: list[int], folder: str) -> None:
    """Time the decode of one sequence while the cache of a long prompt is written."""
    long, other = make_prompt_cache(model), make_prompt_cache(model)
    read(model, long, tokens)
    read(model, other, tokens[:CHUNK])
    token = mx.array([tokens[:1]])

    def seconds_a_step(is_over: Callable[[int], bool]) -> float:
        nonlocal token
        begin, count = time.perf_counter(), 0
        while not is_over(count):
            token = model(token, cache=other)[:, -1].argmax(axis=-1, keepdims=True)
            mx.eval(token)
            count += 1
        return (time.perf_counter() - begin) / count

    seconds_a_step(lambda count: count == 20)
    store = PromptStore(folder, delay=0)
    before = seconds_a_step(lambda count: count == 100)
    store.keep(model, tokens, long)
    during = seconds_a_step(lambda count: bool(store.files()))
    after = seconds_a_step(lambda count: count == 100)
    store.close()
    alone = (before + after) / 2
    megabytes = store.statistics()["written_bytes"] / 1e6
    print(f"A step takes {1e3 * alone:.2f} ms, and {1e3 * during:.2f} ms while {megabytes:.0f} MB")
    print(f"are written: {alone / during:.3f} of the speed")


def session(tokens: list[int]) -> list[list[int]]:
    """Prompts of an agent: some extend the last one, some branch off an earlier one or repeat."""
    rng = random.Random(0)
    system, rest = tokens[:SYSTEM], iter(tokens[SYSTEM:])
    prompts = [system]
    for _ in range(TURNS):
        kind = rng.random()
        begin = prompts[-1] if kind < 0.75 else rng.choice(prompts)
        more = 0 if kind > 0.95 else rng.randrange(*TURN)
        prompts.append([*begin, *(next(rest) for _ in range(more))])
    return prompts[1:]


def tokens_read(model, prompts: list[list[int]], folder: str | None) -> int:
    """Count the tokens prefilled in all turns, with a store if there is a folder."""
    total = 0
    for turn, prompt in enumerate(tqdm(prompts, leave=False)):
        if turn % RESTART_EVERY == 0:
            memory = LRUPromptCache()
            store = folder and PromptStore(folder, delay=0)
        cache, rest = memory.fetch_nearest_cache("model", prompt)
        cache = cache or make_prompt_cache(model)
        if store and (found := store.find(model, prompt, cache, len(prompt) - len(rest))):
            cache, known = found
            rest = prompt[known:]
        total += len(rest)
        if rest:
            read(model, cache, rest)
        memory.insert_cache("model", prompt, cache)
        if store:
            store.keep(model, prompt, cache)
            if (turn + 1) % RESTART_EVERY == 0:
                store.close()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model")
    source.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--bits", type=float, default=4)
    args = parser.parse_args()
    if args.model is not None:
        model, tokenizer = mlx_lm.load(args.model)
        enable(prepare_for_device(model), args.bits)
        tokens = [token for text in texts.bundled_texts() for token in tokenizer.encode(text)]
        long = (tokens * (1 + args.tokens // len(tokens)))[: args.tokens]
    else:
        model = enable(random_model(SHAPES[args.shape]), args.bits, uniform=True)
        rng = random.Random(0)
        long = tokens = [rng.randrange(1000) for _ in range(max(args.tokens, 2 * SYSTEM))]
    with tempfile.TemporaryDirectory() as folder:
        first_token(model, long, folder)
    with tempfile.TemporaryDirectory() as folder:
        speed_while_writing(model, long, folder)
    prompts = session(tokens)
    with tempfile.TemporaryDirectory() as folder:
        stored, alone = tokens_read(model, prompts, folder), tokens_read(model, prompts, None)
    print(
        f"{TURNS} turns of an agent, restarted at every {RESTART_EVERY}th: {stored:,} tokens read,"
    )
    print(f"{alone:,} without the store, ratio {stored / alone:.3f}")


if __name__ == "__main__":
    main()
