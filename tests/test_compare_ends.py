"""As runs of a comparison end: what is told of them, what is added to the table, and what becomes of the others."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from dataflex.config import load
from dataflex.errors import DataflexError, MismatchError
from dataflex.pipelines.compare import compare
from dataflex.pipelines.comparing.arms import arms_of
from dataflex.pipelines.comparing.kept import Kept
from dataflex.pipelines.comparing.once import Once
from dataflex.pipelines.comparing.plans import Plan, plans_of
from dataflex.pipelines.comparing.records import records_of, several_devices
from dataflex.pipelines.comparing.trials import trials_of
from dataflex.pipelines.comparing.walls import Walls
from dataflex.results.names import ABOUT, name_of
from dataflex.status import file_of

COSTS = {"seconds": 3.0, "feature_seconds": 1.0, "computed": 5, "reused": 0, "gradients": 50}


def planned(workspace: Any, methods: str, once: int | None = None, **more: Any) -> tuple[Path, dict[str, Plan]]:
    keys: dict[str, Any] = {"save_strategy": "no", "update_step": 0, "train_step": 5, "lora_dropout": 0.0}
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "test_dataset": "target_words"}
    path = Path(workspace.write("run", dataflex=section, **{**keys, **more}))
    base = load(path, [])
    chosen = None if once is None else Once.of(once, base, 1)
    trials = trials_of(path, [], arms_of(methods.split(","), base), 1, (), 1, base, chosen)
    return path, {plan.trial.arm.name: plan for plan in plans_of(trials, path, [], 1, True).values()}


def finish(plan: Plan, loss: float = 1.0, device: str = "cpu: x86_64") -> None:
    """Leave in the folder of a run and its choice what they write at their end."""
    for part in plan.parts:
        trial = part.trial
        trial.note(part.identity, [])
        verb = "summary" if trial.verb == "train" else trial.verb
        measured = {"target_words": {"rows": 8, "tokens": 90, "loss": loss}}
        summary = {**COSTS, "steps": 5, "gradients_per_chosen_row": 0.0, "test": measured}
        for name, found in (
            (f"dataflex_{verb}.json", summary),
            (file_of(trial.verb), {"state": "finished"}),
            (name_of(ABOUT, trial.verb), {"machine": {"device": device, "threads": 1}}),
        ):
            (trial.folder / name).write_text(json.dumps(found))


def test_seconds_from_start_to_end_are_told_where_one_launch_saw_them_all(workspace: Any) -> None:
    _, plans = planned(workspace, "less,random,full,base", once=10)
    less, random, full, base = plans.values()
    assert less.choice is not None
    assert random.choice is not None
    less.trial.note(less.identity, [])  # stopped within the training
    random.choice.trial.note(random.choice.identity, [])  # and within the choice
    walls = Walls([part for plan in plans.values() for part in plan.parts])
    for plan in plans.values():
        for part in plan.parts:
            part.trial.folder.mkdir(parents=True, exist_ok=True)
            if part is not less.choice:
                walls.ended(part, 10.0)
    walls.ended(less.choice, 5.0)
    assert [walls.seen(plan) for plan in (less, random, full, base)] == [15.0, 20.0, 10.0, 10.0]
    assert [walls.whole(plan) for plan in (less, random, full, base)] == [None, None, 10.0, 10.0]


def test_a_run_whose_choice_an_earlier_launch_made_was_not_seen_whole(workspace: Any) -> None:
    _, plans = planned(workspace, "random", once=10)
    (plan,) = plans.values()
    assert plan.choice is not None
    walls = Walls(plan.parts)
    walls.ended(plan, 10.0)
    assert walls.whole(plan) is None
    walls.ended(plan.choice, 1.0)
    assert walls.whole(plan) == 11.0


def test_a_run_without_its_choice_is_not_finished(workspace: Any) -> None:
    path, plans = planned(workspace, "less", once=10)
    (plan,) = plans.values()
    assert plan.choice is not None
    finish(plan)
    found = records_of(plan.trial)
    told = {name: found[0][name] for name in ("chosen", "choice_gradients", "gradients_per_chosen_row")}
    assert told == {"chosen": 10, "choice_gradients": 50, "gradients_per_chosen_row": 5.0}
    assert plan.trial.check(plan.identity)
    plan.trial.require_choice()
    shutil.rmtree(plan.choice.trial.folder)
    assert records_of(plan.trial) == []
    assert not plan.trial.check(plan.identity)
    table = workspace.folder / "table.jsonl"
    with pytest.raises(MismatchError, match=r"a finished run whose choice is not finished, or gone; expected it in"):
        compare(path, [], ["less"], seeds=1, once=10, keep=table)
    assert not table.exists()
    assert plan.everywhere is not None
    Kept(table).add(plan.everywhere, found, None)  # what the table has needs no folder
    (line,) = compare(path, [], ["less"], seeds=1, once=10, keep=table)
    assert line.choice_seconds == 3.0


def test_a_full_disk_keeps_no_report_from_being_written(
    workspace: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dataflex")
    path, plans = planned(workspace, "random,base")
    for plan in plans.values():
        finish(plan)
    table, out = workspace.folder / "table.jsonl", workspace.folder / "out" / "run"

    def full(file: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("dataflex.pipelines.comparing.kept._append", full)
        with pytest.raises(DataflexError, match=r"2 finished runs could not be added; the first, random seed 42: .*No"):
            compare(path, [], ["random", "base"], seeds=1, keep=table)
    assert "base: finished, and not added to" in caplog.text
    assert "| base" in (out / "compare.md").read_text()
    assert not table.exists()
    compare(path, [], ["random", "base"], seeds=1, keep=table)
    assert len(table.read_text().splitlines()) == 2


def test_several_devices_are_told(workspace: Any, caplog: pytest.LogCaptureFixture) -> None:
    path, plans = planned(workspace, "random,base")
    finish(plans["random"])
    table = workspace.folder / "table.jsonl"
    elsewhere = {**records_of(plans["random"].trial)[0], "arm": "base", "seed": None, "device": "cuda: NVIDIA H200"}
    identity = plans["base"].everywhere
    assert identity is not None
    Kept(table).add(identity, [elsewhere], 1.0)
    compare(path, [], ["random", "base"], seeds=1, keep=table)
    assert "several devices, whose arithmetic enters" in caplog.text
    assert "cpu: x86_64 (random); cuda: NVIDIA H200 (base)" in caplog.text
    one = [{"arm": arm, "device": "cpu: x86_64"} for arm in ("less", "random")]
    assert several_devices([*one, {"arm": "old", "device": None}]) is None
