"""Refresh policies: which rows are computed at an update, and what is done about the age of the others.

full: every row. rotating: `refresh_fraction` of the pool, the rest reused. static: none after the first update.
The targets are few and are refreshed at every update, but under `static`.

Rotating works in two passes. Before anything is scored, `first` names the anchors (the same rows at every update), rows
that are too old, and some of the oldest. `moved` tells from the anchors by how much the vectors of all rows have moved
since an earlier update; the reused ones are moved along. With them every row is scored against the targets of now, and
what is left of the share goes to the selected and the next best (`rest`), before the selector chooses again.

Vectors move together because Adam's momentum is a part of every row's step, and the larger one. It turns within a few
steps, and without moving the reused vectors along they would be compared with the targets under a momentum of the past.
"""

from __future__ import annotations

import numpy as np

from dataflex.config.keys import Refresh
from dataflex.draws import generator

_EACH = 20
"""One row in so many of the share is an anchor, and one is of the oldest."""
_ANCHORS = (4, 1024)
"""Fewest anchors, if half of the share is as many, and most: more would not make their mean much surer."""


def anchors(refresh: Refresh, size: int) -> np.ndarray:
    """Return the rows that are computed at every update, ascending; a function of the share and the pool's size."""
    share = share_of(refresh, size)
    count = min(max(share // _EACH, _ANCHORS[0]), max(1, share // 2), _ANCHORS[1])
    return np.sort(generator(0, "anchors").permutation(size)[:count])


def first(refresh: Refresh, update: int, updated: np.ndarray) -> np.ndarray:
    """Say which rows are computed with the live model before any is scored, (N,) bool.

    Args:
        refresh: how rows are refreshed.
        update: updates done before this one.
        updated: (N,) update at which each row was last computed.
    """
    if refresh.policy == "full":
        return np.ones(len(updated), dtype=bool)
    chosen = np.zeros(len(updated), dtype=bool)
    if refresh.policy == "static":
        return chosen
    age, share = update - updated, share_of(refresh, len(updated))
    chosen[anchors(refresh, len(updated))] = True
    if refresh.max_age is not None:
        chosen |= age >= refresh.max_age
    return _with_best(chosen, age, min(max(1, share // _EACH), share - int(chosen.sum())))


def rest(refresh: Refresh, chosen: np.ndarray, scores: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """Add rows to those computed already until the share is used up, (N,) bool: selected ones, then the best.

    Args:
        refresh: how rows are refreshed.
        chosen: (N,) bool, what `first` named.
        scores: (N,) by reused vectors and the targets of now; -inf where a row has none.
        selected: (k,) rows that would be chosen by them; not those of the best scores under every rule.
    """
    values = scores.copy()
    values[selected] = np.inf
    return _with_best(chosen, values, share_of(refresh, len(chosen)) - int(chosen.sum()))


def moved(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return by how much vectors have moved on average, (D,) float32; zero if no row has both.

    Args:
        now: (c, D) the anchors' vectors at this update, NaN where one is not usable.
        before: (c, D) the same at an earlier update.
    """
    both = np.isfinite(now).all(axis=1) & np.isfinite(before).all(axis=1)
    steps = now[both].astype(np.float64) - before[both]
    return (steps.mean(axis=0) if both.any() else np.zeros(now.shape[1])).astype(np.float32)


def share_of(refresh: Refresh, size: int) -> int:
    """Return how many of so many rows are computed at an update."""
    return int(np.ceil(round(refresh.refresh_fraction * size, 9)))  # 0.07 x 200 is a little above 14 in floats


def _with_best(chosen: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Return `chosen` and the `count` largest values among the other rows, ties by position."""
    order = np.argsort(-values, kind="stable")
    more = chosen.copy()
    more[order[~chosen[order]][: max(0, count)]] = True
    return more
