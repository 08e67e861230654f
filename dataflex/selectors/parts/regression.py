"""Scores of all rows from exact scores of a few: kernel ridge regression on cheap vectors.

L rows with known scores, b rows of a block, D numbers per vector, J target sets.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_PAIRS = 1000
"""Known rows whose distances give the kernel's width."""
_NUMBERS = 1 << 22
"""Numbers of the kernel between new rows and known ones that are held at a time."""


def kernel_ridge(known: np.ndarray, values: np.ndarray, damping: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that predicts values (b, J) from vectors (b, D).

    The kernel is exp(-d^2 / (2 h^2)), h the median distance between known rows, the first 1,000; `damping` times the
    mean of the kernel's diagonal (1) is added. Values are centred: far from all known rows their mean is predicted.

    Args:
        known: (L, D) vectors of rows whose values are known.
        values: (L, J) their values.
        damping: above 0.

    Source: Influence Distillation, arXiv 2505.19051.
    """
    known = known.astype(np.float64)
    mean = values.mean(axis=0)
    some = known[:_PAIRS]
    # Of some rows: with all 16,384 that a regression takes, the distances would be another 2 GB.
    distances = np.sqrt(_squared(some, some)[np.triu_indices(len(some), 1)])
    width = float(np.median(distances)) if len(distances) else 1.0
    width = width if width > 0 else 1.0

    def kernel(vectors: np.ndarray) -> np.ndarray:
        closeness = _squared(vectors, known)
        closeness /= -2 * width**2
        return np.exp(closeness, out=closeness)

    matrix = kernel(known)
    matrix[np.diag_indices(len(known))] += damping
    weights = np.linalg.solve(matrix, values - mean)
    together = max(1, _NUMBERS // len(known))

    def predict(vectors: np.ndarray) -> np.ndarray:
        parts = [vectors[s : s + together].astype(np.float64) for s in range(0, max(1, len(vectors)), together)]
        return np.concatenate([kernel(part) @ weights + mean for part in parts])

    return predict


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return squared Euclidean distances, (len(a), len(b)); nothing else of that size is held."""
    # As one matrix product, which rounding can make negative where two vectors are alike.
    found: np.ndarray = 2 * a @ b.T
    squares, theirs = (a**2).sum(axis=1), (b**2).sum(axis=1)
    together = max(1, _NUMBERS // max(1, len(b)))
    for some in (slice(s, s + together) for s in range(0, len(a), together)):
        np.subtract(squares[some, None] + theirs, found[some], out=found[some])
    return np.maximum(found, 0, out=found)
