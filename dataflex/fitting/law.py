"""The log-linear law: how a metric follows from a mixture.

R runs, K domains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HUBER = 0.1
"""Residuals beyond this many standard deviations of the metric count linearly: one diverged run moves little."""

_OFFSETS = (0.05, 0.5, 3.0, 25.0)  # standard deviations that the floor starts below the best run
_FAR = 230.0  # exponents beyond are no better as predictions, and their squares would overflow
_LOWEST = 100.0  # standard deviations that the floor may lie below the mean; there the law is linear to about 1 %


@dataclass(frozen=True)
class LogLinear:
    """f(x) = floor + exp(slopes . x), convex in x.

    On the simplex this is also the law floor + k exp(t . x) of Data Mixing Laws: slopes = t + ln k.

    Attributes:
        floor: in units of the metric.
        slopes: (K,) float64.
    """

    floor: float
    slopes: np.ndarray

    def __call__(self, mixtures: np.ndarray) -> np.ndarray:
        """Return the metric of mixtures, (..., K) -> (...)."""
        return np.asarray(self.floor + np.exp(np.minimum(mixtures @ self.slopes, _FAR)))


def fit_law(mixtures: np.ndarray, values: np.ndarray) -> LogLinear:
    """Fit the law to runs by the Huber loss.

    Source: Olmix (allenai/olmix, 2026); Data Mixing Laws (arXiv 2403.16952). Deviations: the metric is standardised, so
    that the Huber loss does not depend on its unit, and written as expm1(bend * (tilts . x)) / bend, the same law with
    the floor at -1 / bend, since floor and slopes are nearly collinear where it is nearly linear; a trust-region
    Gauss-Newton method in place of L-BFGS; starts that are solved for in place of random ones.

    Args:
        mixtures: (R, K), lines summing to 1.
        values: (R,).
    """
    from scipy.optimize import least_squares

    mean, scale = values.mean(), values.std() or 1.0
    z = (values - mean) / scale
    centre, basis = mixtures.mean(axis=0), directions(mixtures)
    design = np.column_stack([np.ones(len(z)), (mixtures - centre) @ basis.T])

    def residuals(parameters: np.ndarray) -> np.ndarray:
        bend, level = parameters[0], design @ parameters[1:]
        return np.asarray(np.expm1(bend * level) / bend - z)

    def jacobian(parameters: np.ndarray) -> np.ndarray:
        bend, level = parameters[0], design @ parameters[1:]
        slope = np.exp(bend * level)
        return np.column_stack([(level * slope - np.expm1(bend * level) / bend) / bend, slope[:, None] * design])

    best = None
    # With a floor given, the rest of a start is linear least squares after a logarithm, so only the floor is guessed.
    for offset in _OFFSETS:
        bend = 1 / (offset - z.min())
        start = np.concatenate([[bend], np.linalg.lstsq(design, np.log1p(bend * z) / bend, rcond=None)[0]])
        lowest = np.concatenate([[1 / _LOWEST], np.full(len(start) - 1, -np.inf)])
        with np.errstate(over="ignore"):  # a step that far is not taken
            found = least_squares(
                residuals,
                start,
                jacobian,
                bounds=(lowest, np.inf),
                loss="huber",
                f_scale=HUBER,
                ftol=1e-10,
                max_nfev=200,
            )
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    bend, tilts = best.x[0], basis.T @ best.x[2:]
    # Shares sum to 1, so that what is added to every slope is added to every exponent.
    slopes = bend * (tilts + best.x[1] - centre @ tilts) + np.log(scale / bend)
    return LogLinear(float(mean - scale / bend), slopes)


def directions(mixtures: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis of the directions in which the mixtures differ, (K - 1 or fewer, K)."""
    _, lengths, basis = np.linalg.svd(mixtures - mixtures.mean(axis=0), full_matrices=False)
    return np.asarray(basis[lengths > 1e-6])
