"""Refresh policies: which rows are computed with the live model at an update, and which values are reused with known age.

full: every row. rotating: `refresh_fraction` of the pool, the rest reused. static: none after the first update.
The targets are few and are refreshed at every update, but under `static`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex.pipelines.access import Snapshot


@dataclass(frozen=True)
class Mixed:
    """A view whose rows come from several stores, each part with its own age."""

    parts: list[tuple[np.ndarray, Snapshot]]
    status: np.ndarray
    ages: np.ndarray

    @classmethod
    def of(cls, parts: list[tuple[np.ndarray, Snapshot]], size: int) -> Mixed:
        """Join views of disjoint rows that together are all `size` rows."""
        status, ages = np.zeros(size, dtype=np.uint8), np.zeros(size, dtype=np.int32)
        for rows, view in parts:
            status[rows], ages[rows] = view.status, view.ages
        return cls(parts, status, ages)

    def scalar(self, name: str) -> np.ndarray:
        """Return a scalar column, (R,)."""
        columns = [(rows, view.scalar(name)) for rows, view in self.parts]
        out = np.zeros(len(self.status), dtype=columns[0][1].dtype)
        for rows, values in columns:
            out[rows] = values
        return out

    def blocks(self, size: int = 4096) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (rows, vectors) of usable rows, part by part."""
        for rows, view in self.parts:
            for inner, vectors in view.blocks(size):
                yield rows[inner], vectors


def due(refresh: Any, update: int, updated: np.ndarray | None, scores: np.ndarray | None) -> np.ndarray:
    """Say which rows are to be computed with the live model, (N,) bool.

    Rotating: rows of age `max_age` always; of what is left of the share, half goes to the best last scores (rows
    that are about to be chosen), half to the oldest values.

    Args:
        refresh: policy, refresh_fraction, max_age.
        update: updates done before this one.
        updated: (N,) update at which each row was last computed, or None at the first update.
        scores: (N,) last score of each row.
    """
    if updated is None or scores is None:
        return np.ones(1, dtype=bool)
    if refresh.policy == "full":
        return np.ones(len(updated), dtype=bool)
    if refresh.policy == "static":
        return np.zeros(len(updated), dtype=bool)
    age = update - updated
    chosen = age >= refresh.max_age if refresh.max_age is not None else np.zeros(len(age), dtype=bool)
    left = int(np.ceil(refresh.refresh_fraction * len(age))) - int(chosen.sum())
    for order, share in ((np.argsort(-scores, kind="stable"), left - left // 2), (np.argsort(-age, kind="stable"), left // 2)):
        free = order[~chosen[order]]
        chosen[free[: max(0, share)]] = True
    return chosen
