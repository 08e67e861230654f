"""A mean over independent runs, and how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with the half-width of its interval.

    Attributes:
        mean: of the values.
        half: half the width of the 95 % interval of the mean (Student's t); None of fewer than two values.
        count: values.
    """

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate | None:
        """Estimate the mean of independent values; None of none, NaN where one is not finite."""
        if not values:
            return None
        if not all(map(math.isfinite, values)):
            return cls(math.nan, None, len(values))
        some = np.asarray(values, dtype=np.float64)
        if len(some) < 2:
            return cls(float(some.mean()), None, len(some))
        from scipy.stats import t

        width = float(t.ppf((1 + LEVEL) / 2, len(some) - 1)) * some.std(ddof=1) / math.sqrt(len(some))
        return cls(float(some.mean()), float(width), len(some))

    def __str__(self) -> str:
        """Say it in the table's form."""
        return f"{self.mean:.4f}" if self.half is None else f"{self.mean:.4f} ± {self.half:.4f}"
