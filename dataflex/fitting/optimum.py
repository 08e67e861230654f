"""The mixture with the least expected metric, near a prior and without too much repetition.

K domains, J metrics.
"""

from __future__ import annotations

import numpy as np

GAP = 1e-9
"""How far above the minimum the objective may be, in units of the metrics; times its size at the start if above 1."""


def best_mixture(
    slopes: np.ndarray,
    weights: np.ndarray,
    prior: np.ndarray | None = None,
    kl: float = 0.0,
    caps: np.ndarray | None = None,
) -> np.ndarray:
    """Return argmin over the simplex, x <= caps, of sum_j weights_j exp(slopes_j . x) + kl KL(x || prior), (K,).

    The problem is convex; a barrier method follows its central path until the objective is within `GAP` of the minimum.
    A domain with prior 0 gets nothing where `kl` acts.

    Source: Olmix (allenai/olmix, 2026); the caps are those of UniMax (arXiv 2304.09151).

    Args:
        slopes: (J, K).
        weights: (J,), at least 0.
        prior: (K,), summing to 1; needed where `kl` is above 0.
        kl: weight of the divergence from the prior, in units of the metrics per nat.
        caps: (K,), largest shares.

    Raises:
        ValueError: the caps of the domains that may have a share sum to less than 1.
    """
    count = slopes.shape[1]
    bounds = np.ones(count) if caps is None else np.minimum(caps, 1.0)
    centre = np.full(count, 1 / count) if prior is None or kl == 0 else prior
    free = (bounds > 0) & (centre > 0)
    result = np.zeros(count)
    total = bounds[free].sum()
    if total < 1 - 1e-12:
        raise ValueError(f"found largest shares that sum to {total:g}; expected 1 or more")
    if total < 1 + 1e-9:
        result[free] = bounds[free] / total
        return result
    # Large terms would take the digits of the others.
    start = bounds[free] / total
    scale = max(1.0, kl, float(weights @ np.exp(np.minimum(slopes[:, free] @ start, 600))))
    result[free] = _follow_path(slopes[:, free], weights / scale, centre[free], kl / scale, bounds[free])
    return result


def _follow_path(
    slopes: np.ndarray, weights: np.ndarray, prior: np.ndarray, kl: float, bounds: np.ndarray
) -> np.ndarray:
    """Minimise with barriers at 0 and at the bounds, which become steeper until they no longer matter."""

    def objective(x: np.ndarray, barrier: float) -> float:
        divergence = kl * (x @ np.log(x / prior))
        return float(weights @ np.exp(slopes @ x) + divergence - barrier * (np.log(x).sum() + np.log(bounds - x).sum()))

    count = len(bounds)
    x = bounds / bounds.sum()
    barrier = 1.0
    while True:
        for _ in range(200):
            step, decrease = _newton(x, slopes, weights, prior, kl, bounds, barrier)
            ahead = np.where(step < 0, x, bounds - x) / np.maximum(np.abs(step), 1e-300)
            # Not onto a bound, where the barrier's logarithm is not finite.
            length, value = min(1.0, 0.99 * float(ahead.min())), objective(x, barrier)
            if decrease < 1e-3 * barrier:  # near enough for full steps, whose gain the value may have no digits for
                x = x + length * step
                break
            while objective(x + length * step, barrier) > value - 0.1 * length * decrease and length > 1e-12:
                length /= 2
            x = x + length * step
        if 2 * count * barrier < GAP:  # what a minimum with 2 K barriers may lie above the one without, at most
            return x / x.sum()
        barrier /= 10


def _newton(
    x: np.ndarray,
    slopes: np.ndarray,
    weights: np.ndarray,
    prior: np.ndarray,
    kl: float,
    bounds: np.ndarray,
    barrier: float,
) -> tuple[np.ndarray, float]:
    """Return the Newton step that keeps the sum, (K,), and twice the decrease it promises."""
    left = bounds - x
    terms = weights * np.exp(slopes @ x)
    gradient = terms @ slopes + kl * (np.log(x / prior) + 1) - barrier / x + barrier / left
    # Scaled by x, the Hessian keeps its condition where shares are as good as 0.
    hessian = (slopes.T * terms) @ slopes * np.outer(x, x) + np.diag(kl * x + barrier + barrier * (x / left) ** 2)
    solved = np.linalg.solve(hessian, np.column_stack([x * gradient, x]))
    scaled = solved[:, 1] * (x @ solved[:, 0]) / (x @ solved[:, 1]) - solved[:, 0]
    step = x * scaled
    return step, float(-gradient @ step)
