"""The law fitted to finished runs is the right one: known parameters, and no better fit by another method."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from dataflex.fitting.law import HUBER, fit_law
from tests.mixtures import drawn


def huber(residuals: np.ndarray) -> float:
    """The sum of Huber losses, written out."""
    return sum(0.5 * r * r if abs(r) <= HUBER else HUBER * (abs(r) - HUBER / 2) for r in residuals.tolist())


@pytest.mark.parametrize(("domains", "runs"), [(2, 6), (3, 12), (7, 40), (20, 120)])
def test_known_parameters_are_recovered(domains: int, runs: int) -> None:
    table, slopes = drawn(domains, runs, domains)
    law = fit_law(table.mixtures, table.values[:, 0])
    assert law.floor == pytest.approx(2, abs=1e-6)
    np.testing.assert_allclose(law.slopes, slopes[0], atol=1e-6)


def test_a_diverged_run_moves_the_law_little() -> None:
    table, _ = drawn(1, 60, 4, noise=0.002)
    values = table.values[:, 0].copy()
    clean = fit_law(table.mixtures, values)(table.mixtures)
    values[7] += 3
    assert np.abs(fit_law(table.mixtures, values)(table.mixtures) - clean).max() < 0.15


@pytest.mark.parametrize("seed", range(3))
def test_no_other_method_finds_a_better_fit(seed: int) -> None:
    table, _ = drawn(seed, 25, 3, noise=0.1)
    values = table.values[:, 0]
    mean, scale = values.mean(), values.std()
    law = fit_law(table.mixtures, values)
    ours = huber((law(table.mixtures) - values) / scale)
    rng = np.random.default_rng(seed)

    def cost(parameters: np.ndarray) -> float:
        return huber(parameters[0] + np.exp(table.mixtures @ parameters[1:]) - (values - mean) / scale)

    for _ in range(8):
        start = np.concatenate([[-2 - 3 * rng.random()], rng.normal(0.5, 0.5, 3)])
        other = minimize(cost, start, method="L-BFGS-B", bounds=[(-100, None)] + [(None, None)] * 3)
        assert ours <= other.fun + 1e-6


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_linear_metric_is_fitted_well(sign: float) -> None:
    table, slopes = drawn(4, 30, 4)
    values = sign * table.mixtures @ slopes[0]
    law = fit_law(table.mixtures, values)
    assert np.abs(law(table.mixtures) - values).max() < 0.02 * np.ptp(values)


def test_units_of_the_metric_do_not_matter() -> None:
    table, _ = drawn(5, 30, 4, noise=0.01)
    values = table.values[:, 0]
    one, other = fit_law(table.mixtures, values), fit_law(table.mixtures, 1000 * values - 7)
    np.testing.assert_allclose(other(table.mixtures), 1000 * one(table.mixtures) - 7, rtol=1e-5)


def test_what_the_runs_leave_open_has_no_effect() -> None:
    mixtures = np.array([[0.1, 0.45, 0.45], [0.4, 0.3, 0.3], [0.7, 0.15, 0.15], [0.9, 0.05, 0.05]])
    law = fit_law(mixtures, 2 + np.exp(-mixtures[:, 0]))
    assert law.slopes[1] == pytest.approx(law.slopes[2], abs=1e-9)
