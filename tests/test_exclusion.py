"""Target rows that stand in the pool are left out where that is asked for; records that were dropped are named."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import pytest

from dataflex.config import load
from dataflex.errors import ConfigError

BOTH = {"dataset": "pool,target_words", "eval_dataset": "target_words,target_records"}
"""All of one target set stands in the pool."""


def section(workspace: Any, **more: Any) -> dict[str, Any]:
    return {"store": str(workspace.folder / "store"), "exclude_targets": True, **more}


def test_no_target_row_is_trained_on_or_chosen(workspace: Any, caplog: pytest.LogCaptureFixture) -> None:
    from dataflex.pipelines.select import select

    keys: dict[str, Any] = {"component_name": "random", "warmup_step": 1, "update_step": 15, "update_times": 1, **BOTH}
    keys |= {"save_strategy": "no"}
    with caplog.at_level(logging.INFO):
        summary = workspace.run("train", workspace.write("run", dataflex=section(workspace), **keys))
    assert summary["rows"] == 62  # of 70
    assert "8 training rows are identical to target rows and left out" in caplog.text
    assert "are identical to rows of it" not in caplog.text
    assert max(max(rows) for rows in workspace.rounds("run")) < 62
    select(load(workspace.write("chosen", dataflex=section(workspace), **keys)), 62, workspace.folder / "chosen.json")
    chosen = json.loads((workspace.folder / "chosen.json").read_text())
    words = json.loads((workspace.tiny.dataset_dir / "target_words.json").read_text())
    assert len(chosen) == 62
    assert not [row for row in words if row in chosen]
    caplog.clear()
    plain = workspace.write("plain", dataflex=section(workspace, exclude_targets=False), **keys)
    assert workspace.run("train", plain)["rows"] == 70
    assert (
        "target set target_words: 8 training rows are identical to rows of it; dataflex.exclude_targets" in caplog.text
    )
    assert "training set: LLaMA-Factory dropped 1 records" in caplog.text
    assert ": pool 61\n" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic_weight", "dynamic_mix"])
def test_for_mixers_and_weighters_alike(workspace: Any, kind: str) -> None:
    keys: dict[str, Any] = {"train_type": kind, "update_step": None, "update_times": None, "warmup_step": None, **BOTH}
    keys |= {"component_name": "loss" if kind == "dynamic_weight" else "uniform", "save_strategy": "no"}
    path = workspace.write("run", train_step=1, dataflex=section(workspace), **keys)
    if kind == "dynamic_weight":
        assert workspace.run("train", path)["rows"] == 62
    else:  # the whole domain is gone
        with pytest.raises(ConfigError, match=r"no row with a supervised token in target_words.*exclude_targets"):
            workspace.run("train", path)


@pytest.mark.slow
def test_where_nothing_is_left_out_nothing_changes(workspace: Any) -> None:
    keys: dict[str, Any] = {"warmup_step": 1, "update_step": 1, "update_times": 1}
    params = {"proj_dim": 64}
    plain = workspace.write("plain", dataflex=section(workspace, exclude_targets=False, params=params), **keys)
    assert workspace.run("featurize", plain)["computed"] > 0
    again = workspace.run("featurize", workspace.write("again", dataflex=section(workspace, params=params), **keys))
    assert again["computed"] == 0
    assert again["started_from"] is not None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"eval_dataset": None}, "dataflex.exclude_targets: found True; expected eval_dataset or val_size beside it"),
        ({"train_type": "static"}, "dataflex.exclude_targets: found True; expected false, or a dynamic train_type"),
    ],
)
def test_where_there_is_nothing_to_leave_out_it_is_refused(workspace: Any, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(workspace.write("run", dataflex=section(workspace), **({"component_name": "random"} | keys)))
    assert said.lower() in str(caught.value).lower()


def test_a_pool_of_targets_alone_is_refused(workspace: Any) -> None:
    path = workspace.write("run", component_name="random", dataset="target_words", dataflex=section(workspace),
                           eval_dataset="target_words")  # fmt: skip
    with pytest.raises(ConfigError, match="all 8 training rows are identical to target rows"):
        workspace.run("train", path)


def test_of_many_dropped_records_ten_are_named() -> None:
    from dataflex.pipelines.run import _listed  # without a dataset of records that LLaMA-Factory drops
    from tests.held import pool

    rows = pool(3)
    dropped = [(number % 2, number) for number in range(13)][::-1]
    found = _listed(dataclasses.replace(rows, names=("a", "b"), dropped=dropped))
    assert found.startswith("13 records")
    assert found.endswith(": a 0, 2, 4, 6, 8, 10, 12; b 1, 3, 5 and 3 more")


def test_what_every_rank_would_say_is_said_by_the_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dataflex.pipelines.run import _report  # on a rank that is none
    from tests.held import pool

    rows = dataclasses.replace(pool(3), dropped=[(0, 7)])
    for rank in range(2):
        caplog.clear()
        monkeypatch.setenv("RANK", str(rank))
        _report(rows, {"target": rows}, 3)
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert ["dropped" in " ".join(said), "identical to rows of it" in " ".join(said)] == [rank == 0] * 2
        with pytest.raises(ConfigError, match="no row with a supervised token"):
            _report(rows, {}, 0)
