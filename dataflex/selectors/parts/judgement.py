"""What a representation and a similarity say of every row, from which a rule chooses.

N training rows, J target sets, M target rows in all of them, R some rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dataflex.selectors.base import Context
from dataflex.selectors.parts.streamed import Streamed


@dataclass(frozen=True)
class Judgement:
    """What is known of N training rows at one update.

    Attributes:
        context: the update.
        scores: (N,) float64, larger is better; NaN or -inf where a row cannot be judged.
        ages: (N,) int32, updates since the features behind a score were computed.
        sets: (N, J) float64, scores by target set; None for numbers that look at no target.
        ties: (N,) float64, larger goes first among equal scores; None: by row key.
        nearest: k -> (distances (M, k), rows (M, k)) of the k nearest usable rows to each of the M target rows, nearest
            first; None if the rule does not look at neighbours.
        reach: the largest k that `nearest` takes.
        vectors: rows (R,) -> their vectors, between which distances are taken; None if there are none.
    """

    context: Context
    scores: np.ndarray
    ages: np.ndarray
    sets: np.ndarray | None = None
    ties: np.ndarray | None = None
    nearest: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None
    reach: int = 0
    vectors: Callable[[np.ndarray], Streamed] | None = None

    @property
    def usable(self) -> np.ndarray:
        """Rows that can be chosen, ascending."""
        return np.flatnonzero(np.isfinite(self.scores))
