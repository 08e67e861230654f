"""Proportions from finished runs: laws recovered, optima against other solvers, what is refused, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.optimize import minimize
from scipy.stats import spearmanr

from dataflex.cli import main
from dataflex.errors import ConfigError
from dataflex.fitting.fit import fit_mixture
from dataflex.fitting.goal import Goal, read_goal
from dataflex.fitting.law import HUBER, fit_law
from dataflex.fitting.optimum import best_mixture
from dataflex.fitting.quality import held_out, r_squared, rank_correlation
from dataflex.fitting.table import Runs, read_runs
from dataflex.mixers.static import proportions_of

ROOT = Path(__file__).parents[1]


def drawn(seed: int, runs: int, domains: int, metrics: int = 1, noise: float = 0.0) -> tuple[Runs, np.ndarray]:
    """Runs whose metrics follow the law with floor 2, and its slopes (J, K)."""
    rng = np.random.default_rng(seed)
    mixtures = rng.dirichlet(np.ones(domains), runs)
    slopes = rng.normal(0, 1, (metrics, domains))
    values = 2 + np.exp(mixtures @ slopes.T) + noise * rng.standard_normal((runs, metrics))
    names = tuple(f"d{i}" for i in range(domains)), tuple(f"m{j}" for j in range(metrics))
    return Runs(*names, mixtures, values), slopes


def huber(residuals: np.ndarray) -> float:
    """The sum of Huber losses, written out."""
    return sum(0.5 * r * r if abs(r) <= HUBER else HUBER * (abs(r) - HUBER / 2) for r in residuals.tolist())


def objective(x: np.ndarray, slopes: np.ndarray, weights: np.ndarray, prior: np.ndarray, kl: float) -> float:
    divergence = sum(float(a) * np.log(float(a) / float(b)) for a, b in zip(x, prior, strict=True) if a > 0)
    return float(sum(w * np.exp(row @ x) for w, row in zip(weights, slopes, strict=True)) + kl * divergence)


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


def test_the_order_of_domains_and_runs_does_not_matter() -> None:
    table, _ = drawn(2, 40, 5, metrics=2, noise=0.01)
    prior = np.array([0.1, 0.2, 0.3, 0.25, 0.15])
    goal = Goal(np.array([0.3, 0.7]), prior, 0.05, 1e9 * prior, 1e9, 2.0)
    order, lines = np.array([3, 0, 4, 1, 2]), np.random.default_rng(0).permutation(40)
    names = tuple(table.domains[i] for i in order)
    moved = Runs(names, table.metrics, table.mixtures[lines][:, order], table.values[lines])
    other = Goal(goal.weights, prior[order], 0.05, 1e9 * prior[order], 1e9, 2.0)
    one, two = fit_mixture(table, goal)["proportions"], fit_mixture(moved, other)["proportions"]
    assert one == pytest.approx({name: two[name] for name in one}, abs=1e-5)


def test_quality_is_that_of_runs_left_out_with_their_repeats() -> None:
    table, _ = drawn(3, 6, 3, noise=0.05)
    repeated = Runs(
        table.domains,
        table.metrics,
        np.tile(table.mixtures, (2, 1)),
        np.concatenate([table.values, table.values + 0.1]),
    )
    predicted, means = held_out(repeated)
    for i in range(12):
        rest = [k for k in range(12) if k % 6 != i % 6]
        law = fit_law(repeated.mixtures[rest], repeated.values[rest, 0])
        assert predicted[i, 0] == pytest.approx(float(law(repeated.mixtures[i])), rel=1e-6)
        assert means[i, 0] == pytest.approx(repeated.values[rest, 0].mean())
    assert r_squared(np.arange(4.0), np.arange(4.0), 1.5) == 1
    assert r_squared(np.arange(4.0), np.full(4, 1.5), 1.5) == 0
    ties = np.random.default_rng(0).integers(0, 5, (2, 30)).astype(float)
    assert rank_correlation(*ties) == pytest.approx(spearmanr(*ties)[0])
    assert rank_correlation(np.arange(4.0), np.ones(4)) is None


def test_doubts_are_said() -> None:
    rng = np.random.default_rng(0)
    noise = Runs(("a", "b", "c"), ("m",), rng.dirichlet(np.ones(3), 40), rng.standard_normal((40, 1)))
    uniform = np.ones(3) / 3
    said = "\n".join(fit_mixture(noise, Goal(np.ones(1), uniform, 5.0, None, None, None))["fit"]["warnings"])
    assert "no better than their mean" in said
    assert "is within the error" in said
    few, _ = drawn(0, 4, 6)
    said = "\n".join(fit_mixture(few, Goal(np.ones(1), None, 0.0, None, None, None))["fit"]["warnings"])
    assert "4 mixtures for 7 parameters" in said
    assert "vary in 3 of 5 directions" in said
    assert "lies outside of what was run" in said
    sound, _ = drawn(0, 60, 3, noise=0.001)
    prior = np.array([0.4, 0.3, 0.3])
    assert fit_mixture(sound, Goal(np.ones(1), prior, 0.5, None, None, None))["fit"]["warnings"] == []


def test_twenty_runs_find_a_mixture_nearly_as_good_as_the_best() -> None:
    ours, theirs = [], []
    for seed in range(5):
        table, slopes = drawn(seed, 20, 5, metrics=3, noise=0.005)
        weights, prior = np.ones(3) / 3, np.ones(5) / 5
        found = fit_laws_and_solve(table, weights, prior)
        cost = [objective(x, slopes, weights, prior, 0.05) for x in (found, *table.mixtures)]
        best = objective(best_mixture(slopes, weights, prior, 0.05), slopes, weights, prior, 0.05)
        ours.append(cost[0] - best)
        theirs.append(min(cost[1:]) - best)
    assert np.mean(ours) < 0.05 * np.mean(theirs)


def fit_laws_and_solve(table: Runs, weights: np.ndarray, prior: np.ndarray) -> np.ndarray:
    slopes = np.stack([fit_law(table.mixtures, values).slopes for values in table.values.T])
    return best_mixture(slopes, weights, prior, 0.05)


@pytest.mark.parametrize("seed", [1, 9, 43])
def test_metrics_that_are_noise_of_any_size_give_numbers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = 1000 * rng.standard_normal((12, 1))
    table = Runs(tuple("abcdefghij"), ("m",), rng.dirichlet(np.full(10, 0.3), 12), values)
    found = fit_mixture(table, Goal(np.ones(1), np.ones(10) / 10, 0.05, None, None, None))
    json.dumps(found, allow_nan=False)
    assert sum(found["proportions"].values()) == pytest.approx(1)


GOOD = "run,mix.a,mix.b,metric.m\nx,1,3,2.0\ny,2,2,2.5\nz,3,1,2.25\n"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_are_read_and_normalised(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"runs.{suffix}"
    if suffix == "csv":
        path.write_text("\ufeff" + GOOD.replace("\n", "\r\n") + "\r\n", "utf-8")
    else:
        columns = {"run": ["x", "y", "z"], "mix.a": [1, 2, 3], "mix.b": [3, 2, 1], "metric.m": [2.0, 2.5, 2.25]}
        pq.write_table(pa.table(columns), path)
    runs = read_runs(path)
    assert (runs.domains, runs.metrics, runs.unused) == (("a", "b"), ("m",), ("run",))
    np.testing.assert_array_equal(runs.mixtures, [[0.25, 0.75], [0.5, 0.5], [0.75, 0.25]])
    np.testing.assert_array_equal(runs.values[:, 0], [2.0, 2.5, 2.25])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "mix.a,mix.b,metric.m\n,1,2\n-1,1,2\nnan,1,inf\n0,0,x\n",
            (
                "2: mix.a: found nothing",
                "3: mix.a: found '-1'",
                "4: mix.a: found 'nan'",
                "4: metric.m: found 'inf'",
                "5: metric.m: found 'x'",
                "5: mix.*: found no weight above 0",
            ),
        ),
        ("mix.a,metric.m\n1,2\n", ("mix.*: found 1 columns",)),
        ("mix.a,mix.b,loss\n1,1,2\n", ("metric.*: found no column",)),
        ("mix.a,mix.a,mix.b,metric.m\n1,1,1,1\n", ("mix.a: found 2 columns",)),
        ("mix.,mix.b,metric.m\n1,1,1\n", ("mix.: found a column without a name",)),
        ("mix.a,mix.b,metric.m\n1,1\n1,1,1,1\n", ("2: found 2 cells; expected 3", "3: found 4 cells")),
        ("mix.a,mix.b,metric.m\n", ("found 0 lines with 0 different mixtures",)),
        ("mix.a,mix.b,metric.m\n1,2,1\n2,4,2\n2,1,3\n", ("found 3 lines with 2 different mixtures",)),
        (
            "mix.a,mix.b,mix.c,metric.m\n1,2,0,1\n2,2,0,1\n3,2,0,1\n",
            ("mix.c: found 0 in every line", "metric.m: found 1 in every line"),
        ),
        ("", ("empty file",)),
    ],
)
def test_all_that_is_wrong_in_a_table_is_said_at_once(tmp_path: Path, text: str, said: tuple[str, ...]) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_runs(path)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["none.csv", "none.parquet", "text.parquet", "latin.csv"])
def test_what_is_no_table_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.parquet").write_text(GOOD)
    (tmp_path / "latin.csv").write_bytes(b"mix.\xe9,mix.b\n")
    with pytest.raises(ConfigError, match=name):
        read_runs(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, ("--prior: found no prior",)),
        ({"kl": -1, "cap": 0, "tokens": float("nan")}, ("--kl", "--cap", "--tokens")),
        ({"prior": "uniform", "kl": 0}, ("--prior: found a prior that --kl 0",)),
        ({"prior": "natural"}, ("found 'natural' without --sizes",)),
        ({"prior": "uniform", "tokens": 5}, ("--sizes, --tokens",)),
        ({"prior": "uniform", "sizes": {"a": 1, "b": 2}}, ("--sizes, --tokens",)),
        ({"prior": "uniform", "cap": 2}, ("--cap: found 2",)),
        ({"sizes": {"a": 1, "bb": 2}}, ("bb: found an unknown domain", "did you mean 'b'", "b: found nothing")),
        ({"sizes": {"a": -1, "b": True}}, ("a: found -1", "b: found true")),
        ({"sizes": {"a": 0, "b": 0}}, ("found 0 for every domain",)),
        ({"sizes": {"a": 1e308, "b": 1e308}}, ("found numbers too large to add up",)),
        ({"sizes": {"a": 10**400, "b": 1}}, ("a: found 1000", "expected a finite number")),
        ({"sizes": [1, 2]}, ("found list; expected a mapping",)),
        ({"prior": "nowhere.json"}, ("nowhere.json",)),
        ({"sizes": {"a": 1, "b": 2}, "tokens": 13}, ("found 13 tokens; expected at most 12, which is 4 epochs",)),
        ({"prior": "uniform", "weights": "n=1,m=x"}, ("found 'n=1'", "--weights m: found 'x'")),
        ({"prior": "uniform", "weights": "m=0"}, ("--weights: found 'm=0'; expected a weight above 0",)),
    ],
    ids=str,
)
def test_goals_that_cannot_be_met_are_refused(tmp_path: Path, given: dict[str, Any], said: tuple[str, ...]) -> None:
    table = tmp_path / "runs.csv"
    table.write_text(GOOD)
    if "sizes" in given:
        (tmp_path / "sizes.json").write_text(json.dumps(given["sizes"]))
        given = given | {"sizes": tmp_path / "sizes.json"}
    runs = read_runs(table)
    with pytest.raises(ConfigError) as caught:
        read_goal(runs, **given)
    for part in said:
        assert part in str(caught.value)


def written(folder: Path) -> Path:
    """A table of 30 runs of three domains."""
    table, _ = drawn(8, 30, 3, metrics=2, noise=0.002)
    columns = [*(f"mix.{name}" for name in table.domains), *(f"metric.{name}" for name in table.metrics)]
    lines = [",".join(f"{v:.9g}" for v in row) for row in np.hstack([table.mixtures, table.values])]
    path = folder / "runs.csv"
    path.write_text("\n".join([",".join(columns), *lines]))
    (folder / "sizes.json").write_text(json.dumps({"d0": 1e9, "d1": 2e9, "d2": 5e8}))
    return path


def test_the_command_writes_what_a_mixer_reads(tmp_path, monkeypatch, capsys) -> None:
    path = written(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "mix",
                "fit",
                str(path),
                "--sizes",
                "sizes.json",
                "--tokens",
                "4e9",
                "--cap",
                "2",
                "--output",
                "out/p.json",
            ]
        )
    assert not caught.value.code
    read = json.loads((tmp_path / "out/p.json").read_text())
    shares = read["proportions"]
    assert list(shares) == ["d0", "d1", "d2"]
    assert sum(shares.values()) == pytest.approx(1)
    assert read["unit"] == "tokens"
    assert all(epochs <= 2 + 1e-6 for epochs in read["fit"]["epochs"].values())
    assert shares["d2"] <= 0.25 + 1e-9
    assert read["fit"]["prior"] == pytest.approx({"d0": 2 / 7, "d1": 4 / 7, "d2": 1 / 7})
    assert all(about["held_out_r2"] > 0.9 for about in read["fit"]["metrics"].values())
    assert len(read["fit"]["table_sha256"]) == 64
    out = capsys.readouterr().out
    assert "30 runs, 30 mixtures" in out
    assert f"{shares['d1']:8.4f}" in out
    taken = proportions_of("out/p.json", ["d2", "d0", "d1"], "proportions")
    np.testing.assert_allclose(taken, [shares["d2"], shares["d0"], shares["d1"]])
    # What was written can be the prior of the next fit.
    with pytest.raises(SystemExit):
        main(["mix", "fit", str(path), "--prior", "out/p.json", "--kl", "1e6", "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["proportions"] == pytest.approx(shares, abs=1e-5)
    assert again["fit"]["epochs"] is None


def test_the_command_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom dataflex.cli import main\n"
        f"try: main(['mix', 'fit', {str(written(tmp_path))!r}, '--kl', '0'])\n"
        "finally: print([m for m in ('torch', 'transformers', 'llamafactory') if m in sys.modules])\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["mix", "fit", str(written(tmp_path)), "--kl", "0", "--cap", "3"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(
        "dataflex: 1 problem in the configuration:\n  command line: --cap: found 3"
    )
