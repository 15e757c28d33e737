"""Compare the output of a model with a quantized cache to that with the exact cache.

Everything is measured at decode, as in use. A text is read in chunks, and its last tokens go
through the cache a few at a time. So they see quantized tokens as soon as these leave the window.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import RotatingKVCache, can_trim_prompt_cache, trim_prompt_cache

from ..kernels.attention import MAX_DECODE_ROWS
from ..lm.compressible import flat_caches
from ..lm.loading import reason_of
from ..lm.report import cache_size
from .cache_specs import CHUNK, EXACT, CacheSpec, Progress, ignore, token_size
from .scores import Generation, Scores

# In pieces of a chunk, queries are not compared with the many keys after them.
_PIECES = CacheSpec("exact, pieces", chunk=512)
# A prompt is read again, for sums in another order.
_OTHER_CHUNKS = CacheSpec("exact, other chunks", chunk=384)


def read_prompt(model: nn.Module, spec: CacheSpec, tokens: mx.array) -> list[Any]:
    """A cache of ``spec`` that is prefilled with tokens (n,) as mlx-lm does."""
    cache = spec.make_cache(model)
    spec.read(model, cache, tokens[None])
    return cache


def read_first_chunk(
    model: nn.Module, specs: list[CacheSpec], tokens: mx.array, progress: Progress = ignore
) -> list[list[Any]]:
    """A cache of each spec, prefilled with the first chunk of a prompt, the tokens (n,).

    Tokens of a first chunk see each other exactly, so one run of the model is enough for all.
    """
    chunk = tokens[None, :CHUNK]
    exact = _PIECES.make_cache(model)
    _PIECES.read(model, exact, chunk)
    caches = [spec.make_cache(model) for spec in specs]
    for cache in caches:
        for layer, own in zip(flat_caches(cache), flat_caches(exact)):
            if type(layer) is type(own):
                vars(layer).update(copy.deepcopy(vars(own)))
            else:
                layer.update_and_fetch(*own.keys_and_values())
    mx.eval([layer.state for cache in caches for layer in cache])
    progress(chunk.size * len(specs))
    return caches


def read_on(
    model: nn.Module,
    spec: CacheSpec,
    cache: list[Any],
    tokens: mx.array,
    progress: Progress = ignore,
) -> None:
    """Prefill a cache that has the first chunk of the tokens (n,) with the others."""
    spec.after_chunk(cache)
    mx.eval([layer.state for layer in cache])
    spec.read(model, cache, tokens[None, CHUNK:], progress)


def log_probabilities(
    model: nn.Module, cache: list[Any], tokens: mx.array, progress: Progress = ignore
) -> Iterator[mx.array]:
    """Yield the log-probabilities (up to 8, vocabulary) after each of the tokens (n,)."""
    for start in range(0, len(tokens), MAX_DECODE_ROWS):
        step = tokens[None, start : start + MAX_DECODE_ROWS]
        rows = nn.log_softmax(model(step, cache=cache)[0].astype(mx.float32), axis=-1)
        mx.eval(rows)
        progress(step.size)
        yield rows


def divergence(exact: mx.array, other: mx.array) -> mx.array:
    """KL(exact || other) in nats of log-probabilities (..., vocabulary): float32 (...)."""
    return (mx.exp(exact) * (exact - other)).sum(axis=-1)


def token_losses(rows: mx.array, tokens: mx.array) -> list[float]:
    """The losses of tokens (n,), in nats, under log-probabilities (n, vocabulary)."""
    return (-mx.take_along_axis(rows, tokens[:, None], axis=-1)[:, 0]).tolist()


def following_tokens(
    model: nn.Module,
    cache: list[Any],
    token: int,
    seed: int | None = None,
    draft: Sequence[int] = (),
) -> Iterator[int]:
    """Yield tokens after ``token`` without end: the most probable ones, or samples.

    With a ``seed`` they are samples of the model's distribution, and the same for equal logits:
    each has the largest logit after Gumbel noise is added. As long as they equal those of a
    ``draft``, the model computes several at once, if the cache can be trimmed.
    """
    written = 0
    while True:
        ahead = list(draft[: MAX_DECODE_ROWS - 1]) if draft and _can_cut_back(cache) else []
        logits = model(mx.array([[token, *ahead]]), cache=cache)[0].astype(mx.float32)
        if seed is not None:
            keys = [mx.random.key(seed * 2**20 + written + i) for i in range(len(logits))]
            logits += mx.stack([mx.random.gumbel(logits.shape[1:], key=key) for key in keys])
        best = logits.argmax(axis=-1).tolist()
        right = first_difference(best, ahead)
        if right is None:
            right = len(ahead)
            draft = draft[right + 1 :] if best[-1:] == list(draft[right : right + 1]) else ()
        else:
            trim_prompt_cache(cache, len(ahead) - right)
            draft = ()
        yield from best[: right + 1]
        written += right + 1
        token = best[right]


def _can_cut_back(cache: list[Any]) -> bool:
    """Whether the last few tokens can be taken back, whatever they are."""
    is_sliding = any(isinstance(layer, RotatingKVCache) for layer in flat_caches(cache))
    return not is_sliding and can_trim_prompt_cache(cache)


def first_difference(one: Iterable[int], other: Iterable[int]) -> int | None:
    """The first index at which two sequences differ before the shorter one ends, or None."""
    pairs = enumerate(zip(one, other))
    return next((i for i, (first, second) in pairs if first != second), None)


class Comparison:
    """Runs the exact cache and others, one at a time, and keeps the ``scores`` of each.

    Memory holds the model, one cache, the first chunk of the others, and the exact
    log-probabilities of the scored tokens of one text. If an mlx-lm cache does not support the
    model, its scores have a ``failure``. ``noise`` has what the exact cache generates after it has
    read a prompt in other chunks: texts differ as much by the order of sums alone.
    """

    def __init__(self, model: nn.Module, specs: list[CacheSpec], progress: Progress = ignore):
        self.model = model
        self.progress = progress
        self.scores = [Scores(spec) for spec in (EXACT, *specs)]
        self.noise = Scores(_OTHER_CHUNKS)

    def text(self, tokens: list[int], scored: int, greedy: int = 0) -> None:
        """Score the predictions of the last ``scored`` tokens.

        Then continue the exact cache for ``greedy`` tokens and find where the others depart.
        """
        first = len(tokens) - scored
        exact: list[mx.array] = []
        continuation: list[int] = []

        def measure(scores: Scores, cache: list[Any]) -> None:
            self._score(scores, cache, mx.array(tokens[first - 1 :]), exact)
            scores.positions += range(first, first + scored)
            following = islice(following_tokens(self.model, cache, tokens[-1]), greedy)
            if scores.spec is EXACT:
                continuation.extend(following)
            scores.departures.append(first_difference(continuation, following))
            self.progress(greedy)
            values, scores.token_nbytes = token_size(cache)
            scores.bits = 8 * scores.token_nbytes / max(values, 1)
            if scores.spec.settings is not None:
                size = cache_size(cache)
                scores.unpacked = size.unpacked
                scores.bits_in_all = 16 * size.nbytes / size.fp16_nbytes

        self._each(mx.array(tokens)[: first - 1], measure)

    def _each(self, tokens: mx.array, measure: Callable[[Scores, list[Any]], Any]) -> None:
        """Prefill every cache that has not failed with the tokens, and measure it."""
        working = [scores for scores in self.scores if scores.failure is None]
        specs = [scores.spec for scores in working]
        caches = read_first_chunk(self.model, specs, tokens, self.progress)
        while caches:
            scores, cache = working.pop(0), caches.pop(0)
            try:
                read_on(self.model, scores.spec, cache, tokens, self.progress)
                measure(scores, cache)
            except Exception as error:  # mlx-lm's caches may raise anything
                if scores.spec.mlx_lm_bits is None:
                    raise
                scores.failure = reason_of(error)
            mx.clear_cache()

    def _score(
        self, scores: Scores, cache: list[Any], tokens: mx.array, exact: list[mx.array]
    ) -> None:
        for i, rows in enumerate(log_probabilities(self.model, cache, tokens[:-1], self.progress)):
            if scores.spec is EXACT:
                exact.append(rows)
            targets = tokens[1 + i * MAX_DECODE_ROWS :][: len(rows)]
            agreements = rows.argmax(axis=-1) == exact[i].argmax(axis=-1)
            overlaps = mx.minimum(mx.exp(rows), mx.exp(exact[i])).sum(axis=-1)
            scores.divergences += divergence(exact[i], rows).tolist()
            scores.losses += token_losses(rows, targets)
            scores.agreements += agreements.tolist()
            scores.overlaps += overlaps.tolist()

    def generation(
        self, prompt: list[int], count: int, seed: int | None = None, ends: Iterable[int] = ()
    ) -> None:
        """Generate ``count`` tokens after a prompt with every cache; score them with the exact one.

        :func:`following_tokens` chooses them, beyond the ``ends`` of a text.
        """
        tokens, exact = mx.array(prompt[:-1]), []

        def measure(scores: Scores, cache: list[Any]) -> None:
            written = list(islice(following_tokens(self.model, cache, prompt[-1], seed), count))
            if scores.spec is EXACT:
                exact.extend(written)
            losses = exact_losses(self.model, prompt, written)
            departure = first_difference(exact, written)
            end = next((i for i, token in enumerate(written) if token in ends), None)
            scores.generations.append(Generation(seed is not None, written, losses, departure, end))
            self.progress(count)

        self._each(tokens, measure)
        measure(self.noise, read_prompt(self.model, _OTHER_CHUNKS, tokens))
        self.progress(len(tokens))


def exact_losses(model: nn.Module, prompt: list[int], following: list[int]) -> list[float]:
    """The losses of tokens after a prompt, in nats, with the exact cache."""
    tokens, start = mx.array(prompt + following), len(prompt)
    cache = read_prompt(model, EXACT, tokens[: start - 1])
    losses: list[float] = []
    for rows in log_probabilities(model, cache, tokens[start - 1 : -1]):
        losses += token_losses(rows, tokens[start + len(losses) :][: len(rows)])
    return losses
