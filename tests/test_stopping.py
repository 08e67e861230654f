"""A training that a signal stops says where, saves what it says, and ends as the uninterrupted one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex import stop
from dataflex.access.sources import ModelSource
from dataflex.checkpoints.marks import incomplete_reason
from dataflex.errors import ConfigError, Interrupted
from dataflex.status import reported
from dataflex.trainers.resumption import Resumption
from dataflex.trainers.trainer import DataflexTrainer
from tests import processes
from tests.workspace import assert_equal_weights, logged

Signal = Callable[[type, str, Callable[[Any], bool]], None]


@pytest.fixture(scope="module")
def through(tiny: Any, tmp_path_factory: pytest.TempPathFactory, workspace_class: Any) -> Any:
    """A run of seven steps that nothing stops, which saves nothing on its way."""
    space = workspace_class(tmp_path_factory.mktemp("through"), tiny)
    space.run("train", space.write("run", save_strategy="no"))
    return space


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Signal:
    """Send this process a signal before a method does its work, the first time that a condition holds."""

    def send(owner: type, method: str, when: Callable[[Any], bool]) -> None:
        real = getattr(owner, method)
        sent: list[bool] = []

        def first(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not sent and when(self):
                sent.append(True)
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGUSR1)  # another one changes nothing
            return real(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, first)

    return send


def stopped(workspace: Any, path: Path, *overrides: str) -> str:
    """Train under the handlers of the command; return what the interruption says."""
    out = workspace.folder / "out" / path.stem
    with pytest.raises(Interrupted) as found, reported("train", out):
        workspace.run("train", path, *overrides)
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["message"]) == ("interrupted", 75, str(found.value))
    return str(found.value)


def assert_as(through: Any, workspace: Any) -> None:
    assert workspace.rounds("run") == through.rounds("run")
    assert_equal_weights(workspace.weights("run"), through.weights("run"))


def checkpoints(workspace: Any) -> list[str]:
    return sorted(path.name for path in (workspace.folder / "out" / "run").glob("checkpoint-*"))


def test_a_step_is_ended_and_saved_and_nothing_is_done_twice(workspace: Any, through: Any, signalled: Signal) -> None:
    """In the first of a step's two micro-batches, where neither the strategy nor `save_only_model` saves enough."""
    shutil.copytree(through.folder / "store", workspace.folder / "store")
    path = workspace.write("run", save_strategy="no", save_only_model=True)
    signalled(DataflexTrainer, "training_step", lambda trainer: trainer.state.global_step == 3)
    said = stopped(workspace, path)
    assert said == ("SIGTERM: stopped after step 4 of 7; the same command goes on from step 4, no step is done again")
    assert checkpoints(workspace) == ["checkpoint-4"]
    assert incomplete_reason(workspace.folder / "out" / "run" / "checkpoint-4") is None
    workspace.run("train", path)
    assert_as(through, workspace)


def test_an_update_stops_behind_a_fragment_that_is_kept(
    workspace: Any, through: Any, signalled: Signal, batches: list[Any]
) -> None:
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "fragment_rows": 16}
    path = workspace.write("run", save_strategy="no", dataflex=section)
    signalled(ModelSource, "compute", lambda _: len(batches) == 10)  # two to a step
    said = stopped(workspace, path)
    assert said.endswith("after step 5 of 7; the same command goes on from step 5, no step is done again")
    assert checkpoints(workspace) == ["checkpoint-5"]
    summary = workspace.run("train", path)
    # 69 values of the second update; some were kept.
    assert 0 < summary["updates"][0]["reused"] < 69
    assert summary["updates"][0]["reused"] + summary["updates"][0]["computed"] == 69
    assert_as(through, workspace)


def test_without_a_checkpoint_it_says_what_is_lost(workspace: Any, through: Any, signalled: Signal) -> None:
    """Three of the steps are kept beside the features, as the state at the end of the warm-up."""
    shutil.copytree(through.folder / "store", workspace.folder / "store")
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "checkpoint_on_signal": False}
    path = workspace.write("run", save_strategy="no", dataflex=section)
    signalled(DataflexTrainer, "training_step", lambda trainer: trainer.state.global_step == 4)
    said = stopped(workspace, path)
    assert said.endswith("after step 5 of 7; the same command goes on from step 3, 2 steps are done again")
    assert checkpoints(workspace) == []


@pytest.mark.parametrize(
    ("keys", "end"),
    [
        ({"overwrite_output_dir": True}, "begin anew, resume_from_checkpoint: true beside it goes on from step 2"),
        ({"save_steps": 2, "dataflex.checkpoint_on_signal": False}, "goes on from step 2, no step is done again"),
    ],
)
@pytest.mark.slow
def test_what_the_same_command_does_is_said(workspace: Any, signalled: Signal, keys: dict[str, Any], end: str) -> None:
    path = workspace.write("run", component_name="random", dataflex=None)
    signalled(DataflexTrainer, "training_step", lambda trainer: trainer.state.global_step == 1)
    assert stopped(workspace, path, *(f"{key}={value}" for key, value in keys.items())).endswith(end)


@pytest.mark.slow
def test_after_the_last_step_it_ends_as_ever(workspace: Any, signalled: Signal) -> None:
    path = workspace.write("run", component_name="random", dataflex=None, save_strategy="no")
    signalled(DataflexTrainer, "training_step", lambda trainer: trainer.state.global_step == 6)
    with reported("train", workspace.folder / "out" / "run"):
        workspace.run("train", path)
    assert json.loads((workspace.folder / "out" / "run" / "status.json").read_text())["state"] == "finished"
    assert workspace.weights("run")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["steps", "best", "epoch"])
def test_an_evaluation_is_ended_and_saved(workspace: Any, signalled: Signal, strategy: str) -> None:
    keys: dict[str, Any] = {"eval_strategy": "epoch" if strategy == "epoch" else "steps", "eval_steps": 2}
    keys |= {"save_strategy": strategy, "save_steps": 100, "load_best_model_at_end": strategy == "best"}
    keys |= {"num_train_epochs": 2, "update_times": 1, "component_name": "random", "dataflex": None}
    keys |= {"metric_for_best_model": "eval_loss"}
    workspace.run("train", workspace.write("through", **keys))
    path = workspace.write("run", **keys)
    signalled(DataflexTrainer, "evaluate", lambda trainer: trainer.state.global_step >= 4)
    assert "no step is done again" in stopped(workspace, path)
    workspace.run("train", path)
    assert workspace.rounds("run") == workspace.rounds("through")
    assert_equal_weights(workspace.weights("run"), workspace.weights("through"))
    assert logged(workspace, "run", "eval_loss") == logged(workspace, "through", "eval_loss")


KINDS: dict[str, dict[str, Any]] = {
    "static": {"train_type": "static", "component_name": None, "warmup_step": None, "update_step": None}
    | {"update_times": None, "max_steps": 5, "eval_dataset": None},
    "weight": {"train_type": "dynamic_weight", "component_name": "loss", "update_step": None, "update_times": None}
    | {"warmup_step": 1, "train_step": 5, "eval_dataset": None},
    "mix": {"train_type": "dynamic_mix", "component_name": "odm", "dataset": "pool,target_words", "warmup_step": 1}
    | {"update_step": 1, "update_times": None, "train_step": 5, "eval_dataset": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_goes_on_where_it_stopped(workspace: Any, signalled: Signal, kind: str) -> None:
    from transformers import Trainer

    keys = {"dataflex": None, "save_strategy": "no", **KINDS[kind]}
    workspace.run("train", workspace.write("through", **keys))
    path = workspace.write("run", **keys)
    owner = Trainer if kind == "static" else DataflexTrainer
    signalled(owner, "training_step", lambda trainer: trainer.state.global_step == 2)
    assert "goes on from step 3, no step is done again" in stopped(workspace, path)
    workspace.run("train", path)
    assert_equal_weights(workspace.weights("run"), workspace.weights("through"))


@pytest.mark.slow
def test_features_that_take_too_long_are_dropped(
    workspace: Any, signalled: Signal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a long generation: the fragment is not waited for, what was committed before it stays."""
    monkeypatch.setattr(stop, "PATIENCE", 0.0)
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "fragment_rows": 16}
    path = workspace.write("run", dataflex=section, warmup_step=0)
    done: list[int] = []
    real = ModelSource.compute

    def slow(self: Any, rows: Any, at: Any, *args: Any) -> Any:
        done.append(len(at))
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return real(self, rows, at, *args)

    monkeypatch.setattr(ModelSource, "compute", slow)
    with pytest.raises(Interrupted, match="the same command computes the rest"), reported("featurize", None):
        workspace.run("featurize", path)
    assert len(done) == 2
    monkeypatch.setattr(ModelSource, "compute", real)
    assert workspace.run("featurize", path)["computed"] == 69 - done[0]


def test_a_second_answer_to_signals_is_refused(workspace: Any) -> None:
    from dataflex.config import load

    with pytest.raises(ConfigError, match=r"enable_jit_checkpoint: found true; expected no such key"):
        load(workspace.write("run", enable_jit_checkpoint=True), [])


def broken_off(path: Path, is_time: Callable[[], bool]) -> str:
    """Train in a process of its own, press Ctrl-C when it is time; return what it says of it, in one line."""
    command = [sys.executable, "-m", "dataflex.cli", "-q", "train", str(path)]
    status, text = processes.signalled(command, signal.SIGINT, is_time)
    assert status == 130, text
    assert "Traceback" not in text
    (said,) = [line for line in text.splitlines() if line.startswith("dataflex: Ctrl-C: stopped after step ")]
    return said


@pytest.mark.slow
def test_ctrl_c_says_what_the_same_command_does(workspace: Any) -> None:
    keys = {"component_name": "random", "dataflex": None, "update_step": 15, "update_times": 100, "save_steps": 2}

    def saved(name: str) -> int:
        return Resumption(str(workspace.folder / "out" / name), None, False, False, False).newest(10**6)

    path = workspace.write("anew", overwrite_output_dir=True, **keys)
    assert broken_off(path, lambda: saved("anew") >= 2).endswith(
        " of 1503; overwrite_output_dir makes the same command begin anew, resume_from_checkpoint: true beside it goes "
        f"on from step {saved('anew')}"
    )
    named = str(shutil.copytree(workspace.folder / "out" / "anew" / "checkpoint-2", workspace.folder / "checkpoint-2"))
    path = workspace.write("named", resume_from_checkpoint=named, **keys)
    assert broken_off(path, lambda: saved("named") >= 4).endswith(
        f" of 1503; the same command begins at {named} again; resume_from_checkpoint: true goes on from step "
        f"{saved('named')}"
    )


@pytest.mark.slow
def test_ctrl_c_knows_of_a_warm_up_that_was_kept(workspace: Any) -> None:
    path = workspace.write("kept", update_step=15, update_times=100, save_strategy="no")
    rounds = workspace.folder / "out" / "kept" / "rounds"
    said = broken_off(path, lambda: len(list(rounds.glob("round-*.parquet"))) > 1)
    found = re.search(r"after step (\d+) of 1503; the same command goes on from step 3, (.*)$", said)
    assert found is not None, said
    lost = int(found[1]) - 3
    assert found[2].startswith(f"{lost} step" if lost else "no step")
