"""Adaptive data optimization fits as scipy does, follows a plain reference, and resumes without another fit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.optimize import minimize

from dataflex.errors import ConfigError, DataflexError
from dataflex.mixers import ado
from dataflex.mixers.ado import Ado
from dataflex.mixers.base import Domains, MixContext, Statistics
from dataflex.mixers.power_law import DELTA, PowerLaw, fit

N = np.arange(5, 3000, 25) * 4096.0


def cost(law: Any, n: np.ndarray, loss: np.ndarray) -> float:
    """Huber's loss of the difference of logarithms, point by point."""
    total = 0.0
    for found, wanted in zip(law(n), loss, strict=True):
        size = abs(np.log(found) - np.log(wanted))
        total += 0.5 * size**2 if size <= DELTA else DELTA * (size - 0.5 * DELTA)
    return total


@pytest.mark.parametrize(
    ("irreducible", "scale", "exponent"), [(1.8, 40.0, 0.3), (0.0, 9.0, 0.1), (0.4, 2000.0, 0.6), (2.9, 3.0, 0.05)]
)
def test_an_exact_law_is_found_again(irreducible: float, scale: float, exponent: float) -> None:
    loss = irreducible + scale * N**-exponent
    law = fit(N, loss)
    assert law(N) == pytest.approx(loss, rel=1e-4)
    assert law.exponent == pytest.approx(exponent, rel=0.1)
    assert law.reducible(N[-1]) == pytest.approx(loss[-1] - irreducible, rel=0.15)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("noise", [0.002, 0.02, 0.1])
@pytest.mark.parametrize(
    ("irreducible", "exponent"),
    [(2.4, 0.4), (0.6, 0.1), (1.0, 1.3), (-0.5, 0.1), (2.0, -0.1)],  # the last three have their best at a bound
)
def test_a_fit_is_no_worse_than_scipy_s_from_many_starts(
    irreducible: float, exponent: float, noise: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    loss = (irreducible + 2 * (N / N[0]) ** -exponent) * np.exp(noise * rng.standard_t(3, len(N)))
    reference = float(np.exp(np.log(N).mean()))

    def objective(p: np.ndarray) -> float:
        size = np.abs(np.log(p[2] + np.exp(p[0]) * (N / reference) ** -p[1]) - np.log(loss))
        return float(np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA)).sum()) / DELTA

    bounds = [(-20, 10), (0.001, 0.8), (0, float(np.median(loss)))]
    starts = [(a, e, f * loss.min()) for a in (-2, 0.5) for e in (0.05, 0.6) for f in (0.1, 0.9)]
    theirs = min(minimize(objective, p, method="L-BFGS-B", bounds=bounds).fun for p in starts) * DELTA
    law = fit(N, loss)
    assert cost(law, N, loss) <= theirs * (1 + 1e-6)
    assert 0.001 <= law.exponent <= 0.8
    assert 0 <= law.irreducible <= np.median(loss)
    assert law.scale > 0


def test_outliers_count_little() -> None:
    loss = 1.5 + 30 * N**-0.3
    spoilt = loss.copy()
    spoilt[4::9] *= np.where(np.arange(len(spoilt[4::9])) % 2, 3.0, 0.3)
    assert fit(N, spoilt)(N) == pytest.approx(loss, rel=0.003)


@pytest.mark.parametrize("loss", [np.full(len(N), 2.5), np.linspace(2, 3, len(N))])
def test_a_loss_that_does_not_fall_still_has_a_law(loss: np.ndarray) -> None:
    law = fit(N, loss)
    assert np.isfinite(law(N)).all()
    assert law(N) == pytest.approx(np.full(len(N), np.median(loss)), rel=0.15)
    assert law.scale > 0


def test_units_of_n_do_not_matter() -> None:
    loss = (1.5 + 30 * N**-0.3) * np.exp(0.01 * np.random.default_rng(0).normal(size=len(N)))
    one, other = fit(N, loss), fit(N / 4096, loss)
    assert one(N) == pytest.approx(other(N / 4096), rel=1e-6)
    assert one.exponent == pytest.approx(other.exponent, rel=1e-4)


class Run:
    """A mixer and a run whose domains' losses follow laws; one call is one update of some steps."""

    laws = ((1.0, 6.0, 0.25), (2.5, 1.0, 0.1), (0.5, 9.0, 0.4))

    def __init__(self, tokens: int = 1000, initial: Any = None, names: str = "abc", **params: Any):
        self.params = {"ignore_steps": 20, "fit_interval": 100} | params
        self.mixer = Ado(Ado.Params(**self.params))
        rows = np.array([100, 300, 600])
        self.domains = Domains(tuple(names), rows, rows * 50)
        self.initial = self.domains.natural if initial is None else np.array(initial)
        self.proportions, self.tokens = self.initial, tokens
        self.step, self.update, self.seen = 0, 0, np.zeros(3)
        self.order = ["abc".index(name) for name in names]

    def __call__(self, steps: int = 1, absent: tuple[int, ...] = ()) -> list[float]:
        given = Statistics.zeros(3)
        if self.update or steps > 1:
            self.step += steps
            tokens = self.proportions * self.tokens * steps
            tokens[list(absent)] = 0
            self.seen += tokens
            laws = [self.laws[i] for i in self.order]
            loss = np.array([e + s * (self.seen.sum() / 1000) ** -x for e, s, x in laws])
            given = replace(given, steps=steps, tokens=tokens, loss=loss * tokens)
        return self.mix(given)

    def mix(self, statistics: Statistics) -> list[float]:
        context = MixContext(self.domains, self.initial, self.proportions, statistics, self.step, self.update, 0, {})
        self.proportions = self.mixer.mix(None, self.step, context=context)
        self.update += 1
        assert self.proportions.sum() == pytest.approx(1, abs=1e-14)
        return self.proportions.tolist()


@pytest.mark.parametrize("counts", ["all", "own"])
def test_the_rule_is_the_plain_reference(counts: str) -> None:
    run = Run(counts=counts)
    prior = run.initial.tolist()
    assert [run() for _ in range(120)] == [prior] * 120  # update 0, then 119 steps
    h, mean, seen = list(prior), list(prior), [0.0] * 3
    for _ in range(119):
        h = [0.9 * old + 0.1 * now for old, now in zip(h, prior, strict=True)]
        seen = [old + 1000 * now for old, now in zip(seen, prior, strict=True)]
    drawn = prior
    for step in range(120, 160):
        found = run()
        laws = run.mixer.record()["laws"]
        h = [0.9 * old + 0.1 * now for old, now in zip(h, drawn, strict=True)]
        seen = [old + 1000 * now for old, now in zip(seen, drawn, strict=True)]
        rho = []
        for k in range(3):
            n = seen[k] if counts == "own" else sum(seen)
            falling = laws[k]["scale"] * (n / laws[k]["reference"]) ** -laws[k]["exponent"]
            rho.append(prior[k] * max(laws[k]["exponent"], 0.05) * falling / n * h[k] ** 0.5)
        rho = [max(r / sum(rho), 0.01) for r in rho]
        rho = [r / sum(rho) for r in rho]
        expected = [0.9 * m + 0.1 * r for m, r in zip(mean, rho, strict=True)]
        mean = [m + (r - m) / (step + 1) for m, r in zip(mean, rho, strict=True)]
        assert found == pytest.approx(expected, abs=1e-9)
        drawn = found


def test_fits_recover_the_laws_of_the_run_and_prefer_what_still_falls() -> None:
    run = Run(mean_share=0.0, credit=0.0)
    for _ in range(300):
        run()
    for law, (_, scale, exponent) in zip(run.mixer.record()["laws"], Run.laws, strict=True):
        n = run.seen.sum()
        found = PowerLaw(**law)
        assert found.exponent * found.reducible(n) == pytest.approx(exponent * scale * (n / 1000) ** -exponent, rel=0.1)
    relative = np.array(run.proportions) / run.initial  # learning speed: domain 0 over 2 over 1
    speeds = [x * s * (run.seen.sum() / 1000) ** -x for _, s, x in Run.laws]
    assert np.argsort(relative).tolist() == np.argsort(speeds).tolist()


def test_irreducible_loss_counts_nothing() -> None:
    """What sets it apart from online data mixing: 5 nats of noise more leave the proportions."""
    plain, noisy = Run(), Run()
    noisy.laws = ((1.0, 6.0, 0.25), (7.5, 1.0, 0.1), (0.5, 9.0, 0.4))
    for _ in range(160):
        plain(), noisy()
    assert noisy.proportions == pytest.approx(plain.proportions, abs=0.01)


def test_the_order_of_the_domains_does_not_matter() -> None:
    plain, turned = Run(), Run(names="cab")
    turned.domains = Domains(tuple("cab"), np.array([600, 100, 300]), np.array([600, 100, 300]) * 50)
    turned.initial = turned.proportions = turned.domains.natural
    for _ in range(150):
        plain(), turned()
    assert turned.proportions == pytest.approx(plain.proportions[[2, 0, 1]], abs=1e-9)


def test_a_floor_keeps_every_domain_that_the_run_has() -> None:
    run = Run(floor=0.2, mean_share=0.0)
    for _ in range(150):
        run()
    assert run.proportions.min() >= 0.2 / 1.6
    without = Run(initial=(0.5, 0.5, 0.0), floor=0.2)
    for _ in range(150):
        without()
    assert without.proportions[2] == 0
    assert without.proportions[0] != 0.5
    refused = Run(floor=0.4)
    with pytest.raises(ConfigError, match=r"floor: found 0\.4 for 3 domains; expected less than 0\.3333"):
        refused()


def test_updates_of_several_steps() -> None:
    """Once every 10 steps, from a warm-up of 30: near what an update at every step gives."""
    often, seldom = Run(), Run(ignore_steps=0)
    for _ in range(231):
        often()
    seldom(steps=30)
    assert seldom.update == 1
    assert seldom.mixer.record()["drawn"] == pytest.approx(seldom.initial.tolist(), abs=1e-12)
    while seldom.step < 230:
        seldom(steps=10)
    assert seldom.step == often.step
    assert seldom.proportions == pytest.approx(often.proportions, abs=0.02)


def test_a_domain_not_seen_in_a_block_leaves_no_point_and_one_never_seen_has_the_mean_speed() -> None:
    run = Run()
    for _ in range(130):
        run(absent=(1,))
    record = run.mixer.record()
    assert record["laws"][1] is None
    assert all(point["loss"][1] is None for point in run.mixer.state()["history"])
    assert run.proportions[1] > 0.1
    for _ in range(100):
        run()
    assert run.mixer.record()["laws"][1] is not None


def test_what_was_drawn_of_late_forgets_by_the_step() -> None:
    run = Run(smoothing=0.8)
    run()
    run(steps=5, absent=(0, 1))
    expected = 0.8**5 * run.initial + (1 - 0.8**5) * np.array([0, 0, 1])
    assert run.mixer.record()["drawn"] == pytest.approx(expected.tolist(), abs=1e-12)


def test_no_signal_is_an_error() -> None:
    run = Run()
    run()
    with pytest.raises(DataflexError, match="no loss of any domain over 1 steps"):
        run.mix(replace(Statistics.zeros(3), steps=1))


def test_a_step_of_losses_that_are_not_finite_changes_nothing() -> None:
    run = Run()
    for _ in range(130):
        before = run()
    state = run.mixer.state()
    found = run.mix(replace(Statistics.zeros(3), steps=1, nonfinite=np.array([4.0, 3.0, 0.0])))
    assert found == before != run.initial.tolist()
    assert run.mixer.state() == state
    assert run()


@pytest.mark.parametrize("cut", [0, 1, 15, 57, 119, 121, 140])
def test_a_restored_run_goes_on_bit_for_bit_and_does_not_fit_again(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[int] = []

    def counted(n: np.ndarray, loss: np.ndarray) -> PowerLaw:
        fits.append(len(n))
        return fit(n, loss)

    monkeypatch.setattr(ado, "fit", counted)
    whole, run = Run(), Run()
    expected = [whole() for _ in range(150)]
    count, found = len(fits), []
    assert count == 3
    for number in range(150):
        if number == cut:
            saved = json.loads(json.dumps(run.mixer.state(), allow_nan=False))
            run.mixer = Ado(Ado.Params(**run.params))
            run.mixer.restore(saved)
            assert run.mixer.state() == saved
        found.append(run())
    assert found == expected
    assert len(fits) == 2 * count
    json.dumps(run.mixer.record(), allow_nan=False)


def test_what_cannot_be_restored_or_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found a state of \['x'\]"):
        Ado(Ado.Params()).restore({"x": 1})
    with pytest.raises(ValidationError):
        Ado.Params(smoothing=1.0)
