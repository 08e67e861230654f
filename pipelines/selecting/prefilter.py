"""Which rows go on to a method whose features are costly: the best by a cheap score, and a few of the others at random.

N training rows, R candidates. Shares are of distinct rows, as each is computed once; all copies of one go on together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Candidates:
    """The rows that go on.

    Attributes:
        rows: (R,) int64 positions in the training set, ascending.
        is_tail: (R,) bool, which of them were drawn at random from what the prefilter leaves out.
        stands_for: distinct rows left out for each that was drawn; 0 where none was.
    """

    rows: np.ndarray
    is_tail: np.ndarray
    stands_for: float

    def lost(self, chosen: np.ndarray) -> float | None:
        """Estimate which share of a choice from the whole pool would have been rows that were left out.

        Every chosen row of the tail counts as many times as the rows that it stands for, and the choice ends where so
        many are chosen as were wanted: a choice from the whole pool would have had no room for its last rows.

        Args:
            chosen: (k,) positions in `rows`, best first.

        Returns:
            0 to 1, or None where nothing was drawn from the tail, or nothing was chosen.
        """
        if not self.stands_for or not len(chosen):
            return None
        tail = self.is_tail[chosen]
        weights = np.where(tail, self.stands_for, 1.0)
        room = np.clip(len(chosen) - (np.cumsum(weights) - weights), 0, weights)
        return float(room[tail].sum() / len(chosen))


def candidates(
    scores: np.ndarray, keys: np.ndarray, able: np.ndarray, keep: float, tail: float, rng: np.random.Generator
) -> Candidates:
    """Return the best rows, and some of the rest.

    Args:
        scores: (N,) larger is better; a row whose score is not finite never goes on.
        keys: (N,) row keys; ties go by them, so the order of the pool does not matter.
        able: (N,) bool, rows that can be trained on.
        keep: share of the distinct able rows that is kept.
        tail: share of the other able rows with a score that is drawn.
        rng: draws them.
    """
    known = np.flatnonzero(able & np.isfinite(scores))
    distinct, of = np.unique(keys[known], return_inverse=True)
    best = np.full(len(distinct), -np.inf)
    np.maximum.at(best, of, scores[known])
    head, _ = counts(keep, tail, len(np.unique(keys[able])))
    order = np.argsort(-best, kind="stable")
    rest = np.sort(order[head:])
    drawn = rng.permutation(rest)[: _part(tail, len(rest))]
    role = np.zeros(len(distinct), np.int8)
    role[order[:head]], role[drawn] = 1, 2
    goes_on = role[of] > 0
    return Candidates(known[goes_on], role[of][goes_on] == 2, len(rest) / len(drawn) if len(drawn) else 0.0)


def counts(keep: float, tail: float, able: int) -> tuple[int, int]:
    """Return how many of so many distinct rows are kept, and how many are drawn from the rest, if all have a score."""
    head = _part(keep, able)
    return head, _part(tail, able - head)


def _part(share: float, size: int) -> int:
    """Return a share of a number of rows, rounded up; a product such as 0.07 x 100 is a little above what it means."""
    return min(size, math.ceil(round(share * size, 9)))
