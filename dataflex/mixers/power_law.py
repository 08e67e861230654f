"""How a loss falls with the data seen: a power law, fitted so that outliers count little.

T points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DELTA = 1e-3  # where Huber's loss of a difference of logarithms turns linear
EXPONENTS = (0.001, 0.8)  # both ends as in the code of the authors of ADO, there by a penalty
STARTS, ROUNDS = 6, 200


@dataclass(frozen=True)
class PowerLaw:
    """Loss(n) = irreducible + scale * (n / reference) ^ -exponent, in nats.

    The reference keeps the scale near the losses, whatever n counts: alone, it says nothing.
    """

    irreducible: float
    scale: float
    exponent: float
    reference: float

    def reducible(self, n: np.ndarray | float) -> np.ndarray:
        """Return the part of the loss at n that more data would take away, shaped as n."""
        return np.asarray(self.scale * (np.asarray(n, dtype=np.float64) / self.reference) ** -self.exponent)

    def __call__(self, n: np.ndarray | float) -> np.ndarray:
        """Return the loss at n, shaped as n."""
        return self.irreducible + self.reducible(n)


def fit(n: np.ndarray, loss: np.ndarray) -> PowerLaw:
    """Fit a power law to losses (T,) > 0 after n (T,) > 0, T >= 3: the same on every machine up to rounding.

    Minimises the sum of Huber's loss of log(predicted / found), 0.001 wide, with the irreducible loss at least 0 and
    at most the median of the losses, and the exponent in 0.001 to 0.8.
    Source: ADO (arXiv 2410.11820), whose code starts L-BFGS from a grid. Deviations: for each exponent and irreducible
    loss of the grid the scale is a median; the best few are refined by damped Gauss-Newton steps on reweighted
    squares; bounds stand for penalties, and the irreducible loss may be below 1.65 nats, as in fine-tuning it is.
    """
    n, loss = np.asarray(n, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    reference = float(np.exp(np.log(n).mean()))  # about it, scale and exponent hardly depend on each other
    x, y = np.log(n / reference), np.log(loss)
    # the reference lies among the points, so the scale is no more than the losses: its bounds stop a step, not a fit
    lowest = np.array([np.log(1e-9 * loss.min()), EXPONENTS[0], 0.0])
    highest = np.array([np.log(1e3 * loss.max()), EXPONENTS[1], np.median(loss)])
    starts = sorted(((_cost(_residual(p, x, y)), p.tolist()) for p in _grid(x, loss)), key=lambda pair: pair[0])
    found = [_refined(np.array(p), x, y, lowest, highest) for _, p in starts[:STARTS]]
    best = min(found, key=lambda p: _cost(_residual(p, x, y)))
    return PowerLaw(float(best[2]), float(np.exp(best[0])), float(best[1]), reference)


def _grid(x: np.ndarray, loss: np.ndarray) -> list[np.ndarray]:
    low = float(np.quantile(loss, 0.05))  # one loss by accident too low does not bound the rest
    points = []
    for exponent in np.geomspace(0.01, EXPONENTS[1], 12):
        for irreducible in low * np.array([0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.995]):
            scale = float(np.median((loss - irreducible) * np.exp(exponent * x)))
            points.append(np.array([np.log(max(scale, 1e-9 * low)), exponent, irreducible]))
    return points


def _residual(p: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(T,) log of predicted over found; p is log(scale), exponent, irreducible."""
    return np.log(p[2] + np.exp(p[0] - p[1] * x)) - y


def _cost(residual: np.ndarray) -> float:
    size = np.abs(residual)
    return float(np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA)).sum())


def _refined(p: np.ndarray, x: np.ndarray, y: np.ndarray, lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
    residual, damping = _residual(p, x, y), 1e-3
    cost = _cost(residual)
    for _ in range(ROUNDS):
        falling = np.exp(p[0] - p[1] * x)
        slopes = np.stack([falling, -x * falling, np.ones_like(x)], axis=1) / (p[2] + falling)[:, None]  # (T, 3)
        weights = DELTA / np.maximum(np.abs(residual), DELTA)  # squares with these bound Huber's loss from above
        gradient = slopes.T @ (weights * residual)
        # A parameter at its bound that would go beyond it is held: else the others' step would count on that move.
        free = ~(((p <= lowest) & (gradient > 0)) | ((p >= highest) & (gradient < 0)))
        if not free.any():
            break
        square = (slopes.T @ (weights[:, None] * slopes))[np.ix_(free, free)]
        diagonal = np.diag(np.diag(square) + 1e-12)
        before = cost
        while damping < 1e9:
            tried = p.copy()
            tried[free] -= np.linalg.solve(square + damping * diagonal, gradient[free])
            tried = np.clip(tried, lowest, highest)
            other = _residual(tried, x, y)
            if _cost(other) < cost:
                p, residual, cost, damping = tried, other, _cost(other), max(damping / 10, 1e-12)
                break
            damping *= 10
        if before - cost <= 1e-12 * before:
            break
    return p
