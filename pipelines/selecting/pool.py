"""The training rows that a selector looks at: all, or those that a prefilter lets through.

N training rows, R of them that are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dataflex.pipelines.run import Run
from dataflex.pipelines.selecting.prefilter import Candidates, counts
from dataflex.rows import Rows
from dataflex.selectors.base import Selection


@dataclass(frozen=True)
class Pool:
    """Rows that are looked at, numbered from 0 as a selector sees them.

    Attributes:
        rows: these rows, R.
        size: N.
        picked: which they are; None: all.
    """

    rows: Rows
    size: int
    picked: Candidates | None = None

    @classmethod
    def of(cls, rows: Rows, picked: Candidates | None = None) -> Pool:
        """Return all training rows, or those that were picked."""
        return cls(rows if picked is None else rows.take(picked.rows), len(rows), picked)

    @property
    def head(self) -> np.ndarray:
        """Positions of the rows that are no sample of what was left out, (H,)."""
        return np.arange(len(self.rows)) if self.picked is None else np.flatnonzero(~self.picked.is_tail)

    @property
    def tail(self) -> np.ndarray:
        """Positions of the others, (R - H,)."""
        return np.empty(0, np.int64) if self.picked is None else np.flatnonzero(self.picked.is_tail)

    def inside(self, values: np.ndarray) -> np.ndarray:
        """Return the values of these rows, (R,), of those of all training rows, (N,)."""
        return values if self.picked is None else values[self.picked.rows]

    def whole(self, values: np.ndarray, missing: float) -> np.ndarray:
        """Return values of all training rows, (N,), of those of these rows, (R,); `missing` of the others."""
        if self.picked is None:
            return values
        found = np.full(self.size, missing, dtype=values.dtype)
        found[self.picked.rows] = values
        return found

    def place(self, rows: np.ndarray) -> np.ndarray:
        """Return where training rows (k,) stand among these, (k,); -1 of one that is not looked at."""
        where = self.whole(np.arange(len(self.rows)), -1)
        return np.asarray(where[rows])

    def of_all(self, selection: Selection) -> Selection:
        """Return a selection from these rows as one from the training set."""
        if self.picked is None:
            return selection
        each = {
            name: None if values is None else self.whole(np.asarray(values, dtype=np.float64), -np.inf)
            for name, values in (("pool", selection.pool), ("judged", selection.judged))
        }
        return replace(selection, rows=self.picked.rows[selection.rows], **each)


def most_rows(run: Run) -> int:
    """Return how many training rows a selector can look at, at most: those with labels, copies of one among them."""
    options = run.settings.dataflex.prefilter
    if options is None:
        return len(run.eligible)
    _, copies = np.unique(run.rows.keys[run.eligible], return_counts=True)
    head, tail = counts(options.keep, options.tail, len(copies))
    return int(np.sort(copies)[::-1][: head + tail].sum())
