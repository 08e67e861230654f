"""Mixtures that look at no losses are what they say: given, even, by size, tempered, limited in repetition, random."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dataflex.components.registry import MIXERS
from dataflex.errors import ConfigError
from dataflex.mixers.base import Domains, MixContext, Statistics
from dataflex.mixers.random import Random
from dataflex.mixers.static import Static, Stratified, Temperature, Uniform, Unimax

SIZES = (10, 20, 100, 500)
NAMES = tuple("abcdefghijklmnopqrstuvwxyz")


def context(sizes: Any = SIZES, update: int = 0, seed: int = 1, initial: Any = None) -> MixContext:
    rows = np.array(sizes, dtype=np.int64)
    domains = Domains(NAMES[: len(rows)], rows, rows[::-1] * 7)
    start = domains.natural if initial is None else np.array(initial, dtype=np.float64)
    return MixContext(domains, start, start, Statistics.zeros(len(rows)), 0, update, seed, {})


def mixed(cls: type, given: MixContext | None = None, kwargs: Any = None, **params: Any) -> list[float]:
    found = cls(cls.Params(**params)).mix(None, 0, context=given or context(), **(kwargs or {}))  # type: ignore[attr-defined]
    assert found.dtype == np.float64
    assert found.sum() == pytest.approx(1, abs=1e-15)
    assert (found >= 0).all()
    return [float(p) for p in found]


@pytest.mark.parametrize("name", ["static", "uniform", "stratified", "temperature", "unimax", "random", "odm", "ado"])
def test_the_registry_finds_every_mixer_and_each_describes_its_parameters(name: str) -> None:
    cls = MIXERS.load(name)
    assert cls.Params.model_config["extra"] == "forbid"
    assert cls.Params.model_config["frozen"]
    assert all(field.description for field in cls.Params.model_fields.values())
    assert cls.interval == {"random": 100, "odm": 1, "ado": 1}.get(name, 0)
    fresh = cls(cls.Params())
    fresh.restore(fresh.state())
    assert fresh.record() is not None


def test_uniform_and_stratified() -> None:
    assert mixed(Uniform) == [0.25] * 4
    assert mixed(Stratified) == [n / 630 for n in SIZES]


def test_stratified_is_by_the_unit_of_the_run() -> None:
    domains = Domains(("a", "b"), np.array([1, 3]), np.array([30, 10]), "tokens")
    given = MixContext(domains, domains.natural, domains.natural, Statistics.zeros(2), 0, 0, 1, {})
    assert mixed(Stratified, given) == [0.75, 0.25]


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (2, (0.0790666, 0.1118172, 0.2500307, 0.5590856)),
        (5, (0.1689099, 0.1940265, 0.2677042, 0.3693594)),
        (1, tuple(n / 630 for n in SIZES)),
        (1e9, (0.25,) * 4),
    ],
)
def test_temperature(tau: float, expected: tuple[float, ...]) -> None:
    assert mixed(Temperature, tau=tau) == pytest.approx(expected, abs=1e-7)


def test_a_temperature_below_one_is_refused() -> None:
    with pytest.raises(ValidationError):
        Temperature.Params(tau=0.5)


@pytest.mark.parametrize(
    ("epochs", "budget", "expected"),
    [
        (1, 100, (0.1, 0.2, 0.35, 0.35)),
        (2, 100, (0.2, 0.8 / 3, 0.8 / 3, 0.8 / 3)),
        (1, 4, (0.25,) * 4),
        (1, 630, tuple(n / 630 for n in SIZES)),
        (1, 9000, tuple(n / 630 for n in SIZES)),
    ],
)
def test_unimax(epochs: float, budget: float, expected: tuple[float, ...]) -> None:
    assert mixed(Unimax, epochs=epochs, budget=budget) == pytest.approx(expected, abs=1e-12)
    assert mixed(Unimax, kwargs={"budget": budget}, epochs=epochs) == pytest.approx(expected, abs=1e-12)


def test_unimax_takes_the_run_file_first_and_needs_a_budget() -> None:
    assert mixed(Unimax, kwargs={"budget": 630}, budget=4) == [0.25] * 4
    with pytest.raises(ConfigError, match="found no budget; expected what the run draws in all, in rows"):
        mixed(Unimax)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.floats(0.1, 5), st.floats(1, 10000))
def test_unimax_repeats_nothing_beyond_its_epochs_and_is_as_even_as_that_allows(
    sizes: list[int], epochs: float, budget: float
) -> None:
    drawn = np.array(mixed(Unimax, context(sizes), epochs=epochs, budget=budget)) * min(budget, epochs * sum(sizes))
    limit = epochs * np.array(sizes)
    assert (drawn <= limit * (1 + 1e-9)).all()
    below = drawn < limit * (1 - 1e-9)  # water filling: all that are not full are level, and nothing is above them
    assert np.ptp(drawn[below]) <= 1e-9 * drawn.max() if below.any() else True
    assert not below.any() or drawn.max() <= drawn[below].max() * (1 + 1e-9)


@pytest.mark.parametrize("cls", [Uniform, Stratified, Temperature, Unimax])
def test_the_order_of_the_domains_does_not_matter(cls: type) -> None:
    kwargs = {"budget": 100.0}
    plain, turned = mixed(cls, kwargs=kwargs), mixed(cls, context((100, 10, 500, 20)), kwargs)
    assert turned == pytest.approx([plain[i] for i in (2, 0, 3, 1)], abs=1e-15)


def test_static_in_order_by_name_from_a_file_or_from_the_run(tmp_path: Path) -> None:
    expected, by_name = [0.1, 0.2, 0.3, 0.4], {"d": 4, "a": 1, "c": 3, "b": 2}
    assert mixed(Static, proportions=[1, 2, 3, 4]) == expected
    assert mixed(Static, proportions=by_name) == expected
    for number, content in enumerate([by_name, {"proportions": by_name, "step": 9}]):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(content))
        assert mixed(Static, proportions=str(path)) == expected
        assert Static(Static.Params(proportions=str(path))).check(NAMES[:4], "rows") == []
    path.write_text(json.dumps({"proportions": by_name, "unit": "tokens"}))
    in_tokens = replace(context().domains, unit="tokens")
    with pytest.raises(ConfigError, match="found shares of tokens; the run's are of rows"):
        mixed(Static, proportions=str(path))
    assert mixed(Static, replace(context(), domains=in_tokens), proportions=str(path)) == expected
    assert mixed(Static, context(initial=(0.7, 0.1, 0.1, 0.1))) == [0.7, 0.1, 0.1, 0.1]
    assert mixed(Static, proportions=[0, 0, 1, 0]) == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("proportions", "expected"),
    [
        ([1, 2, 3], "found 3 numbers; expected 4, one each for a, b, c, d"),
        ([1, 2, -1, 3], r"found {'2': -1.0}; expected finite numbers, 0 or more"),
        ([0, 0, 0, 0], "all weights are 0"),
        ({"a": 1, "b": 2, "c": 3}, "nothing for d; 0 leaves a domain out"),
        ({"a": 1, "b": 2, "c": 3, "d": 1, "bb": 4}, "found no domain 'bb'; did you mean 'b'"),
        ([1e308, 1e308, 0, 0], "too small or large to add up"),
        ("~no such user/x.json", "No such file"),
        ("nowhere.json", "nowhere.json: .*No such file.*expected a JSON file of weights by domain"),
    ],
)
def test_static_says_what_does_not_fit(proportions: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        mixed(Static, proportions=proportions)
    assert len(Static(Static.Params(proportions=proportions)).check(NAMES[:4], "rows")) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[1, 2, 3, 4]", "found list; expected an object"),
        ("{", "expected a JSON file"),
        ('{"a": 1, "b": NaN, "c": "x", "d": true}', "found {'b': nan, 'c': 'x', 'd': True}; expected finite numbers"),
        ('{"proportions": {"a": 1}}', "nothing for b, c, d"),
        ('{"a": 1' + 400 * "0" + ', "b": 1, "c": 1, "d": 1}', "expected finite numbers"),
        ('{"a": ' * 10**5 + "1" + "}" * 10**5, "maximum recursion depth exceeded"),
    ],
)
def test_static_says_what_is_wrong_with_a_file(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        mixed(Static, proportions=str(path))


@pytest.mark.parametrize("bad", [[1.0, float("nan")], [float("inf"), 1.0]])
def test_static_refuses_numbers_that_are_none_with_the_run_file(bad: list[float]) -> None:
    with pytest.raises(ValidationError):
        Static.Params(proportions=bad)


def test_random_is_new_at_every_update_and_a_function_of_seed_and_update() -> None:
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    draws = [mixed(Random, context(update=update)) for update in range(5)]
    assert len({tuple(draw) for draw in draws}) == 5
    assert mixed(Random, context(update=3)) == draws[3]
    assert mixed(Random, context(update=3, seed=2)) != draws[3]
    assert mixed(Random, context(update=3, seed=2), seed=1) == draws[3]
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


def test_random_is_the_same_on_every_machine() -> None:
    expected = (0.163087028953992, 0.18268258998581524, 0.0188510726295768, 0.6353793084306161)
    assert mixed(Random) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prior", "mean"),
    [("uniform", [0.25] * 4), ("natural", [n / 630 for n in SIZES]), ("initial", [0.5, 0.5, 0, 0])],
)
@pytest.mark.parametrize("strength", [0.5, 1.0, 20.0])
def test_random_has_the_moments_of_its_dirichlet(prior: str, mean: list[float], strength: float) -> None:
    given = [context(update=update, initial=(0.5, 0.5, 0, 0)) for update in range(2000)]
    draws = np.array([mixed(Random, one, prior=prior, strength=strength) for one in given])
    expected = np.array(mean)
    variance = expected * (1 - expected) / (4 * strength + 1)
    assert np.abs(draws.mean(0) - expected).max() <= 4 * np.sqrt(variance.max() / 2000) + 1e-12
    assert draws.var(0) == pytest.approx(variance, rel=0.25, abs=1e-12)
