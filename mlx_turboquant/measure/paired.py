"""What two caches answered to the same prompts, and how far apart they may be."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


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

    def verdict(self, name: str) -> str:
        """One line on the cache ``name``."""
        if self.low > 0:
            found = f"gains {self.difference:.1f} points, {self.low:.1f} to {self.high:.1f}"
        elif self.high < 0:
            found = f"loses {-self.difference:.1f} points, {-self.high:.1f} to {-self.low:.1f}"
        else:
            found = f"no difference found, at most {abs(self.low):.1f} points lost"
        return f"{name}: {found} with 95 % confidence."


def paired(
    exact: Sequence[bool], other: Sequence[bool], passages: Sequence[Any] | None = None
) -> Paired:
    """Compare right and wrong answers to the same n > 0 prompts.

    The interval is the adjusted one of Bonett and Price, "Adjusted Wald Confidence Interval for a
    Difference of Binomial Proportions Based on Paired Data" (Journal of Educational and Behavioral
    Statistics 37, 2012). Prompts of the same of ``passages`` may fail together: they count as fewer
    where the differences of passages vary more than those of single prompts would.
    """
    kinds = 2 * np.array(exact, int) + np.array(other, int)
    neither, only_other, only_exact, both = np.bincount(kinds, minlength=4).tolist()
    differences = (kinds == 1) * 1.0 - (kinds == 2)
    count = len(kinds)
    size = count / _design_effect(differences, passages)
    lost, won = ((size / count * only + 1) / (size + 2) for only in (only_exact, only_other))
    middle = won - lost
    margin = 1.959964 * math.sqrt((lost + won - middle**2) / (size + 2))  # the quantile of 97.5 %
    return Paired(
        both,
        only_exact,
        only_other,
        neither,
        100 * float(differences.mean()),
        100 * max(middle - margin, -1.0),
        100 * min(middle + margin, 1.0),
    )


def _design_effect(differences: np.ndarray, passages: Sequence[Any] | None) -> float:
    """How many prompts say as much as one of a passage of its own (Kish, "Survey Sampling")."""
    names, index = np.unique(range(0) if passages is None else passages, return_inverse=True)
    if len(names) < 2 or not differences.std():  # all alike
        return 1.0
    sums = np.bincount(index, differences - differences.mean())
    alone = len(differences) * differences.var()
    return max(1.0, len(names) / (len(names) - 1) * float((sums**2).sum()) / alone)
