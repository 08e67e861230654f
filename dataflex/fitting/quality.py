"""How well the law predicts runs of mixtures that it was not fitted to.

R runs, J metrics.
"""

from __future__ import annotations

import numpy as np

from dataflex.draws import generator
from dataflex.fitting.law import fit_law
from dataflex.fitting.table import Runs

FOLDS = 10
"""Parts that are left out in turn; with fewer mixtures, one mixture at a time."""


def held_out(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Predict each run by a law, and by a mean, of the runs without it; both (R, J).

    Runs of the same mixture are left out together: otherwise the law would be asked for what it was shown.
    """
    group = runs.group
    distinct = group.max() + 1
    # The same folds each time, so that a fit is a function of its table.
    fold = (generator(0, "folds").permutation(distinct) % min(distinct, FOLDS))[group]
    predicted, means = np.empty_like(runs.values), np.empty_like(runs.values)
    for part in np.unique(fold):
        out = fold == part
        means[out] = runs.values[~out].mean(axis=0)
        for j in range(len(runs.metrics)):
            predicted[out, j] = fit_law(runs.mixtures[~out], runs.values[~out, j])(runs.mixtures[out])
    return predicted, means


def r_squared(values: np.ndarray, predicted: np.ndarray, means: np.ndarray | float) -> float:
    """Return the share of the squared error of the mean that the predictions avoid, (R,) each; at most 1."""
    return float(1 - ((values - predicted) ** 2).sum() / ((values - means) ** 2).sum())


def rank_correlation(values: np.ndarray, predicted: np.ndarray) -> float | None:
    """Return Spearman's correlation, (R,) each; None where all predictions are equal."""
    if np.ptp(predicted) == 0:
        return None
    return float(np.corrcoef(_ranks(values), _ranks(predicted))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks, equal values sharing the mean of theirs; scipy.stats takes a second to import."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[at])
