"""Rules that turn scores into rows. N rows, J target sets; a score of -inf or NaN can never be chosen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataflex.errors import CoverageError
from dataflex.rows import by_key


def ranking(scores: np.ndarray, keys: np.ndarray, ties: np.ndarray | None = None) -> np.ndarray:
    """Return the rows that can be chosen, best first: by (-score, -tie, row key, position).

    The row key breaks ties, so the order of the pool does not matter; identical rows stay apart by position.

    Args:
        scores: (N,).
        keys: (N,) row keys.
        ties: (N,) finite, larger goes first among equal scores; None: none does.
    """
    rows = np.flatnonzero(np.isfinite(scores))
    rows = rows[by_key(keys[rows])]
    first = np.zeros(len(rows)) if ties is None else -ties[rows]
    return rows[np.lexsort((first, -scores[rows]))]  # stable, so that equal ones stay in the order of their keys


def top_k(scores: np.ndarray, keys: np.ndarray, k: int, ties: np.ndarray | None = None) -> np.ndarray:
    """Return the k best rows, best first.

    Raises:
        CoverageError: fewer than k rows can be chosen.
    """
    order = ranking(scores, keys, ties)
    _require(len(order), k, len(scores))
    return order[:k]


def round_robin(scores: np.ndarray, keys: np.ndarray, k: int, ties: np.ndarray | None = None) -> np.ndarray:
    """Let the J columns take turns, each taking its best row that is not yet taken.

    Every prefix of the result is the result for a smaller k.

    Args:
        scores: (N, J).
        keys: (N,) row keys.
        k: rows wanted.
        ties: as for `ranking`.

    Raises:
        CoverageError: fewer than k rows can be chosen.
    """
    return take_turns([ranking(column, keys, ties) for column in scores.T], k, len(scores))


def take_turns(orders: Sequence[np.ndarray], k: int, total: int) -> np.ndarray:
    """Let lists of rows take turns, each giving its first row that is not taken yet.

    Args:
        orders: (J,) lists of positions, best first.
        k: rows wanted.
        total: N, training rows.

    Raises:
        CoverageError: fewer than k rows are in the lists.
    """
    _require(len(np.unique(np.concatenate(orders))), k, total)
    taken = np.zeros(total, dtype=bool)
    cursors, chosen = [0] * len(orders), []
    while True:  # ends: k distinct rows are in the lists
        for j, order in enumerate(orders):
            while cursors[j] < len(order) and taken[order[cursors[j]]]:
                cursors[j] += 1
            if cursors[j] < len(order):
                taken[order[cursors[j]]] = True
                chosen.append(order[cursors[j]])
            if len(chosen) == k:
                return np.asarray(chosen, dtype=np.int64)


def _require(usable: int, k: int, total: int) -> None:
    if usable < k:
        raise CoverageError(
            f"{k} rows wanted at one update, found {usable} that can be chosen of {total} (rows without supervised "
            "tokens or with non-finite values never are). Lower update_step or the batch size, or add data."
        )
