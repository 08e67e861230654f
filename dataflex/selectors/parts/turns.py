"""Target rows taking turns: each takes the training row most similar to it that is not taken yet.

N training rows, b of them in a block, M target rows of all sets, n candidates of each, k rows wanted, D numbers per
vector. No N x M matrix exists: when a target row's turn comes fewer than k rows are taken, so its k best are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dataflex import distributed
from dataflex.errors import CoverageError
from dataflex.rows import by_key
from dataflex.selectors.base import View
from dataflex.selectors.parts.rules import take_turns
from dataflex.selectors.parts.similarity import (
    Similarity,
    are_usable,
    comparable,
    joined,
    pairs,
    shared_blocks,
    vectors_of,
)


@dataclass(frozen=True)
class Comparison:
    """Training rows beside target sets at one model state; a similarity is the weighted sum over states.

    Attributes:
        view: of the training rows.
        targets: target sets by name.
        weight: of this state.
    """

    view: View
    targets: Mapping[str, View]
    weight: float


def rows_in_turn(
    comparisons: Sequence[Comparison], keys: np.ndarray, k: int, similarity: Similarity, ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    """Let all target rows take turns until k training rows are taken. Collective.

    The first row of every set has its turn, then the second of every set, and so on, and after the last the first
    again. A target row or training row without a vector at one of the states takes no part. Ties go by (row key,
    position).

    Args:
        comparisons: one per model state.
        keys: (N,) keys of the training rows.
        k: rows wanted.
        similarity: as for `set_scores`.
        ridge: as for `set_scores`.

    Returns:
        The rows (k,) in the order in which they were taken, and the similarity of every training row to the target row
        that it is most similar to, (N,), -inf where it takes no part.

    Raises:
        CoverageError: a target set has no usable row, or fewer than k training rows can be chosen.
        ConfigError: vectors of more than `WHITENED_MOST` numbers are to be whitened.
    """
    queries = _target_rows([c.targets for c in comparisons])
    rank = np.empty(len(keys), np.int64)
    rank[by_key(keys)] = np.arange(len(keys))
    own, most = _Leaders(rank, len(queries[0]), k), []
    for rows, scores in _similarities(comparisons, queries, similarity, ridge):
        own.add(scores.T, rows)
        most.append((rows, scores.max(axis=1, keepdims=True)))
    own.keep_best()
    leaders = _Leaders(rank, len(queries[0]), k)
    for scores, rows in distributed.gather((own.scores, own.rows)):
        leaders.add(scores, rows)
    leaders.keep_best()
    return take_turns(list(leaders.rows), k, len(keys)), joined(most, len(keys), 1)[:, 0]


def _target_rows(states: Sequence[Mapping[str, View]]) -> list[np.ndarray]:
    """Return the target rows' vectors in the order of their turns, (M, D) float64 for each state.

    Raises:
        CoverageError: a set has none.
    """
    found: list[list[np.ndarray]] = [[] for _ in states]
    for name in states[0]:
        vectors = [vectors_of(targets[name], np.arange(len(targets[name].status))) for targets in states]
        able = np.logical_and.reduce([are_usable(each) for each in vectors])
        if not able.any():
            raise CoverageError(
                f"target set {name}: found no row with supervised tokens and a finite vector that is not zero at every "
                f"one of {len(states)} model states; expected at least one"
            )
        for state, each in zip(found, vectors, strict=True):
            state.append(each[able].astype(np.float64))
    # Not set after set: an update of fewer rows than there are targets would hear the first sets alone.
    order = np.argsort(np.concatenate([np.arange(len(each)) for each in found[0]]), kind="stable")
    return [np.concatenate(state)[order] for state in found]


def _similarities(
    comparisons: Sequence[Comparison], queries: Sequence[np.ndarray], similarity: Similarity, ridge: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield this rank's share of the training rows: (rows (b,), similarities (b, M)). Collective."""
    width = queries[0].shape[1]
    ready = [comparable(c.view, width, similarity, ridge) for c in comparisons]
    asked = [prepare(each)[0] for prepare, each in zip(ready, queries, strict=True)]
    for rows, first in shared_blocks(comparisons[0].view):
        total, able = np.zeros((len(rows), len(queries[0]))), np.ones(len(rows), dtype=bool)
        for i, c in enumerate(comparisons):
            block, is_usable = ready[i](vectors_of(c.view, rows, width) if i else first)
            total += c.weight * pairs(block, asked[i], similarity)
            able &= is_usable
        if able.any():
            yield rows[able], total[able]


class _Leaders:
    """The k best training rows of each of M target rows, of all that were added.

    Attributes:
        scores: (M, n), best first, n at most k; without what was added since `keep_best`.
        rows: (M, n) their positions.
    """

    def __init__(self, rank: np.ndarray, targets: int, k: int):
        self._rank, self._k = rank, k
        self.scores = np.empty((targets, 0))
        self.rows = np.empty((targets, 0), np.int64)
        self._new: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Take in scores (M, b) of rows (b,), or of other rows for each target row (M, b)."""
        self._new.append((scores, np.broadcast_to(rows, scores.shape)))
        if sum(some.shape[1] for some, _ in self._new) >= self._k:  # of several blocks at once, so that sorting is rare
            self.keep_best()

    def keep_best(self) -> None:
        """Forget all but the k best of each target row, by (-score, row key, position)."""
        scores = np.concatenate([self.scores, *(some for some, _ in self._new)], axis=1)
        rows = np.concatenate([self.rows, *(some for _, some in self._new)], axis=1)
        order = np.lexsort((self._rank[rows], -scores), axis=1)[:, : self._k]
        self.scores, self.rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
        self._new = []
