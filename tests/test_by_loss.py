"""The weighter `loss` gives the weights of executed vectors, loops and linear programs, under caps and schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dataflex.weighters.loss import ByLoss
from dataflex.weighters.relative import effective_size
from tests.weighed import NAN, group

INF = math.inf
LOSSES = [1, 1.5, 2, 2.5, 3, 4]
SATURATED = [0.2174940055] * 3


def by_loss(losses: Sequence[float], since: int = 0, **params: Any) -> Tensor:
    return ByLoss(ByLoss.Params(**params)).weights(group(losses, since=since))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.0800115732, 0.1116651457, 0.1558412648, *SATURATED]),
        ({"temperature": 0.4}, [0.0221518542, 0.0509708825, 0.1172827719, *[0.2698648305] * 3]),
        (
            {"strategy": "quadratic"},
            [0.0882920992, 0.1538850941, 0.2147639494, 0.2400028087, 0.2147639494, 0.0882920992],
        ),
        (
            {"strategy": "extremes"},
            [0.2432353223, 0.1742857242, 0.1248811784, 0.0894812744, 0.1248811784, 0.2432353223],
        ),
    ],
)
def test_loss_equals_the_vectors(params, expected):
    found = by_loss(LOSSES, **params)
    np.testing.assert_allclose(found / 6, expected, atol=1e-9)
    assert found.dtype == torch.float64


def test_weighted_losses_and_effective_size_equal_the_vectors():
    losses = torch.tensor(LOSSES, dtype=torch.float64)
    assert float((by_loss(LOSSES) * losses).mean()) == pytest.approx(2.6253848731, abs=1e-9)
    assert float((by_loss(LOSSES, temperature=100) * losses).mean()) == pytest.approx(2.3366632613, abs=1e-9)
    assert float(effective_size(by_loss(LOSSES))) == pytest.approx(5.403, abs=1e-3)
    assert float(effective_size(torch.zeros(3))) == 0


def test_exponential_is_no_baseline_and_uniform_is():
    np.testing.assert_allclose(
        by_loss([1, 2, 3, 4], strategy="exponential") / 4, [0.071, 0.138, 0.268, 0.523], atol=5e-4
    )
    assert by_loss([1, NAN, 3, 4], strategy="uniform").tolist() == [1, 0, 1, 1]


def plain(losses: Sequence[float], strategy: str, delta: float, r: float) -> list[float]:
    good = [x for x in losses if math.isfinite(x)]
    low, high = min(good), max(good)
    raised = []
    for loss in losses:
        h = delta * (2 * loss - low - high) / max(high - low, 1e-6)
        f = {"linupper": min(h + delta, delta), "quadratic": 1 - h * h / delta**2, "extremes": abs(h), "exponential": h}
        raised.append(math.exp(f[strategy] / r) if math.isfinite(loss) else 0.0)
    return [len(good) * x / sum(raised) for x in raised]


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes", "exponential"])
def test_loss_equals_loops_and_leaves_out_what_has_no_loss(strategy):
    losses = np.random.default_rng(4).gamma(2, 1, 40).tolist()
    losses[3], losses[17], losses[30] = NAN, INF, -INF
    found = by_loss(losses, strategy=strategy, delta=0.7, temperature=0.3)
    np.testing.assert_allclose(found, plain(losses, strategy, 0.7, 0.3), rtol=1e-10)
    assert found[[3, 17, 30]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes", "exponential", "uniform"])
@pytest.mark.parametrize("losses", [[2.5], [0.1] * 49, [3.3] * 7, [0.0, 0.0]])
def test_equal_losses_weigh_exactly_one(strategy, losses):
    assert by_loss(losses, strategy=strategy).tolist() == [1] * len(losses)


def test_traps_of_the_range():
    close = by_loss([2.0, 2.0 + 1e-9], strategy="exponential")
    np.testing.assert_allclose(close, [1, 1], atol=1e-3)
    assert close[0] < close[1]
    assert by_loss([NAN, NAN]).tolist() == [0, 0]
    assert by_loss([NAN, 3.0]).tolist() == [0, 1]
    assert by_loss([]).tolist() == []
    small, large = by_loss([1.0, 2.0]).tolist()
    assert small / large == pytest.approx(math.exp(-1), abs=1e-12)


def test_loss_invariants():
    losses = torch.tensor(LOSSES, dtype=torch.float64)
    found = by_loss(LOSSES)
    np.testing.assert_allclose(by_loss((losses * 3 + 7).tolist()), found, rtol=1e-12)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    np.testing.assert_allclose(by_loss(losses[order].tolist()), found[order], rtol=1e-12)


def test_an_outlier_is_kept_out_of_the_range():
    losses = [*np.linspace(1, 3, 19).tolist(), 500.0]
    assert by_loss(losses)[:19].max() / by_loss(losses)[0] < 1.02
    found = by_loss(losses, range_quantiles=(0.0, 0.9))
    end = np.quantile(losses, 0.9)
    np.testing.assert_allclose(found, plain([min(x, end) for x in losses], "linupper", 1, 1), rtol=1e-10)
    assert by_loss([*losses, NAN], range_quantiles=(0.0, 0.9))[:20].tolist() == found.tolist()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [2.0, 2.0, 2.0, 2.0]),
        ({"schedule": "linear", "anneal_steps": 10}, [100.0, 51.0, 2.0, 2.0]),
        ({"schedule": "linear", "anneal_steps": 10, "initial_temperature": 12}, [12.0, 7.0, 2.0, 2.0]),
        ({"schedule": "inverse", "anneal_steps": 10}, [INF, 4.0, 2.0, 2.0]),
    ],
)
def test_temperature_falls_as_described(params, expected):
    weighter = ByLoss(ByLoss.Params(temperature=2, **params))
    assert [weighter.temperature(since) for since in (0, 5, 10, 99)] == expected
    for since, r in zip((0, 5, 10, 99), expected, strict=True):
        plainly = [1.0] * 6 if r == INF else plain(LOSSES, "linupper", 1, r)
        np.testing.assert_allclose(weighter.weights(group(LOSSES, since=since)), plainly, rtol=1e-10)


def water_filled(weights: Sequence[float], cap: float) -> list[float]:
    """Cap, spread the rest in proportion, again, until nothing is above the cap."""
    found, fixed = list(weights), set()
    while True:
        fixed |= {i for i, w in enumerate(found) if w > cap * (1 + 1e-13)}
        rest = sum(w for i, w in enumerate(weights) if i not in fixed)
        left = len(weights) - cap * len(fixed)
        new = [cap if i in fixed else w * left / rest for i, w in enumerate(weights)]
        if new == found:
            return found
        found = new


@pytest.mark.parametrize("cap", [1.05, 1.3, 2.0, 4.0, 50.0])
@pytest.mark.parametrize("temperature", [0.05, 0.3, 2.0])
def test_cap_equals_iterated_filling(cap, temperature):
    losses = np.random.default_rng(9).gamma(1, 1, 33).tolist()
    found = by_loss(losses, strategy="exponential", temperature=temperature, weight_cap=cap)
    free = plain(losses, "exponential", 1, temperature)
    np.testing.assert_allclose(found, water_filled(free, cap), rtol=1e-8)
    assert float(found.mean()) == pytest.approx(1, abs=1e-13)
    assert float(found.max()) <= cap
    assert (found[np.argsort(losses)].diff() >= 0).all()


def test_cap_holds_where_the_others_are_zero_in_floating_point():
    found = by_loss([1.0, 1.0, 1.0, 9.0, NAN], strategy="exponential", temperature=1e-4, weight_cap=2.0)
    np.testing.assert_allclose(found, [2 / 3, 2 / 3, 2 / 3, 2, 0], rtol=1e-11)
    found = by_loss([1.0, 2.0, 9.0], strategy="exponential", temperature=1e-4, weight_cap=1.5)
    np.testing.assert_allclose(found, [0, 1.5, 1.5], atol=1e-12)
    for count, cap in ((11, 1.1), (9, 1.8), (3, 1.5), (30, 1.2)):  # the highest use up everything, to the last bit
        found = by_loss(np.arange(1.0, count + 1).tolist(), strategy="exponential", temperature=1e-4, weight_cap=cap)
        top = round(count / cap)
        np.testing.assert_allclose(found, [0] * (count - top) + [cap] * top, atol=1e-9)
    assert by_loss([1.0, 2.0], weight_cap=2.0).tolist() == by_loss([1.0, 2.0]).tolist()
    assert by_loss([0.1] * 49, weight_cap=1.5).tolist() == [1] * 49
    assert by_loss([5.0], weight_cap=1.5).tolist() == [1]
    assert by_loss([NAN], weight_cap=1.5).tolist() == [0]


@pytest.mark.parametrize("count", [5, 64])
def test_one_outlier_exceeds_the_bound_of_the_theory_without_a_cap(count):
    losses = [1.0] * (count - 1) + [5.0]
    assert by_loss(losses)[-1] > 2
    assert by_loss(losses, weight_cap=2.0)[-1] == 2.0


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"strategy": "uniform", "temperature": 2}, "no temperature"),
        ({"anneal_steps": 3}, "anneal_steps"),
        ({"schedule": "linear"}, "anneal_steps"),
        ({"initial_temperature": 3}, "no initial_temperature"),
        ({"range_quantiles": (0.5, 0.5)}, "ascend"),
        ({"weight_cap": 1}, "greater than 1"),
        ({"temperature": INF}, "finite"),
        ({"strat": "linupper"}, "Extra inputs"),
    ],
)
def test_loss_parameters_that_cannot_act_are_refused(params, match):
    with pytest.raises(ValidationError, match=match):
        ByLoss.Params(**params)
