"""What two caches answered to the same prompts, and how far apart they may be."""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

_QUANTILE = 1.959964  # the normal one, of 97.5 %


class Paired(NamedTuple):
    """Counts of prompts by who answered right, and the difference in points.

    The difference is the share of the other cache less that of the exact one, in hundredths, with
    an interval of 95 % confidence from ``low`` to ``high``.
    """

    both: int
    only_exact: int
    only_other: int
    neither: int
    difference: float
    low: float
    high: float

    @property
    def is_different(self) -> bool:
        """Whether the interval excludes that there is no difference."""
        return self.low > 0 or self.high < 0

    def verdict(self, name: str) -> str:
        """One line on the cache ``name``."""
        if not self.is_different:
            return (
                f"{name}: no difference found, at most {max(-self.low, 0):.1f} points lost with "
                "95 % confidence."
            )
        word, low, high = "loses", -self.high, -self.low
        if self.low > 0:
            word, low, high = "gains", self.low, self.high
        return (
            f"{name}: {word} {abs(self.difference):.1f} points, {low:.1f} to {high:.1f} with 95 % "
            "confidence."
        )


def paired(
    exact: Sequence[bool], other: Sequence[bool], passages: Sequence[Hashable] | None = None
) -> Paired:
    """Compare right and wrong answers to the same n > 0 prompts.

    The interval is the adjusted one of Bonett and Price, "Adjusted Wald Confidence Interval for a
    Difference of Binomial Proportions Based on Paired Data" (Journal of Educational and Behavioral
    Statistics 37, 2012). Prompts of the same of ``passages`` may fail together: they count as fewer
    where the differences of passages vary more than those of single prompts would.
    """
    pairs = np.array([exact, other], dtype=float)
    count = pairs.shape[1]
    differences = pairs[1] - pairs[0]
    both = int((pairs.sum(axis=0) == 2).sum())
    only_exact, only_other = int((differences < 0).sum()), int((differences > 0).sum())
    size = count / _design_effect(differences, passages)
    lost, won = ((size / count * only + 1) / (size + 2) for only in (only_exact, only_other))
    middle = won - lost
    margin = _QUANTILE * math.sqrt((lost + won - middle**2) / (size + 2))
    return Paired(
        both,
        only_exact,
        only_other,
        count - both - only_exact - only_other,
        100 * float(differences.mean()),
        100 * max(middle - margin, -1.0),
        100 * min(middle + margin, 1.0),
    )


def _design_effect(differences: np.ndarray, passages: Sequence[Hashable] | None) -> float:
    """How many prompts say as much as one of a passage of its own (Kish, "Survey Sampling")."""
    passages = range(0) if passages is None else list(passages)
    numbers = {passage: i for i, passage in enumerate(dict.fromkeys(passages))}
    several = len(numbers)
    if several < 2 or not differences.std():  # all alike
        return 1.0
    index = [numbers[passage] for passage in passages]
    sums = np.bincount(index, differences - differences.mean())
    alone = len(differences) * differences.var()
    return max(1.0, several / (several - 1) * float((sums**2).sum()) / alone)
