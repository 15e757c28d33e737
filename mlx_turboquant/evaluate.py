"""How far a model with a quantized cache is from the same model with the exact one.

Everything is measured at decode, as it happens in use: a text is read in chunks, and its last
tokens go through the cache a few at a time, so that they see quantized tokens as soon as these
leave the window.
"""

import copy
import importlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import (
    ArraysCache,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from .calibrate import divergence
from .compressible import flat_caches, plain_caches
from .enable import make_prompt_cache
from .kernels.attention import MAX_DECODE_ROWS
from .needle import hide_codes
from .report import bits_per_value, cache_size
from .settings import Settings
from .texts import start_tokens

_mlx_lm_generate = importlib.import_module("mlx_lm.generate")

# mlx-lm reads prompts in chunks of this size, and quantizes its own cache in these groups.
CHUNK = 2048
GROUP_SIZE = 64
# A reply may begin with some words before the code.
REPLY_TOKENS = 32


class Codec(NamedTuple):
    """A cache to evaluate: a name, and either the bits of mlx-lm's cache or settings of ours."""

    name: str
    mlx_lm_bits: int | None = None
    settings: Settings | None = None

    @property
    def needs_profile(self) -> bool:
        """Whether bits are chosen by what calibration found out about the model."""
        return self.settings is not None and not self.settings.is_fixed

    def make_cache(self, model: nn.Module) -> list[Any]:
        """An empty prompt cache."""
        if self.settings is None:
            return plain_caches(model)
        return make_prompt_cache(model, self.settings)

    def after_chunk(self, cache: list[Any]) -> None:
        """What mlx-lm does after every chunk of a prompt: its own cache is quantized then."""
        _mlx_lm_generate.maybe_quantize_kv_cache(cache, 0, GROUP_SIZE, self.mlx_lm_bits)

    def bits_per_value(self, cache: list[Any]) -> float:
        """Bits that one more value takes, scales included; 16 where nothing is quantized."""
        if any(isinstance(layer, QuantizedKVCache) for layer in cache):
            return self.mlx_lm_bits + 32 / GROUP_SIZE
        return 16.0 if self.settings is None else bits_per_value(cache)

    def token_nbytes(self, cache: list[Any]) -> float:
        """Bytes that one more token takes in the layers that hold all tokens, in a 16-bit model."""
        return (
            sum(_token_values(layer) for layer in flat_caches(cache))
            * self.bits_per_value(cache)
            / 8
        )


EXACT = Codec("exact")
MLX_LM = (Codec("mlx-lm 8 bits", 8), Codec("mlx-lm 4 bits", 4))


def _token_values(layer: Any) -> int:
    """Values of one token, of all heads: none in layers that are bounded or hold no tokens."""
    if hasattr(layer, "token_values"):
        return layer.token_values
    if isinstance(layer, QuantizedKVCache):
        groups = (scales.shape[1] * scales.shape[3] for _, scales, _ in (layer.keys, layer.values))
        return GROUP_SIZE * sum(groups)
    if type(layer) is KVCache:
        return sum(x.shape[1] * x.shape[3] for x in (layer.keys, layer.values))
    return 0


def preset(name: str, **settings: Any) -> Codec:
    """Our codec of a setting as ``4``, ``3.5`` (bits) or ``K5V3`` (of keys and values).

    With the name of a method before it, as ``prod:4`` or ``qjl+affine:K3V2``, a cache of that
    ``codec``. ``settings`` are further arguments of :func:`.integration.make_prompt_cache`.

    Raises:
        ValueError: a name of another form.
    """
    codec, colon, bits_name = name.rpartition(":")
    split = re.fullmatch(r"[Kk](\d)[Vv](\d)", bits_name)
    if split:
        key_bits, value_bits = map(int, split.groups())
        bits = {"key_bits": key_bits, "value_bits": value_bits}
    elif re.fullmatch(r"\d(\.\d*)?", bits_name):
        bits = {"bits": float(bits_name)}
    else:
        raise ValueError(
            f"{name!r} is not a preset: use bits as 4 or 3.5, a split as K5V3, "
            "or another codec and its bits as prod:4."
        )
    if colon:
        bits["codec"] = codec
        settings.pop("uniform", None)
    label = bits_name.upper() if split else f"{bits_name} bits"
    return Codec(f"{codec} {label}".strip(), settings=Settings(**bits, **settings))


@dataclass
class Scores:
    """What was measured of one codec; arrays are over all scored tokens, in nats.

    ``bits`` are those of one more value with its share of a scale, ``token_nbytes`` the bytes of
    one more token; ``bits_in_all`` what a value of this text took, exact tokens and free space
    included (0 for the caches of mlx-lm).
    ``positions`` are those of the scored tokens in their text; ``departures`` has for every text
    the first of ``greedy`` tokens that is not that of the exact cache, or None. ``overlaps`` are 1
    less the total variation between the distributions, which is the share of tokens drafted by
    one of them that the other accepts.
    """

    codec: Codec
    bits: float = 0.0
    token_nbytes: float = 0.0
    bits_in_all: float = 0.0
    positions: list[int] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    agreements: list[bool] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)
    departures: list[int | None] = field(default_factory=list)
    needles: list["Needle"] = field(default_factory=list)
    generations: list["Generation"] = field(default_factory=list)
    failure: str | None = None

    def summary(self) -> dict[str, Any]:
        """Numbers for a table or a file."""
        measured = {
            "codec": self.codec.name,
            "bits_per_value": self.bits,
            "token_nbytes": self.token_nbytes,
            "bits_in_all": self.bits_in_all,
            "departures": self.departures,
            "failure": self.failure,
        }
        if self.divergences and self.failure is None:
            median, p99 = np.percentile(self.divergences, (50, 99))
            measured |= {
                "kl_mean": float(np.mean(self.divergences)),
                "kl_median": float(median),
                "kl_p99": float(p99),
                "perplexity": float(np.exp(np.mean(self.losses))),
                "top1_agreement": float(np.mean(self.agreements)),
                "overlap": float(np.mean(self.overlaps)),
            }
        if self.needles and self.failure is None:
            measured["needles_found"] = sum(needle.found for needle in self.needles)
            measured["needles"] = [needle._asdict() for needle in self.needles]
        if self.generations and self.failure is None:
            measured["generations"] = [each.summary() for each in self.generations]
        return measured

    def by_position(self, bins: int = 8) -> list[dict[str, float]]:
        """Divergence and perplexity in stretches of the scored positions."""
        edges = np.array_split(np.unique(self.positions), bins)
        rows = []
        for part in (edge for edge in edges if edge.size):
            inside = np.isin(self.positions, part)
            rows.append(
                {
                    "first": int(part[0]),
                    "last": int(part[-1]),
                    "kl_mean": float(np.mean(np.array(self.divergences)[inside])),
                    "perplexity": float(np.exp(np.mean(np.array(self.losses)[inside]))),
                }
            )
        return rows


class Needle(NamedTuple):
    """One question about a code hidden at ``depth`` (0 to 1) of ``length`` tokens."""

    length: int
    depth: float
    found: bool


class Generation(NamedTuple):
    """What a cache wrote after a prompt, greedily or with random numbers that all caches share.

    ``losses`` are those of its tokens, in nats, under the model with the exact cache: they rise if
    errors feed on themselves. ``departure`` is the first token that is not that of the exact cache.
    """

    is_sampled: bool
    tokens: list[int]
    losses: list[float]
    departure: int | None

    def summary(self, bins: int = 10) -> dict[str, Any]:
        """Numbers for a file: mean losses of stretches of the tokens."""
        parts = np.array_split(np.array(self.losses), bins)
        return {
            "sampled": self.is_sampled,
            "tokens": len(self.tokens),
            "departure": self.departure,
            "losses": [float(part.mean()) for part in parts if part.size],
        }


Progress = Callable[[int], Any]


def read_prompt(model: nn.Module, codec: Codec, tokens: mx.array, progress: Progress) -> list[Any]:
    """A cache of ``codec`` that has read the tokens (n,) as mlx-lm reads a prompt."""
    [cache] = read_first_chunk(model, [codec], tokens, progress)
    read_on(model, codec, cache, tokens, progress)
    return cache


def read_first_chunk(
    model: nn.Module, codecs: list[Codec], tokens: mx.array, progress: Progress
) -> list[list[Any]]:
    """A cache of each codec that has read the first chunk of a prompt, the tokens (n,).

    Nothing of a first chunk is seen quantized, so that the model computes the same for all codecs:
    it runs once.
    """
    caches = [codec.make_cache(model) for codec in codecs]
    chunk = tokens[None, :CHUNK]
    plain = plain_caches(model)
    if all(type(layer) in (KVCache, *_STATES) for layer in plain):
        together = [
            _FirstChunk([cache[i] for cache in caches]) if type(layer) is KVCache else layer
            for i, layer in enumerate(plain)
        ]
        model(chunk, cache=together)
        for cache in caches:
            cache[:] = [
                layer if type(own) is KVCache else copy.deepcopy(own)
                for layer, own in zip(cache, plain)
            ]
    else:
        for cache in caches:
            model(chunk, cache=cache)
    mx.eval([layer.state for cache in caches for layer in cache])
    progress(chunk.size * len(codecs))
    return caches


def read_on(
    model: nn.Module, codec: Codec, cache: list[Any], tokens: mx.array, progress: Progress
) -> None:
    """Let a cache of ``codec`` that has read the first chunk of the tokens (n,) read the others."""
    codec.after_chunk(cache)
    mx.eval([layer.state for layer in cache])
    for start in range(CHUNK, len(tokens), CHUNK):
        chunk = tokens[None, start : start + CHUNK]
        model(chunk, cache=cache)
        codec.after_chunk(cache)
        mx.eval([layer.state for layer in cache])
        progress(chunk.size)


# Caches of layers that no codec of ours or of mlx-lm compresses: every codec has the same.
_STATES = (ArraysCache, ChunkedKVCache, RotatingKVCache)


class _FirstChunk:
    """Stands for the empty caches of one layer of several codecs, and fills all of them."""

    def __init__(self, caches: list[Any]):
        self.caches = caches

    def __getattr__(self, name: str) -> Any:
        return getattr(self.caches[-1], name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        *_, fetched = [cache.update_and_fetch(keys, values) for cache in self.caches]
        return fetched


def log_probabilities(
    model: nn.Module, cache: list[Any], tokens: mx.array, progress: Progress
) -> Iterator[mx.array]:
    """Log-probabilities (up to 8, vocabulary) after each of the tokens (n,), some at a time."""
    for start in range(0, len(tokens), MAX_DECODE_ROWS):
        step = tokens[None, start : start + MAX_DECODE_ROWS]
        rows = nn.log_softmax(model(step, cache=cache)[0].astype(mx.float32), axis=-1)
        mx.eval(rows)
        progress(step.size)
        yield rows


def token_losses(rows: mx.array, tokens: mx.array) -> list[float]:
    """Those of tokens (n,), in nats, under log-probabilities (n, vocabulary)."""
    return (-mx.take_along_axis(rows, tokens[:, None], axis=-1)[:, 0]).tolist()


def greedy_tokens(model: nn.Module, cache: list[Any], token: int) -> Iterator[int]:
    """The most probable tokens after ``token``, one at a time, without end."""
    while True:
        token = model(mx.array([[token]]), cache=cache)[0, -1].argmax().item()
        yield token


def sampled_tokens(model: nn.Module, cache: list[Any], token: int, seed: int) -> Iterator[int]:
    """Random tokens after ``token``, the same for logits that are the same, without end.

    Each is that of the largest logit with Gumbel noise, which follows the model's distribution.
    """
    for key in map(mx.random.key, itertools.count(seed * 2**20)):
        logits = model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
        token = (logits + mx.random.gumbel(logits.shape, key=key)).argmax().item()
        yield token


def first_difference(one: Iterable[int], other: Iterable[int]) -> int | None:
    """The first place at which two sequences differ, as far as both go."""
    pairs = enumerate(zip(one, other))
    return next((i for i, (first, second) in pairs if first != second), None)


class Comparison:
    """Runs the exact cache and ``codecs``, one cache at a time, and keeps the ``scores`` of each.

    Besides the model there are in memory one cache, the first chunk of the others, and the exact
    log-probabilities of the scored tokens of one text. A cache of mlx-lm that the model does not
    support is a ``failure`` of its codec. ``progress`` is called with the number of tokens after
    each step.
    """

    def __init__(
        self, model: nn.Module, codecs: list[Codec], progress: Progress = lambda tokens: None
    ):
        self.model = model
        self.progress = progress
        self.scores = [Scores(codec) for codec in (EXACT, *codecs)]

    def text(self, tokens: list[int], scored: int, greedy: int = 0) -> None:
        """Score the predictions of the last ``scored`` tokens.

        Then let the exact cache go on for ``greedy`` tokens and look where the others depart.
        """
        first = len(tokens) - scored
        exact: list[mx.array] = []
        continuation: list[int] = []
        tokens = mx.array(tokens)
        for scores, cache in self._first_chunk(tokens[: first - 1]):
            with _failure_of(scores):
                read_on(self.model, scores.codec, cache, tokens[: first - 1], self.progress)
                self._score(scores, cache, tokens[first - 1 :], exact)
                scores.positions += range(first, first + scored)
                self._depart(scores, cache, tokens[-1].item(), continuation, greedy)
                scores.bits = scores.codec.bits_per_value(cache)
                scores.token_nbytes = scores.codec.token_nbytes(cache)
                if scores.codec.settings is not None:
                    size = cache_size(cache)
                    scores.bits_in_all = 16 * size.nbytes / size.fp16_nbytes

    def _first_chunk(self, tokens: mx.array) -> Iterator[tuple[Scores, list[Any]]]:
        """What has not failed, each with a cache that has read the first chunk of the tokens."""
        working = [scores for scores in self.scores if scores.failure is None]
        codecs = [scores.codec for scores in working]
        caches = read_first_chunk(self.model, codecs, tokens, self.progress)
        while caches:
            yield working.pop(0), caches.pop(0)
            mx.clear_cache()

    def _score(
        self, scores: Scores, cache: list[Any], tokens: mx.array, exact: list[mx.array]
    ) -> None:
        steps = log_probabilities(self.model, cache, tokens[:-1], self.progress)
        for i, rows in enumerate(steps):
            if scores.codec is EXACT:
                exact.append(rows)
            targets = tokens[1 + i * MAX_DECODE_ROWS :][: len(rows)]
            agreements = rows.argmax(axis=-1) == exact[i].argmax(axis=-1)
            overlaps = mx.minimum(mx.exp(rows), mx.exp(exact[i])).sum(axis=-1)
            scores.divergences += divergence(exact[i], rows).tolist()
            scores.losses += token_losses(rows, targets)
            scores.agreements += agreements.tolist()
            scores.overlaps += overlaps.tolist()

    def _depart(
        self, scores: Scores, cache: list[Any], token: int, continuation: list[int], greedy: int
    ) -> None:
        tokens = islice(greedy_tokens(self.model, cache, token), greedy)
        if scores.codec is EXACT:
            continuation += tokens
        scores.departures.append(first_difference(continuation, tokens))
        self.progress(greedy)

    def generation(self, prompt: list[int], count: int, is_sampled: bool, seed: int = 0) -> None:
        """Let every codec write ``count`` tokens after a prompt, and score them exactly."""
        tokens = mx.array(prompt[:-1])
        exact: list[int] = []
        for scores, cache in self._first_chunk(tokens):
            with _failure_of(scores):
                read_on(self.model, scores.codec, cache, tokens, self.progress)
                arguments = self.model, cache, prompt[-1]
                endless = (
                    sampled_tokens(*arguments, seed) if is_sampled else greedy_tokens(*arguments)
                )
                written = list(islice(endless, count))
                exact = exact or written
                losses = exact_losses(self.model, prompt, written)
                departure = first_difference(exact, written)
                scores.generations.append(Generation(is_sampled, written, losses, departure))
                self.progress(count)

    def needle(self, tokenizer, prompt: list[int], code: str, length: int, depth: float) -> None:
        """Let every codec go on after a passkey prompt; the first six digits must be the code.

        Where the exact cache does not find it, the others are not asked.
        """
        tokens = mx.array(prompt[:-1])
        for scores, cache in self._first_chunk(tokens):
            with _failure_of(scores):
                read_on(self.model, scores.codec, cache, tokens, self.progress)
                continuation = greedy_tokens(self.model, cache, prompt[-1])
                found = _first_code(tokenizer, islice(continuation, REPLY_TOKENS)) == code
                scores.needles.append(Needle(length, depth, found))
                self.progress(REPLY_TOKENS)
                if scores.codec is EXACT and not found:
                    unread = max(len(tokens) - CHUNK, 0) + REPLY_TOKENS
                    self.progress((len(self.scores) - 1) * unread)
                    return


def exact_losses(model: nn.Module, prompt: list[int], following: list[int]) -> list[float]:
    """Of tokens after a prompt, in nats, with the exact cache."""
    tokens, start = mx.array(prompt + following), len(prompt)
    cache = read_prompt(model, EXACT, tokens[: start - 1], lambda count: None)
    losses: list[float] = []
    for rows in log_probabilities(model, cache, tokens[start - 1 : -1], lambda count: None):
        losses += token_losses(rows, tokens[start + len(losses) :][: len(rows)])
    return losses


def passkey_prompt(
    tokenizer, text: list[int], length: int, depth: float, seed: int, chat: bool
) -> tuple[list[int], str]:
    """A prompt of ``length`` tokens that ends with a question, and the code that answers it.

    With ``chat`` it is the message of a user (and a little longer).
    """
    start = start_tokens(tokenizer)
    prompt, code = hide_codes(tokenizer, text, length - len(start), depth=depth, seed=seed)
    if chat:
        message = {"role": "user", "content": tokenizer.decode(prompt) + " which six digits?"}
        prompt = tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, enable_thinking=False
        )
    else:
        prompt = start + prompt
    return list(prompt), code


def _first_code(tokenizer, tokens: Iterable[int]) -> str | None:
    """The first six digits of a reply, which is read only that far."""
    reply = []
    for token in tokens:
        reply.append(token)
        digits = re.search(r"\d{6}", tokenizer.decode(reply))
        if digits:
            return digits[0]
    return None


@contextmanager
def _failure_of(scores: Scores) -> Iterator[None]:
    """Whatever mlx-lm's own cache raises with a model that it does not support."""
    try:
        yield
    except Exception as error:
        if scores.codec.mlx_lm_bits is None:
            raise
        scores.failure = (str(error).strip() or type(error).__name__).splitlines()[0]
