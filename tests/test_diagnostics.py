"""What an update came to is told right: every figure by a plain recomputation, the same in journal, summary and log."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from dataflex.features.spec import EmbeddingSpec, GradientSpec, LossSpec, Projection
from dataflex.pipelines.selecting import diagnostics
from dataflex.pipelines.selecting.diagnostics import Diagnostics, common_direction, diagnose, rank_correlation
from dataflex.rows import Status
from dataflex.selectors.base import Selection
from dataflex.stores.root import StoreRoot
from tests.held import Held, pool

RNG = np.random.default_rng(0)
VECTORS = (RNG.standard_normal((11, 4)) + 0.7).astype(np.float32)
ADAM = GradientSpec(direction="adam", projection=Projection(dim=4))


def mean_cosine(vectors: np.ndarray) -> float:
    """Return the mean cosine of vectors with the mean of their unit vectors, by loops."""
    units = [[float(x) / sum(float(y) ** 2 for y in v) ** 0.5 for x in v] for v in vectors]
    mean = [sum(u[d] for u in units) / len(units) for d in range(len(units[0]))]
    length = sum(m**2 for m in mean) ** 0.5
    return sum(sum(a * b for a, b in zip(u, mean, strict=True)) / length for u in units) / len(units)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlations_are_spearmans(ties: bool) -> None:
    a, b = RNG.standard_normal((2, 40))
    b = a + 0.5 * b
    if ties:
        a, b = np.round(a), np.round(b)
    expected = spearmanr(a, b).statistic
    assert rank_correlation(a, b) == pytest.approx(expected, rel=1e-5)
    gaps = [np.append(a, [np.nan, 1.0, -np.inf]), np.append(b, [0.0, np.inf, 2.0])]
    assert rank_correlation(*gaps) == pytest.approx(expected, rel=1e-5)
    assert rank_correlation(a, -b) == pytest.approx(-expected, rel=1e-5)


def test_there_is_no_correlation_of_what_does_not_vary_or_of_two_rows() -> None:
    assert rank_correlation(np.ones(5), np.arange(5)) is None
    assert rank_correlation(np.array([1.0, 2.0, np.nan]), np.arange(3)) is None


def test_the_common_direction_is_that_of_the_usable_rows() -> None:
    vectors, status = VECTORS.copy(), np.zeros(len(VECTORS), np.uint8)
    vectors[2], vectors[5], status[7] = np.nan, 0, Status.NO_LABELS
    kept = np.delete(np.arange(len(vectors)), [2, 5, 7])
    assert common_direction(Held(vectors, status)) == pytest.approx(mean_cosine(VECTORS[kept]), rel=1e-6)
    assert common_direction(Held(np.tile(VECTORS[:1], (6, 1)) * np.arange(1, 7)[:, None])) == pytest.approx(1)
    assert common_direction(Held(np.eye(9))) == pytest.approx(1 / 3)  # nothing in common: one over the root of n
    assert common_direction(Held(np.stack([VECTORS[0], -VECTORS[0]]))) == pytest.approx(0, abs=1e-7)
    assert common_direction(Held(np.zeros((3, 4)))) is None


def test_of_a_large_pool_evenly_spaced_rows_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "MOST_ROWS", 4)
    assert common_direction(Held(VECTORS)) == pytest.approx(mean_cosine(VECTORS[[0, 2, 5, 8]]), rel=1e-6)


def test_what_a_method_does_not_have_is_left_out() -> None:
    rows = pool(11)
    found = diagnose(rows, Selection(np.array([3, 4, 4])), [], None)
    assert found.plain() == {"sources": {"pool": 3}}
    assert str(found) == ""
    losses: Any = [(LossSpec(), Held(scalars={"loss_sum": np.ones(11)}))]
    found = diagnose(rows, Selection(np.array([3, 4, 4])), losses, np.array([4, 5]))
    assert found.plain() == {"sources": {"pool": 3}, "overlap": 0.5}
    assert found.metrics() == {"dataflex/overlap": 0.5, "dataflex/sources/pool": 3, "dataflex/share/pool": 1.0}
    assert Diagnostics(**json.loads(json.dumps(found.plain()))) == found


def test_figures_are_of_the_scores_and_not_of_what_a_rule_makes_of_them() -> None:
    rows = pool(11)
    rows.length[:] = np.arange(11) * 3 % 11
    scores, logits = np.linspace(-0.5, 0.5, 11), np.zeros(11)
    scores[[0, 1]] = np.nan, -np.inf
    norm = RNG.random(11)
    view = Held(VECTORS, scalars={"norm": np.linalg.norm(VECTORS, axis=1), "gradient_norm": norm})
    view.status[2] = Status.NONFINITE
    other = Held(VECTORS[::-1], scalars={"norm": np.linalg.norm(VECTORS, axis=1), "gradient_norm": norm[::-1]})
    beside = GradientSpec(projection=ADAM.projection), Held(VECTORS + 9, scalars={"norm": np.arange(11)})
    views: Any = [(ADAM, view), (ADAM, other), beside, (EmbeddingSpec(), Held(VECTORS))]
    found = diagnose(rows, Selection(np.array([9, 10]), pool=logits, judged=scores), views, None)
    usable = scores[2:]
    assert (found.scored, found.below_zero) == (9, 3)
    assert found.score_mean == pytest.approx(usable.mean(), rel=1e-5)
    assert found.score_deviation == pytest.approx(usable.std(), rel=1e-5)
    assert (found.score_least, found.score_most) == pytest.approx((-0.3, 0.5))
    assert found.length_correlation == pytest.approx(spearmanr(usable, rows.length[2:]).statistic, abs=1e-5)
    norms = (norm + norm[::-1]) / 2  # of the gradients, not of Adam's steps on them
    assert found.norm_correlation == pytest.approx(spearmanr(scores[3:], norms[3:]).statistic, abs=1e-5)
    both = mean_cosine(VECTORS[np.arange(11) != 2]), mean_cosine(VECTORS)
    assert found.common_direction == pytest.approx({"gradient": np.mean(both), "embedding": both[1]}, rel=1e-5)
    said = str(found)
    assert said.startswith("scores of 9 rows: mean 0.1, deviation 0.258, -0.3 to 0.5, 3 below 0; mean cosine with the")
    assert "of the rows as at the last update" not in said
    assert diagnose(rows, Selection(np.array([9]), pool=scores), [], None).scored == 9  # `pool` alone is the scores


def test_journal_summary_and_log_have_the_same_record(workspace: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dataflex")
    summary = workspace.run("train", workspace.write("run", dataset="target_words,target_records", save_steps=7))
    out = workspace.folder / "out" / "run"
    tables = [pq.read_table(out / "rounds" / f"round-0000{number}.parquet") for number in (1, 2)]
    infos = [json.loads(table.schema.metadata[b"dataflex"]) for table in tables]
    assert summary["diagnostics"] == [{"round": n, **info["diagnostics"]} for n, info in enumerate(infos, start=1)]
    first, second = (info["diagnostics"] for info in infos)
    # Every figure again, from the files alone.
    scores = pq.read_table(out / "rounds" / "pool-00002.parquet")["score"].drop_null().to_numpy()
    assert (second["scored"], second["below_zero"]) == (len(scores), int((scores < 0).sum()))
    assert second["score_mean"] == pytest.approx(scores.mean(), rel=1e-5)
    chosen = [set(table["index"].to_pylist()) for table in tables]
    assert "overlap" not in first
    assert second["overlap"] == pytest.approx(len(chosen[0] & chosen[1]) / len(chosen[1]))
    assert sum(second["sources"].values()) == 8
    (at,) = (i for i, recipe in enumerate(infos[1]["recipes"]) if recipe["feature"]["direction"] == "adam")
    store = StoreRoot(workspace.folder / "store").find("gradient", infos[1]["recipes"][at])
    assert store is not None
    (block,) = store.scan(100_000, vectors=True)
    assert len(block.keys) == 16
    assert block.vectors is not None
    assert second["common_direction"]["gradient"] == pytest.approx(mean_cosine(block.vectors), rel=1e-5)
    state = json.loads((out / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "dataflex/score_mean" in entry]
    assert [entry["step"] for entry in logged] == [3, 5]
    assert logged[1]["dataflex/common_direction/gradient"] == second["common_direction"]["gradient"]
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("update ")]
    assert lines == [f"update {n}: {Diagnostics(**info['diagnostics'])}" for n, info in enumerate(infos, start=1)]
