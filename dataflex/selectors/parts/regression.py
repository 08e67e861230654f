"""Scores of all rows from exact scores of a few: kernel ridge regression on cheap vectors.

L rows with known scores, b rows of a block, D numbers per vector, J target sets.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_PAIRS = 1000
"""Known rows whose distances give the kernel's width."""


def kernel_ridge(known: np.ndarray, values: np.ndarray, damping: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that predicts values (b, J) from vectors (b, D).

    The kernel is exp(-d^2 / (2 h^2)), h the median distance between the known rows; `damping` times the mean of the
    kernel's diagonal (1) is added to it. Values are centred, so that far from all known rows their mean is predicted.

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
        return np.exp(-_squared(vectors, known) / (2 * width**2))

    weights = np.linalg.solve(kernel(known) + damping * np.eye(len(known)), values - mean)
    return lambda vectors: kernel(vectors.astype(np.float64)) @ weights + mean


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return squared Euclidean distances, (len(a), len(b))."""
    # As one matrix product, which rounding can make negative where two vectors are alike.
    return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T, 0)
