"""A run of selections that is resumed at any step ends as the uninterrupted one: the same rows, the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dataflex.errors import DataflexError, MismatchError
from tests.workspace import assert_equal_weights, cut_back


def updates_logged(folder: Path) -> list[dict[str, Any]]:
    """Return what the training's log has of the updates, but for what they took."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    took = {f"dataflex/{name}" for name in ("computed", "reused", "seconds")}
    found = [entry for entry in history if "dataflex/scored" in entry]
    return [{name: value for name, value in entry.items() if name not in took} for entry in found]


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6])
def test_resuming_at_any_step_ends_as_the_uninterrupted_run(workspace: Any, step: int, whole: Any) -> None:
    """In the warm-up, at its end, inside a round and at a boundary: the same rows, and weights equal to the bit."""
    copy = shutil.copytree(whole.folder / "out" / "whole", workspace.folder / "out" / "resumed")
    # What a crash before the next round was decided leaves.
    cut_back(copy, step, rounds=sum(begins < step for begins in (0, 3, 5)))
    shutil.copytree(whole.folder / "store", workspace.folder / "store")
    summary = workspace.run("train", workspace.write("resumed"))
    assert workspace.rounds("resumed") == whole.rounds("whole")
    assert_equal_weights(workspace.weights("resumed"), whole.weights("whole"))
    earlier = json.loads((whole.folder / "out" / "whole" / "dataflex_summary.json").read_text())
    assert summary["diagnostics"] == earlier["diagnostics"]
    assert [update["round"] for update in summary["diagnostics"]] == [1, 2]
    assert updates_logged(workspace.folder / "out" / "resumed") == updates_logged(whole.folder / "out" / "whole")


def test_rotating_resumes_with_the_ages_it_had(workspace: Any) -> None:
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}}
    section["refresh"] = {"policy": "rotating", "refresh_fraction": 0.3, "max_age": 2}
    workspace.run("train", workspace.write("through", update_times=3, dataflex=section))
    out = workspace.folder / "out"
    cut_back(shutil.copytree(out / "through", out / "resumed"), 6, rounds=3)
    workspace.run("train", workspace.write("resumed", update_times=3, dataflex=section))
    assert workspace.rounds("resumed") == workspace.rounds("through")
    assert_equal_weights(workspace.weights("resumed"), workspace.weights("through"))


def test_what_was_resumed_otherwise_is_neither_kept_nor_replayed(
    workspace: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A run resumed with other arguments says so, keeps no state, and decides the rounds not begun anew."""
    path = workspace.write("run", update_times=1)
    workspace.run("train", path)
    out, states = workspace.folder / "out" / "run", workspace.folder / "store" / "states"

    def resumed(*overrides: str) -> dict[str, Any]:
        cut_back(out, 2)
        shutil.rmtree(states, ignore_errors=True)
        return dict(workspace.run("train", path, *overrides))

    assert resumed()["updates"] == []  # the update was in the journal
    assert "under other settings" not in caplog.text
    assert len(resumed("neftune_noise_alpha=5", "seed=43")["updates"]) == 1
    (said,) = [r.getMessage() for r in caplog.records if "under other settings" in r.getMessage()]
    assert said.count("\n") == 2
    assert "checkpoint-2 was written under other settings (there → here): " in said
    assert "neftune_noise_alpha: (none) → 5" in said
    assert "seed: 42 → 43" in said
    assert not list(states.glob("*/manifest*"))
    with pytest.raises(MismatchError, match="global batch of 8"):
        resumed("per_device_train_batch_size=4")


def test_checkpoints_without_the_optimizer_are_not_resumed_from(workspace: Any) -> None:
    path = workspace.write("run", component_name="random", dataflex=None, update_times=1)
    workspace.run("train", path, "save_only_model=true")
    before = workspace.weights("run")
    workspace.run("train", path)
    assert_equal_weights(workspace.weights("run"), before)
    workspace.run("train", path, "save_only_model=true", "overwrite_output_dir=true")
    checkpoint = workspace.folder / "out" / "run" / "checkpoint-5"
    with pytest.raises(DataflexError, match="save_only_model"):
        workspace.run("train", path, f"resume_from_checkpoint={checkpoint}")
