"""Weights and random draws of rows. A draw is a function of the generator and the row keys, not of the pool's order.

Weights of N rows are given as their logarithms, so that none is too large or too small to be told from the others.
"""

from __future__ import annotations

import math

import numpy as np

from dataflex.errors import CoverageError
from dataflex.rows import by_key


def sample(logits: np.ndarray, keys: np.ndarray, k: int, rng: np.random.Generator, replacement: bool) -> np.ndarray:
    """Draw k rows with probability proportional to exp(logits), in the order drawn.

    Without replacement by the Gumbel trick, which is distributed as drawing one after the other. Noise is dealt in the
    order of (row key, position).

    Args:
        logits: (N,) logarithms of weights; -inf or NaN is never drawn.
        keys: (N,) row keys.
        k: rows wanted.
        rng: source of the noise.
        replacement: whether a row may be drawn again.

    Raises:
        CoverageError: fewer than k rows have a positive weight (with replacement: none has).
    """
    order = np.flatnonzero(np.isfinite(logits))
    order = order[by_key(keys[order])]  # noise is dealt by position: in the pool's own order it would depend on that
    if len(order) < (1 if replacement else k):
        raise CoverageError(
            f"{k} rows wanted at one update, found {len(order)} of {len(logits)} that can be drawn; lower update_step "
            "or the batch size, draw with replacement, or widen what may be drawn"
        )
    known = logits[order].astype(np.float64)
    if replacement:
        chances = np.exp(known - known.max())  # the largest is 1, so none overflows
        return order[rng.choice(len(order), size=k, p=chances / chances.sum())]
    scores = known + rng.gumbel(size=len(order))
    return order[np.argsort(-scores, kind="stable")[:k]]


def logs(weights: np.ndarray) -> np.ndarray:
    """Return the logarithms of weights of 0 or more, (N,)."""
    return np.log(weights, out=np.full(len(weights), -np.inf), where=weights > 0)


def band_logits(
    values: np.ndarray, quantiles: tuple[float, float], focus: str, focus_weight: float, temperature: float
) -> np.ndarray:
    """Return the logarithm of each row's weight by its third of the values, (N,); -inf where the value is not finite.

    With q1, q2 the quantiles (linear interpolation) of the finite values: low is v <= q1, medium q1 < v <= q2, high
    v > q2. Rows of the band in focus weigh `focus_weight`, others 1, all to the power 1 / temperature. Nothing is
    added, so that a row without a value is never drawn.
    """
    finite = np.isfinite(values)
    logits = np.full(len(values), -np.inf)
    if finite.any():
        low, high = np.quantile(values[finite], quantiles)
        bands = {"low": values <= low, "medium": (values > low) & (values <= high), "high": values > high}
        logits[finite] = np.where(bands[focus][finite], math.log(focus_weight) / temperature, 0.0)
    return logits


def window_weights(deltas: np.ndarray, ranks: np.ndarray, share: float, progress: float, outside: float) -> np.ndarray:
    """Return the weights of a window over rows sorted by how much they have learned, (N,).

    The window of `share` * n rows starts at sigmoid(10 (progress - 0.5)) (n - share * n), ends before the first
    negative delta, and weighs 1; the n usable rows outside weigh `outside`.

    Args:
        deltas: (N,) larger is more learned; NaN where unusable.
        ranks: (n,) the usable rows, largest delta first.
        share: width of the window.
        progress: 0 at the first update, 1 at the last.
        outside: weight of a usable row outside the window.
    """
    size = len(ranks)
    start = (size - share * size) / (1 + math.exp(-10 * (progress - 0.5)))
    end = min(int(start + share * size), int((deltas[ranks] >= 0).sum()))
    weights = np.zeros(len(deltas))
    weights[ranks] = outside
    weights[ranks[int(start) : max(int(start), end)]] = 1.0
    return weights
