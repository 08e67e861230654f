"""What `dataflex plan` says of mixers, weighters, static runs, checkpoints and resumptions is what they come to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dataflex.config import load
from dataflex.pipelines.plan import plan
from tests.command import python
from tests.doremi import proxy
from tests.test_plan import COUNTED, POOL, TARGETS, planned, size_of_stores, write
from tests.workspace import cut_back, mix, weigh

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def held(workspace: Any, path: Path) -> dict[str, Any]:
    """Plan, train, and plan again; return the first plan."""
    before, there = planned(path), size_of_stores(workspace)
    done = workspace.run("train", path)
    assert {name: before["totals"][name] for name in COUNTED} == {name: done[name] for name in COUNTED}
    assert before["totals"]["files"] == pytest.approx(size_of_stores(workspace) - there, rel=0.05)
    assert before["schedule"]["steps"] == done["steps"]
    after = planned(path)["totals"]
    assert (after["computed"], after["reused"]) == (0, before["totals"]["computed"] + before["totals"]["reused"])
    return before


def test_a_model_trained_whole(workspace: Any) -> None:
    """Its base is looked at before the first step, and once more at each update."""
    whole = {"finetuning_type": "full", "lora_target": None, "lora_rank": None, "lora_dropout": None}
    path = write(workspace, "whole", component_name="delta_loss", learning_rate=1e-4, eval_dataset=None, **whole)
    assert held(workspace, path)["totals"]["reused"] == 2 * POOL


def test_checkpoints_and_resumption(workspace: Any) -> None:
    workspace.run("train", write(workspace, "first", component_name="random", save_strategy="steps", save_steps=1))
    folders = [str(workspace.folder / "out" / "first" / f"checkpoint-{step}") for step in (3, 7)]
    params = {"proj_dim": 64, "checkpoints": folders}
    found = held(workspace, write(workspace, "offline", params, warmup_step=0))
    assert {need["state"] for need in found["needs"]} == set(folders)
    path = write(workspace, "online", {"proj_dim": 64}, save_strategy="steps", save_steps=1)
    workspace.run("train", path)
    over = planned(path)
    assert (over["schedule"]["done"], over["needs"], over["seconds"]["estimate"]) == (7, [], 0)
    cut_back(workspace.folder / "out" / "online", 4, rounds=2)
    shutil.rmtree(workspace.folder / "store")
    rest = planned(path)
    done = workspace.run("train", path)
    assert rest["schedule"]["done"] == 4
    assert {name: rest["totals"][name] for name in COUNTED} == {name: done[name] for name in COUNTED}
    assert done["computed"] == POOL + TARGETS  # of the second update alone


def test_static_and_features_of_the_run_file(workspace: Any) -> None:
    none = dict.fromkeys(("component_name", "warmup_step", "update_step", "update_times"))
    section = {"features": [{"kind": "loss"}, {"kind": "embedding"}], "params": None}
    path = write(workspace, "static", train_type="static", dataflex=section, num_train_epochs=1.5, **none)
    found = planned(path)
    assert found["totals"]["computed"] == 0
    workspace.run("train", path)
    state = json.loads((workspace.folder / "out" / "static" / "trainer_state.json").read_text("utf-8"))
    assert found["schedule"]["steps"] == state["global_step"]
    done = workspace.run("featurize", path)
    assert {name: found["featurize"][name] for name in COUNTED} == {name: done[name] for name in COUNTED}
    assert planned(path)["featurize"]["computed"] == 0


def test_mixers_and_weighters(workspace: Any) -> None:
    path = mix(workspace, "odm", component_name="odm", dataflex={"params": {"initial_losses": "base"}})
    assert held(workspace, path)["totals"]["computed"] == 24
    assert held(workspace, mix(workspace, "ado", component_name="ado"))["needs"] == []
    shutil.rmtree(workspace.folder / "store")
    weighed = held(workspace, weigh(workspace, "feature", "feature", {"feature": {"kind": "loss"}}))
    assert weighed["totals"]["computed"] == POOL
    assert held(workspace, weigh(workspace, "loss"))["schedule"]["steps"] == 3


def test_a_reference_whose_losses_are_kept(proxies: Any) -> None:
    found = held(proxies, proxy(proxies, "planned"))
    assert (found["totals"]["computed"], found["totals"]["reused"]) == (0, 24)


def test_a_rotating_share_and_a_test_set(workspace: Any) -> None:
    section = {"refresh": {"policy": "rotating", "refresh_fraction": 0.5}, "test_dataset": "target_words"}
    path = write(workspace, "rotating", {"proj_dim": 64}, update_times=3, dataflex=section)
    before = planned(path)
    done = workspace.run("train", path)
    assert before["totals"]["computed"] == pytest.approx(done["computed"], rel=0.05)
    assert "approximate" in before["notes"][0]
    assert before["tests"]["target_words"]["rows"] == TARGETS
    assert any("test set target_words" in part["what"] for part in before["seconds"]["details"])
    assert planned(path)["totals"]["computed"] == 0


def test_what_is_printed_is_the_plan_alone(workspace: Any) -> None:
    """In a process of its own, where libraries log to standard output."""
    path = write(workspace, "printed", {"proj_dim": 64})
    done = python("-m", "dataflex.cli", "plan", str(path), "--json")
    assert json.loads(done.stdout)["totals"]["computed"] == 2 * (POOL + TARGETS), done.stderr


def test_another_model_that_embeds(workspace: Any) -> None:
    section = {"params": {"embedding_model_name_or_path": str(workspace.tiny.model)}}
    path = write(workspace, "encoder", component_name="embedding", dataflex=section)
    assert plan(load(path, []))["totals"]["computed"] > 0
    held(workspace, path)
