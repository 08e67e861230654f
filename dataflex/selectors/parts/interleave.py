"""Rows from lists of nearest neighbours, the lists taking turns. N rows, M queries, K neighbours of each."""

from __future__ import annotations

import numpy as np


def interleaved(rows: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, bool]:
    """Return k distinct rows: every query's nearest in query order, then every query's second, and so on.

    A row that is there already is passed over, and its query waits for its next turn; with `rules.round_robin` it would
    take its next best at once. What is chosen begins with what is chosen for a smaller k, or from fewer neighbours.

    Args:
        rows: (M, K) positions of the K nearest rows of each query, nearest first.
        k: rows wanted.
        allowed: (N,) bool, whether a row can be chosen; all by default.

    Returns:
        Rows (k,) int64, and whether fewer than k were left: then those, and a larger K may bring the rest.

    Source: the selector `near` of DataFlex (arXiv 2603.26164).
    """
    walk = rows.T.ravel()
    if allowed is not None:
        walk = walk[allowed[walk]]
    _, first = np.unique(walk, return_index=True)  # of a row that several queries have, the first place counts
    chosen = walk[np.sort(first)[:k]].astype(np.int64)
    return chosen, len(chosen) < k
