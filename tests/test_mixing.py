"""`train_type: dynamic_mix`: real trainings, what they drew, what they resume to."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from dataflex.trainers.trainer import DataflexTrainer
from dataflex.trainers.weighing import ROWS

TEXT = {
    "stage": "pt",
    "template": None,
    "eval_dataset": None,
    "train_type": "dynamic_mix",
    "dataset": "target_words,target_records,target_arithmetic",
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Rows of every micro-batch that was trained on, in order."""
    found: list[list[int]] = []
    step = DataflexTrainer.training_step

    def noted(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        if ROWS in inputs:
            found.append(inputs[ROWS].tolist())
        return step(self, model, inputs, *args)

    monkeypatch.setattr(DataflexTrainer, "training_step", noted)
    return found


def mix(workspace: Any, name: str, **keys: Any) -> Any:
    """Write a run file of three domains of 8 rows."""
    values: dict[str, Any] = {
        "train_type": "dynamic_mix",
        "dataset": "target_words,target_records,target_arithmetic",
        "eval_dataset": None,
        "warmup_step": None,
        "update_step": None,
        "update_times": None,
        "train_step": 6,
        "lora_dropout": 0.0,
        "save_strategy": "no",
        "save_steps": None,
        "dataflex": {"store": str(workspace.folder / "store"), **keys.pop("dataflex", {})},
    }
    return workspace.write(name, **{**values, **keys})


def lines(workspace: Any, name: str) -> list[dict[str, Any]]:
    text = (workspace.folder / "out" / name / "mixture.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_odm_trains(workspace: Any, drawn: list[list[int]]) -> None:
    workspace.run("train", mix(workspace, "odm", component_name="odm"))
    found = lines(workspace, "odm")
    assert len(found) == 6
    assert len(drawn) == 12
    for line in found:
        assert sum(line["proportions"].values()) == pytest.approx(1)
    assert np.ptp(list(found[-1]["proportions"].values())) > 1e-3
