"""What two caches answered to the same prompts, and how far apart they may be."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .passages import QUESTIONS

# With fewer passages, intervals are too narrow where prompts of a passage fail together.
ENOUGH_PROMPTS = 20 * QUESTIONS


class Paired(NamedTuple):
    """Counts of prompts by who answered right, and the difference in points.

    The difference is the share of the other cache less that of the exact one, in hundredths, with
    an interval of 95 % confidence from ``low`` to ``high``. Prompts are of so many ``passages``.
    """

    both: int
    only_exact: int
    only_other: int
    neither: int
    difference: float
    low: float
    high: float
    passages: int

    def verdict(self, name: str) -> str:
        """One line on the cache ``name``."""
        if self.passages * QUESTIONS < ENOUGH_PROMPTS:
            found = f"{self.difference:+.1f} points ({self.low:+.1f} to {self.high:+.1f})"
            return f"{name}: {found}, too few for a verdict, which needs {ENOUGH_PROMPTS} prompts."
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
    names, index = np.unique(range(count) if passages is None else passages, return_inverse=True)
    size = count / _design_effect(differences, index)
    lost, won = ((size / count * only + 1) / (size + 2) for only in (only_exact, only_other))
    middle = won - lost
    margin = _quantile(len(names)) * math.sqrt((lost + won - middle**2) / (size + 2))
    return Paired(
        both,
        only_exact,
        only_other,
        neither,
        100 * float(differences.mean()),
        100 * max(middle - margin, -1.0),
        100 * min(middle + margin, 1.0),
        len(names),
    )


def _quantile(count: int) -> float:
    """97.5 % of Student's t for the mean of ``count`` numbers (Cornish-Fisher expansion)."""
    z, freedom = 1.959964, max(count - 1, 1)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _design_effect(differences: np.ndarray, passages: np.ndarray) -> float:
    """How many prompts say as much as one of a passage of its own (Kish, "Survey Sampling").

    ``passages`` are numbers from 0 on, one for each prompt.
    """
    sums = np.bincount(passages, differences - differences.mean())
    if len(sums) < 2 or not differences.std():  # all alike
        return 1.0
    alone = len(differences) * differences.var()
    return max(1.0, len(sums) / (len(sums) - 1) * float((sums**2).sum()) / alone)
