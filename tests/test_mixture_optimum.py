"""The best mixture under a law is the best: against other solvers, a grid, and cases solved by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from dataflex.fitting.optimum import best_mixture
from tests.mixtures import objective


@pytest.mark.parametrize("kl", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_optimum_against_slsqp(seed: int, capped: bool, kl: float) -> None:
    rng = np.random.default_rng(seed)
    slopes, weights, prior = rng.normal(0, 1.5, (4, 6)), rng.random(4), rng.dirichlet(np.ones(6))
    caps = 2 * prior + 0.02 if capped else None
    ours = best_mixture(slopes, weights, prior, kl, caps)
    assert ours.sum() == pytest.approx(1, abs=1e-12)
    assert (ours >= 0).all()
    assert caps is None or (ours <= caps + 1e-12).all()
    bounds = [(1e-12, 1.0 if caps is None else min(1.0, cap)) for cap in (caps if caps is not None else np.ones(6))]
    constraint = {"type": "eq", "fun": lambda x: x.sum() - 1}
    other = minimize(
        objective,
        prior,
        (slopes, weights, prior, kl),
        method="SLSQP",
        bounds=bounds,
        constraints=[constraint],
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert objective(ours, slopes, weights, prior, kl) <= other.fun + 1e-7
    if kl:
        np.testing.assert_allclose(ours, other.x, atol=2e-4)


@pytest.mark.parametrize("kl", [0.0, 0.05])
def test_optimum_against_every_point_of_a_grid(kl: float) -> None:
    rng = np.random.default_rng(9)
    slopes, weights, prior = rng.normal(0, 1, (3, 3)), np.ones(3) / 3, np.array([0.5, 0.3, 0.2])
    caps = np.array([0.4, 0.6, 0.9])
    ours = best_mixture(slopes, weights, prior, kl, caps)
    steps = np.arange(201) / 200
    points = [np.array([a, b, 1 - a - b]) for a in steps for b in steps if a + b <= 1]
    inside = [p for p in points if (p <= caps).all()]
    nearest = min(inside, key=lambda p: objective(p, slopes, weights, prior, kl))
    assert objective(ours, slopes, weights, prior, kl) <= objective(nearest, slopes, weights, prior, kl) + 1e-9
    np.testing.assert_allclose(ours, nearest, atol=0.02)


def test_a_large_divergence_gives_the_prior_and_none_a_corner() -> None:
    slopes, prior = np.array([[0.0, -1.0, 1.0]]), np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(best_mixture(slopes, np.ones(1), prior, 1e6), prior, atol=1e-5)
    np.testing.assert_allclose(best_mixture(slopes, np.ones(1)), [0, 1, 0], atol=1e-8)
    np.testing.assert_allclose(best_mixture(slopes, np.ones(1), caps=np.array([1, 0.6, 1])), [0.4, 0.6, 0], atol=1e-7)


@pytest.mark.parametrize(
    ("epochs", "expected"), [(1, (0.10, 0.20, 0.35, 0.35)), (2, (0.2, 0.8 / 3, 0.8 / 3, 0.8 / 3))], ids=str
)
def test_without_a_preference_caps_give_unimax(epochs: int, expected: tuple[float, ...]) -> None:
    caps = epochs * np.array([10, 20, 100, 500]) / 100
    found = best_mixture(np.zeros((1, 4)), np.ones(1), np.ones(4) / 4, 0.05, caps)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_domain_without_prior_or_room_gets_nothing() -> None:
    slopes, prior = np.array([[-3.0, 0.0, 1.0]]), np.array([0.0, 0.5, 0.5])
    assert best_mixture(slopes, np.ones(1), prior, 0.05)[0] == 0
    assert best_mixture(slopes, np.ones(1), caps=np.array([0.0, 1, 1]))[0] == 0
    np.testing.assert_allclose(best_mixture(slopes, np.ones(1), caps=np.array([0.2, 0.3, 0.5])), [0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match=r"sum to 0\.9"):
        best_mixture(slopes, np.ones(1), caps=np.array([0.2, 0.3, 0.4]))
