"""A refresh policy computes the rows that it says; a rotating run is its emulation from full features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.refresh import lines, reported
from dataflex.access.views import StoreView
from dataflex.config.keys import Refresh
from dataflex.pipelines.selecting.refresh import anchors, first, moved, rest, share_of
from dataflex.rows import KEY_DTYPE
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout, Values

ROTATING = Refresh(policy="rotating", refresh_fraction=0.1)


def test_full_and_static_compute_everything_and_nothing() -> None:
    updated = np.array([0, 1, 2])
    assert first(Refresh(), 3, updated).all()
    assert not first(Refresh(policy="static"), 3, updated).any()


@pytest.mark.parametrize("fraction", [0.01, 0.03, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 7, 62, 1000])
def test_the_two_passes_use_up_the_share(fraction: float, size: int) -> None:
    refresh = Refresh(policy="rotating", refresh_fraction=fraction)
    rng = np.random.default_rng(0)
    fresh = first(refresh, 5, rng.integers(0, 5, size))
    scores = rng.standard_normal(size)
    chosen = rest(refresh, fresh, scores, np.empty(0, np.int64))
    assert chosen.sum() == int(np.ceil(fraction * size))
    assert chosen[fresh].all()
    assert fresh[anchors(refresh, size)].all()
    added, left = scores[chosen & ~fresh], scores[~chosen]
    assert not len(added) or not len(left) or added.min() > left.max()


@pytest.mark.parametrize(("share", "size", "count"), [(0.07, 200, 14), (0.07, 100, 7), (0.07, 101, 8), (0.001, 10, 1)])
def test_a_share_is_rounded_up_where_it_is_no_whole_number(share: float, size: int, count: int) -> None:
    assert share_of(Refresh(policy="rotating", refresh_fraction=share), size) == count


def test_the_oldest_go_first() -> None:
    updated = np.repeat([3, 1, 2, 0], 250)
    fresh = first(ROTATING, 4, updated)
    fresh[anchors(ROTATING, 1000)] = False
    assert set(updated[fresh].tolist()) == {0}


def test_no_row_is_older_than_max_age() -> None:
    """Even where that takes more than the share."""
    refresh = Refresh(policy="rotating", refresh_fraction=0.05, max_age=2)
    fresh = first(refresh, 2, np.repeat([0, 1], 100))
    assert fresh[:100].all()
    assert (rest(refresh, fresh, np.arange(200.0), np.array([199])) == fresh).all()


def test_selected_rows_go_before_better_ones() -> None:
    """A rule need not choose the best scores."""
    fresh = first(ROTATING, 1, np.zeros(1000, int))
    selected = np.flatnonzero(~fresh)[5:25]
    chosen = rest(ROTATING, fresh, np.arange(1000.0), selected)
    assert chosen[selected].all()
    assert chosen[990:].all()
    assert chosen.sum() == 100


def test_anchors_are_the_same_rows_at_every_update() -> None:
    found = anchors(ROTATING, 5000)
    assert len(found) == len(np.unique(found)) == 25
    assert (found == anchors(ROTATING, 5000)).all()
    assert len(anchors(Refresh(policy="rotating", refresh_fraction=1.0), 1_000_000)) == 1024


def test_moved_is_the_mean_step_of_rows_that_have_both() -> None:
    before, now = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    before[1, 2], now[4] = np.nan, np.nan
    steps = [[float(n) - float(b) for n, b in zip(now[i], before[i], strict=True)] for i in (0, 2, 3, 5)]
    expected = [sum(column) / 4 for column in zip(*steps, strict=True)]
    np.testing.assert_allclose(moved(now, before), expected, rtol=1e-6)
    assert (moved(np.full((2, 4), np.nan), before[:2]) == 0).all()


def test_a_shifted_view_adds_the_shift_but_to_zeros(tmp_path: Path) -> None:
    vectors = np.array([[1, 2], [0, 0], [3, 4], [5, 6]], np.float32)
    keys = np.sort(np.frombuffer(np.random.default_rng(0).bytes(64), KEY_DTYPE))
    store = StoreRoot(tmp_path).open("embedding", {}, Layout({}, 2, "float32"))
    store.append("f", Values(keys, np.array([0, 0, 1, 0], np.uint8), {}, vectors))
    ages = np.ones(5, np.int32)
    order = [3, 2, 1, 0, 0]
    view = StoreView.of(store, keys[order], 1)
    assert (view.ages == ages).all()
    shifted = StoreView(store, view.keys, view.status, view.ages, np.array([10, 20], np.float32)).dense()
    np.testing.assert_array_equal(shifted, [[15, 26], [np.nan, np.nan], [0, 0], [11, 22], [11, 22]])


@pytest.mark.parametrize(
    "refresh",
    [{"policy": "rotating", "refresh_fraction": 0.25}, pytest.param({"policy": "full"}, marks=pytest.mark.slow)],
)
def test_the_benchmark_chooses_as_a_run_does(workspace: Any, refresh: dict[str, Any]) -> None:
    """Rows of a run under the policy, and of one that computes everything and emulates the policy."""
    section = {"store": str(workspace.folder / "store"), "storage": "float32", "refresh": refresh}
    workspace.run("train", workspace.write("run", update_times=4, dataflex={**section, "params": {"proj_dim": 256}}))
    output = workspace.folder / "agreement.jsonl"
    drive = refresh.get("refresh_fraction", 1.0)
    params = {"proj_dim": 256, "output": str(output), "fractions": [0.25], "drive": drive}
    section = {"store": str(workspace.folder / "store"), "storage": "float32", "params": params}
    component = "benchmarks.refresh:Comparison"
    workspace.run("train", workspace.write("emulated", update_times=4, component_name=component, dataflex=section))
    assert workspace.rounds("emulated") == workspace.rounds("run")
    records = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    found = {line.name: line for line in lines(records, trained=44, pool=62, targets=8)}
    assert found["full"].agreement == [1.0, 1.0, 1.0]
    assert found["full"].here == (4 * (62 + 8)) / 44
    assert found["rotating 0.25"].here == (62 + 3 * 16 + 4 * 8) / 44
    assert found["static"].here == (62 + 8) / 44


def test_the_reference_computes_234_gradients_per_trained_row() -> None:
    assert round(reported(1.0)) == 234
    assert reported(0.0) == 100_000 / 12_800
