"""`dataflex mix fit` from table to proportions: its quality is that of runs left out, and its doubts are said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from dataflex.fitting.fit import fit_mixture
from dataflex.fitting.goal import Goal
from dataflex.fitting.law import fit_law
from dataflex.fitting.optimum import best_mixture
from dataflex.fitting.quality import held_out, r_squared, rank_correlation
from dataflex.fitting.table import Runs
from dataflex.mixers.static import proportions_of
from tests.command import python, run
from tests.mixtures import drawn, objective


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
    given = ("--sizes", "sizes.json", "--tokens", "4e9", "--cap", "2", "--output", "out/p.json")
    code, out, _ = run(capsys, "mix", "fit", str(path), *given)
    assert code == 0
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
    assert "30 runs, 30 mixtures" in out
    assert f"{shares['d1']:8.4f}" in out
    taken = proportions_of("out/p.json", ["d2", "d0", "d1"], "proportions")
    np.testing.assert_allclose(taken, [shares["d2"], shares["d0"], shares["d1"]])
    # What was written can be the prior of the next fit.
    again = json.loads(run(capsys, "mix", "fit", str(path), "--prior", "out/p.json", "--kl", "1e6", "--json")[1])
    assert again["proportions"] == pytest.approx(shares, abs=1e-5)
    assert again["fit"]["epochs"] is None


def test_the_command_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom dataflex.cli import main\n"
        f"try: main(['mix', 'fit', {str(written(tmp_path))!r}, '--kl', '0'])\n"
        "finally: print([m for m in ('torch', 'transformers', 'llamafactory') if m in sys.modules])\n"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "mix", "fit", str(written(tmp_path)), "--kl", "0", "--cap", "3")
    assert code == 2
    assert err.startswith("dataflex: 1 problem in the configuration:\n  command line: --cap: found 3")
