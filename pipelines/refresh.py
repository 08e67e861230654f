"""Refresh policies: which rows are computed at an update, and which values are reused with known age.

full: every row. rotating: `refresh_fraction` of the pool, the rest reused. static: none after the first update.
The targets are few and are refreshed at every update, but under `static`.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def due(refresh: Any, update: int, updated: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Say which rows are to be computed with the live model, (N,) bool.

    Rotating: rows of age `max_age` always; of what is left of the share, half goes to the best last scores (rows
    that are about to be chosen), half to the oldest values.

    Args:
        refresh: policy, refresh_fraction, max_age.
        update: updates done before this one.
        updated: (N,) update at which each row was last computed.
        scores: (N,) last score of each row.
    """
    if refresh.policy == "full":
        return np.ones(len(updated), dtype=bool)
    if refresh.policy == "static":
        return np.zeros(len(updated), dtype=bool)
    age = update - updated
    chosen = age >= refresh.max_age if refresh.max_age is not None else np.zeros(len(age), dtype=bool)
    left = int(np.ceil(refresh.refresh_fraction * len(age))) - int(chosen.sum())
    for order, share in (
        (np.argsort(-scores, kind="stable"), left - left // 2),
        (np.argsort(-age, kind="stable"), left // 2),
    ):
        free = order[~chosen[order]]
        chosen[free[: max(0, share)]] = True
    return chosen
