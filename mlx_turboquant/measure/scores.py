"""The measurements of each cache in a comparison, and their summaries for tables and files."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .cache_specs import CacheSpec


class Generation(NamedTuple):
    """Tokens generated after a prompt, greedily or with random numbers that all caches share.

    ``losses`` are their losses with the exact cache, in nats; they rise if errors accumulate.
    ``departure`` is the index of the first token that differs from the exact cache's, or None, and
    ``end`` that of the first token that ends a text.
    """

    is_sampled: bool
    tokens: list[int]
    losses: list[float]
    departure: int | None
    end: int | None

    def summary(self, bins: int = 10) -> dict[str, Any]:
        """Numbers for a file, with the mean loss of each stretch of the tokens.

        The repetition is the share of runs of four tokens, up to the end, that were written before
        (Welleck et al., "Neural Text Generation with Unlikelihood Training", arXiv 1908.04319).
        """
        parts = np.array_split(np.array(self.losses), bins)
        runs = list(zip(*(self.tokens[i : self.end] for i in range(4))))
        return {
            "sampled": self.is_sampled,
            "tokens": len(self.tokens),
            "departure": self.departure,
            "end": self.end,
            "repetition": 1 - len(set(runs)) / len(runs) if runs else 0.0,
            "losses": [float(part.mean()) for part in parts if part.size],
        }


@dataclass
class Scores:
    """The measurements of one cache; divergences and losses are those of scored tokens, in nats.

    ``bits`` are per value, with its share of a scale, ``token_nbytes`` per token, both of tokens
    added to a long text. ``bits_in_all`` is the mean of all values of the last text, with exact
    tokens and free space (0 for mlx-lm's caches, 16 for simulated ones, which are dense).
    ``unpacked`` is that of :class:`.report.CacheSize`. ``positions`` are those of the scored tokens
    in their text. ``departures`` has for every text the index of the first greedy token that
    differs from the exact cache's, or None. ``overlaps`` are 1 minus the total variation between
    the distributions: the share of tokens drafted by one of them that the other accepts.
    """

    spec: CacheSpec
    bits: float = 0.0
    token_nbytes: float = 0.0
    bits_in_all: float = 0.0
    unpacked: int = 0
    positions: list[int] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    agreements: list[bool] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)
    departures: list[int | None] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    failure: str | None = None

    def summary(self) -> dict[str, Any]:
        """Numbers for a table or a file."""
        measured = {
            "codec": self.spec.name,
            "bits_per_value": self.bits,
            "token_nbytes": self.token_nbytes,
            "bits_in_all": self.bits_in_all,
            "unpacked": self.unpacked,
            "departures": self.departures,
            "failure": self.failure,
        }
        if self.failure is not None:
            return measured
        if self.divergences:
            median, p99, p999 = np.percentile(self.divergences, (50, 99, 99.9))
            measured |= {
                "kl_mean": float(np.mean(self.divergences)),
                "kl_median": float(median),
                "kl_p99": float(p99),
                "kl_p999": float(p999),
                "kl_max": max(self.divergences),
                "perplexity": float(np.exp(np.mean(self.losses))),
                "top1_agreement": float(np.mean(self.agreements)),
                "overlap": float(np.mean(self.overlaps)),
            }
        if self.generations:
            measured["generations"] = [each.summary() for each in self.generations]
        return measured

    def by_position(self, bins: int = 8) -> list[dict[str, float]]:
        """Divergence and perplexity of each stretch of the scored positions."""
        parts = np.array_split(np.unique(self.positions), bins)
        insides = ((part, np.isin(self.positions, part)) for part in parts if part.size)
        return [
            {
                "first": int(part[0]),
                "last": int(part[-1]),
                "kl_mean": float(np.mean(np.array(self.divergences)[inside])),
                "perplexity": float(np.exp(np.mean(np.array(self.losses)[inside]))),
            }
            for part, inside in insides
        ]
