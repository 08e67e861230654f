"""Behind a prefilter a method chooses what it would choose of just these rows, and a sample tells what was lost."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.prefilter_replay import Setting, on_report
from dataflex.config import load
from dataflex.config.keys import Refresh
from dataflex.draws import generator
from dataflex.errors import ConfigError, CoverageError
from dataflex.pipelines.comparing.arms import arms_of, overrides
from dataflex.pipelines.plan import plan
from dataflex.pipelines.selecting.prefilter import Candidates, candidates, counts
from dataflex.rows import keys_from
from tests.processes import TWO, dataflex
from tests.workspace import assert_equal_weights, cut_back

KEEP, TAIL, SHARE = 0.4, 0.2, 0.5
PREFILTER: dict[str, Any] = {"method": "rds_plus", "keep": KEEP, "tail": TAIL}
ROTATING: dict[str, Any] = {"policy": "rotating", "refresh_fraction": SHARE}
ONCE: dict[str, Any] = {"save_strategy": "no", "save_steps": None}


def pool(copies: list[int]) -> np.ndarray:
    """Return row keys, in no order, of rows that stand in the pool so many times each."""
    digests = [n.to_bytes(16, "big") for n in np.random.default_rng(1).permutation(len(copies)).tolist()]
    keys = keys_from(digest for digest, count in zip(digests, copies, strict=True) for _ in range(count))
    return keys[np.random.default_rng(0).permutation(len(keys))]


def by_key(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return a value for each row, that of its key."""
    return values[np.unique(keys, return_inverse=True)[1]]


def pick(scores: np.ndarray, keys: np.ndarray, able: np.ndarray | None = None, seed: int = 0) -> Candidates:
    able = np.ones(len(keys), bool) if able is None else able
    return candidates(scores, keys, able, 0.25, 0.5, generator(seed, "tail"))


def test_the_best_distinct_rows_go_on_with_all_their_copies() -> None:
    copies = np.random.default_rng(2).integers(1, 4, 40)
    keys = pool(copies.tolist())
    values = np.round(np.random.default_rng(3).standard_normal(40), 1)  # with ties
    picked = pick(by_key(keys, values), keys)
    names = sorted({key.tobytes() for key in keys})
    order = sorted(range(40), key=lambda i: (-values[i], names[i]))
    head = {names[i] for i in order[:10]}
    kept = picked.rows[~picked.is_tail]
    assert sorted(kept) == [row for row, key in enumerate(keys) if key.tobytes() in head]
    tail = {keys[row].tobytes() for row in picked.rows[picked.is_tail]}
    assert len(tail) == 15
    assert not tail & head
    assert sorted(picked.rows[picked.is_tail]) == [row for row, key in enumerate(keys) if key.tobytes() in tail]
    assert picked.stands_for == 2
    assert (np.diff(picked.rows) > 0).all()


def test_a_row_without_a_finite_score_or_a_label_never_goes_on() -> None:
    keys = pool([1] * 40)
    scores = np.random.default_rng(4).standard_normal(40)
    scores[:20] = np.resize([np.nan, -np.inf, np.inf], 20)
    able = np.ones(40, bool)
    able[20:24] = False
    for seed in range(20):
        assert pick(scores, keys, able, seed).rows.min() >= 24
    assert len(pick(np.full(40, np.nan), keys).rows) == 0


def test_the_order_of_the_pool_does_not_matter() -> None:
    keys = pool([1, 2, 1, 3] * 10)
    scores = by_key(keys, np.random.default_rng(5).standard_normal(40))
    order = np.random.default_rng(6).permutation(len(keys))
    a, b = pick(scores, keys), pick(scores[order], keys[order])
    assert sorted(order[b.rows]) == sorted(a.rows)
    assert sorted(order[b.rows[b.is_tail]]) == sorted(a.rows[a.is_tail])


@pytest.mark.parametrize(("keep", "tail", "able"), [(1.0, 0.5, 7), (0.2, 0.02, 600), (0.07, 0.0, 100), (1e-9, 1.0, 5)])
def test_shares_are_rounded_up(keep: float, tail: float, able: int) -> None:
    head, drawn = counts(keep, tail, able)
    assert (head, drawn) == {7: (7, 0), 600: (120, 10), 100: (7, 0), 5: (1, 4)}[able]
    scores = np.arange(float(able))
    picked = candidates(scores, pool([1] * able), np.ones(able, bool), keep, tail, generator(0))
    assert (len(picked.rows) - picked.is_tail.sum(), picked.is_tail.sum()) == (head, drawn)


def test_what_is_said_to_be_lost_is_right_on_average() -> None:
    """The mean over draws of the sample is the share that a choice from the whole pool has outside of the head."""
    rng, size, k = np.random.default_rng(7), 400, 40
    cheap = rng.standard_normal(size)
    score = cheap + rng.standard_normal(size)
    keys, able = pool([1] * size), np.ones(size, bool)
    said = []
    for seed in range(400):
        picked = candidates(cheap, keys, able, 0.25, 0.25, generator(seed))
        lost = picked.lost(np.argsort(-score[picked.rows])[:k])
        assert lost is not None
        said.append(lost)
    head = candidates(cheap, keys, able, 0.25, 0.0, generator(0)).rows
    true = float((~np.isin(np.argsort(-score)[:k], head)).mean())
    assert 0.1 < true < 0.9
    assert np.mean(said) == pytest.approx(true, abs=0.02)


def test_without_a_sample_nothing_is_said_to_be_lost() -> None:
    keys = pool([1] * 8)
    assert candidates(np.arange(8.0), keys, np.ones(8, bool), 0.5, 0.0, generator(0)).lost(np.arange(2)) is None
    assert Candidates(np.arange(4), np.array([False] * 4), 3.0).lost(np.arange(2)) == 0.0
    assert Candidates(np.arange(4), np.array([True] * 4), 3.0).lost(np.arange(2)) == 1.0


def test_on_the_schedule_of_the_report_both_together_take_fewer_than_ten() -> None:
    rotating = Refresh(policy="rotating", refresh_fraction=0.07)
    assert round(on_report(Setting(None))) == 234
    assert round(on_report(Setting(None, refresh=rotating)), 1) == 23.7
    assert round(on_report(Setting("rds_plus", 0.2, 0.02)), 1) == 50.6
    by_hand = (20_000 + 1_600 + 29 * (1_400 + 1_600)) / 12_800
    assert on_report(Setting("rds_plus", 0.2, 0.02, rotating)) == pytest.approx(by_hand)
    assert by_hand < 10


def write(workspace: Any, name: str, prefilter: dict[str, Any] | None = None, **keys: Any) -> Path:
    section: dict[str, Any] = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}}
    section |= {"prefilter": prefilter or PREFILTER, **keys.pop("dataflex", {})}
    return Path(workspace.write(name, **{"dataflex": section, **keys}))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": "less"}, ["dataflex.prefilter.method: found 'less'", "without gradients"]),
        ({"method": "cluster_less"}, ["dataflex.prefilter.method: found 'cluster_less'", "without gradients"]),
        ({"method": "random"}, ["dataflex.prefilter.method: found 'random'", "no score"]),
        ({"method": "rds_pluss"}, ["dataflex.prefilter.method: found 'rds_pluss'", "did you mean 'rds_plus'"]),
        ({"method": "rds_plus", "keep": 0}, ["dataflex.prefilter.keep: found 0", "greater than 0"]),
        ({"method": "rds_plus", "keep": 1.1}, ["dataflex.prefilter.keep: found 1.1"]),
        ({"method": "rds_plus", "tail": -0.1}, ["dataflex.prefilter.tail: found -0.1"]),
        ({"keep": 0.2}, ["dataflex.prefilter.method"]),
        ({"method": "rds_plus", "params": {"pool": 1}}, ["dataflex.prefilter.params.pool"]),
    ],
)
def test_a_prefilter_that_cannot_act_is_refused(workspace: Any, keys: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load(write(workspace, "run", keys))
    for text in said:
        assert text in str(refused.value)


@pytest.mark.parametrize(
    ("method", "keys", "said"),
    [
        ("embedding", {}, "embedding asks for no gradients of training rows"),
        ("random", {}, "random asks for no gradients of training rows"),
        ("odm", {"train_type": "dynamic_mix", "eval_dataset": None}, "train_type: dynamic_select beside it"),
    ],
)
def test_a_method_that_gains_nothing_has_none(workspace: Any, method: str, keys: dict[str, Any], said: str) -> None:
    section: dict[str, Any] = {"params": {}}
    with pytest.raises(ConfigError) as refused:
        load(write(workspace, "run", component_name=method, dataflex=section, **keys))
    assert said in str(refused.value)


@pytest.mark.parametrize("policy", ["rotating", "static"])
def test_what_looks_at_the_live_model_keeps_other_rows_at_each_update(workspace: Any, policy: str) -> None:
    section = {"refresh": {"policy": policy}}
    with pytest.raises(ConfigError, match="looks at the base model alone"):
        load(write(workspace, "run", {"method": "loss"}, dataflex=section))
    load(write(workspace, "run", {"method": "loss", "params": {"model": "base"}}, dataflex=section))
    load(write(workspace, "run", {"method": "loss"}))


def test_compare_holds_it_against_methods_without_one(workspace: Any) -> None:
    path = write(workspace, "run", dataflex={"arms": {"behind": {"dataflex.prefilter": {"method": "embedding"}}}})
    own, random, full, behind = arms_of(["less", "random", "full", "behind"], load(path))
    assert load(path, overrides(own.keys)).dataflex.prefilter == load(path).dataflex.prefilter
    assert load(path, overrides(random.keys)).dataflex.prefilter is None
    assert load(path, overrides(full.keys)).dataflex.prefilter is None
    assert load(path, overrides(behind.keys)).dataflex.prefilter.method == "embedding"  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def done(tiny: Any, tmp_path_factory: pytest.TempPathFactory, workspace_class: Any) -> Any:
    """A workspace with a run, `run`, and one that computes everything and emulates it, `recorded`.

    Beside it what was planned before, and the summary.
    """
    space = workspace_class(tmp_path_factory.mktemp("prefilter"), tiny)
    keys: dict[str, Any] = {"update_times": 3, **ONCE}
    path = write(space, "run", dataflex={"refresh": ROTATING}, **keys)
    before = plan(load(path))
    summary = space.run("train", path)
    params = {"proj_dim": 256, "output": str(space.folder / "updates"), "drive": ["rds_plus", KEEP, TAIL, SHARE]}
    section = {"store": str(space.folder / "store"), "params": params}
    space.run(
        "train",
        space.write("recorded", component_name="benchmarks.prefilter_recording:Recorded", dataflex=section, **keys),
    )
    return space, before, summary


def test_the_benchmark_chooses_as_a_run_does(done: Any) -> None:
    space, _, _ = done
    assert space.rounds("recorded") == space.rounds("run")


def test_the_choice_is_that_of_the_plain_method_on_these_rows(done: Any) -> None:
    """By hand, from what the first update had: cosines of every row, the best of those that go on."""
    space, _, _ = done
    with np.load(space.folder / "updates" / "update_0.npz") as had:
        vectors, target = had["vectors"].astype(float), had["target target_arithmetic"].astype(float)
        cheap, keys = had["score rds_plus"], [key.tobytes() for key in had["keys"]]
    distinct = sorted(set(keys))
    best = {key: max(cheap[row] for row, own in enumerate(keys) if own == key) for key in distinct}
    ranked = sorted(distinct, key=lambda key: (-best[key], key))
    count = math.ceil(KEEP * len(distinct))
    rest = sorted(ranked[count:])
    drawn = np.random.Generator(np.random.PCG64(np.random.SeedSequence([42, 2, *b"tail", 0]))).permutation(len(rest))
    tail = [rest[i] for i in drawn[: math.ceil(TAIL * len(rest))]]
    allowed = {*ranked[:count], *tail}

    def cosine(row: int) -> float:
        each = [vectors[row] @ t / np.linalg.norm(vectors[row]) / np.linalg.norm(t) for t in target]
        return float(np.mean(each))

    scores = {row: cosine(row) for row, key in enumerate(keys) if key in allowed}
    expected = sorted(scores, key=lambda row: (-scores[row], keys[row], row))[:8]
    assert sorted(space.rounds("run")[1]) == sorted(expected)
    recorded = pq.read_table(space.folder / "out" / "run" / "rounds" / "pool-00001.parquet")
    assert np.flatnonzero(recorded["score"].is_valid()).tolist() == sorted(scores)
    found = recorded["judged"].to_pylist()
    np.testing.assert_allclose([found[row] for row in scores], list(scores.values()), atol=2e-4)


def test_only_what_is_kept_rotates_and_the_sample_is_new_each_time(done: Any) -> None:
    space, _, summary = done
    head, tail = counts(KEEP, TAIL, 61)
    tails = []
    for number, record in zip((1, 2, 3), summary["diagnostics"], strict=True):
        path = space.folder / "out" / "run" / "rounds" / f"pool-0000{number}.parquet"
        updated = pq.read_table(path)["updated"].to_numpy()
        assert (updated >= 0).sum() == record["candidates"]
        rows = head if number == 1 else math.ceil(SHARE * head)
        assert rows + tail <= (updated == number - 1).sum() <= rows + tail + 1  # one row of the pool stands there twice
        tails.append(frozenset(np.flatnonzero(updated >= 0).tolist()))
        assert record["tail"] in (tail, tail + 1)
        assert 0 <= record["lost"] <= 1
    assert len(set(tails)) == 3
    assert len(frozenset.intersection(*tails)) >= head


def test_a_plan_counts_what_the_run_computes(done: Any) -> None:
    space, before, summary = done
    head, tail = counts(KEEP, TAIL, 61)
    totals = before["totals"]
    assert before["prefilter"] == {"method": "rds_plus", "kept": head, "tail": tail}
    assert totals["gradients"] == head + tail + 2 * (math.ceil(SHARE * head) + tail) + 3 * 8
    assert totals["gradients"] == pytest.approx(summary["gradients"], abs=2)
    assert totals["computed"] == pytest.approx(summary["computed"], abs=2)
    assert totals["gradients_per_chosen_row"] == pytest.approx(totals["gradients"] / 24, rel=1e-3)
    assert totals["gradients_per_trained_row"] == pytest.approx(totals["gradients"] / 36, rel=1e-3)
    after = plan(load(space.folder / "run.yaml"))
    assert after["totals"]["computed"] == 0
    assert any("prefilter rds_plus" in note for note in after["notes"])


def test_too_few_rows_behind_it_are_refused_before_the_first_step(workspace: Any) -> None:
    with pytest.raises(CoverageError, match=r"found \d that can be chosen behind dataflex\.prefilter"):
        workspace.run("train", write(workspace, "run", {"method": "rds_plus", "keep": 0.09, "tail": 0.0}))
    assert not (workspace.folder / "out" / "run" / "rounds").exists()


@pytest.mark.slow
def test_no_row_with_a_score_is_said(workspace: Any) -> None:
    nothing = {"method": "ifd", "params": {"most": 1e-6}}
    with pytest.raises(CoverageError, match=r"prefilter\.method: ifd: .* found 0 that can be chosen of 62"):
        workspace.run("train", write(workspace, "run", nothing, **ONCE))


@pytest.mark.slow
def test_it_resumes_with_the_rows_that_it_had(workspace: Any) -> None:
    section = {"refresh": ROTATING}
    workspace.run("train", write(workspace, "through", update_times=3, dataflex=section))
    out = workspace.folder / "out"
    cut_back(shutil.copytree(out / "through", out / "resumed"), 6, rounds=3)
    summary = workspace.run("train", write(workspace, "resumed", update_times=3, dataflex=section))
    assert workspace.rounds("resumed") == workspace.rounds("through")
    assert_equal_weights(workspace.weights("resumed"), workspace.weights("through"))
    earlier = json.loads((out / "through" / "dataflex_summary.json").read_text("utf-8"))
    assert summary["diagnostics"] == earlier["diagnostics"]


@pytest.mark.slow
def test_two_processes_choose_what_one_does(workspace: Any) -> None:
    keys = {"gradient_accumulation_steps": 1, **ONCE}
    dataflex("train", write(workspace, "two", **keys), **TWO)
    keys["gradient_accumulation_steps"] = 2
    workspace.run("train", write(workspace, "one", **keys))
    assert workspace.rounds("one")[0] == workspace.rounds("two")[0]
    assert sorted(workspace.rounds("one")[1]) == sorted(workspace.rounds("two")[1])


@pytest.mark.slow
@pytest.mark.parametrize("prefilter", [PREFILTER, {**PREFILTER, "method": "loss", "params": {"mode": "topk_high"}}])
def test_what_featurize_computed_is_what_select_asks_for(workspace: Any, prefilter: dict[str, Any]) -> None:
    from dataflex.pipelines.select import select

    path = write(workspace, "run", prefilter, **ONCE)
    ahead = workspace.run("featurize", path)
    assert ahead["computed"] == plan(load(path))["featurize"]["reused"]
    select(load(path), 8, workspace.folder / "chosen.json")
    found = json.loads((workspace.folder / "out" / "run" / "dataflex_select.json").read_text("utf-8"))
    assert found["computed"] == 0
    assert found["diagnostics"][0]["candidates"] < 40
    workspace.run("train", path)
    chosen = pq.read_table(workspace.folder / "chosen.parquet")["index"].to_pylist()
    assert sorted(chosen) == sorted(workspace.rounds("run")[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("cluster_less", {"proj_dim": 256, "cluster_size": 8}),
        ("influence_distillation", {"proj_dim": 256, "landmarks": 12}),
        ("nice", {"proj_dim": 256, "reward": {"type": "function", "function": "benchmarks.selection_quality:overlap"},
                  "max_new_tokens": 8}),
        ("composed", {"representation": {"kind": "gradient", "proj_dim": 256}, "rule": {"kind": "sample"}}),
        ("near", {"representation": {"kind": "gradient", "proj_dim": 256}}),
    ],
)  # fmt: skip
def test_other_methods_of_gradients_choose_behind_it(workspace: Any, method: str, params: dict[str, Any]) -> None:
    summary = workspace.run(
        "train", write(workspace, method, component_name=method, dataflex={"params": params}, **ONCE)
    )
    head, tail = counts(KEEP, TAIL, 61)
    assert summary["gradients"] <= 2 * (head + tail + 1 + 8 * 5)
    for record, rows in zip(summary["diagnostics"], workspace.rounds(method)[1:], strict=True):
        assert record["candidates"] <= head + tail + 2
        assert len(rows) == 8
