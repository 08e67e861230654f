"""A weighted run that is resumed is the uninterrupted one, to the bit; another run's checkpoint is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dataflex.errors import MismatchError
from dataflex.trainers.micro_batch import ROWS
from dataflex.trainers.trainer import DataflexTrainer
from tests.workspace import assert_equal_weights, logged, weigh

SHARP = {"temperature": 0.2}


# ---- resumption


@contextmanager
def crash_after(step: int) -> Iterator[None]:
    """End a run as soon as a checkpoint is complete."""

    class Crash(Exception):
        pass

    saving = DataflexTrainer._save_checkpoint  # Transformers' name of the method behind which it is complete

    def crash(self: Any, *args: Any) -> None:
        saving(self, *args)
        if self.state.global_step == step:
            raise Crash

    DataflexTrainer._save_checkpoint = crash  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(Crash):
            yield
    finally:
        DataflexTrainer._save_checkpoint = saving  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("loss", {**SHARP, "normalisation": "batch", "schedule": "linear", "anneal_steps": 3}),
        ("adapt", {"tau": 0.5, "refresh_interval": 3}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(workspace, batches, method, params):
    """With dropout: what is computed ahead, and the anchors, must not move a random state."""
    lora = {"finetuning_type": "lora", "lora_target": "all", "lora_rank": 4, "lora_dropout": 0.1}
    keys = {**lora, "save_strategy": "steps", "save_steps": 1, "max_steps": 4, "optim": None, "learning_rate": 1e-2}
    keys["eval_dataset"] = "target_words"
    workspace.run("train", weigh(workspace, "whole", method, params, **keys))
    whole = [batch[ROWS].tolist() for batch in batches]
    batches.clear()
    path = weigh(workspace, "halves", method, params, **keys)
    with crash_after(2):
        workspace.run("train", path)
    workspace.run("train", path)
    assert [batch[ROWS].tolist() for batch in batches] == whole
    assert_equal_weights(workspace.weights("halves"), workspace.weights("whole"))
    assert logged(workspace, "halves") == logged(workspace, "whole")


def test_a_checkpoint_of_another_run_is_refused(workspace):
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    workspace.run("train", weigh(workspace, "one", "loss", **keys))
    again = weigh(workspace, "one", "adapt", **{**keys, "max_steps": 2, "eval_dataset": "target_words"})
    with pytest.raises(MismatchError, match="found the weighter loss, this run has adapt"):
        workspace.run("train", again)
    mixed = {**keys, "train_type": "dynamic_mix", "max_steps": None, "train_step": 1}
    workspace.run("train", weigh(workspace, "mixed", "static", **mixed))
    again = weigh(workspace, "mixed", "loss", **{**keys, "max_steps": 2})
    with pytest.raises(MismatchError, match=r"weighter\.json: missing; expected a checkpoint of a run with"):
        workspace.run("train", again)
