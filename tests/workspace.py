"""What several files of tests do with a workspace: run files of mixtures and weighters, and what a run left."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

NAMES = ("target_words", "target_records", "target_arithmetic")  # 8 rows each


def mix(workspace: Any, name: str, **keys: Any) -> Any:
    """Write a run file of three domains of 8 rows."""
    values: dict[str, Any] = {
        "train_type": "dynamic_mix",
        "component_name": None,
        "dataset": ",".join(NAMES),
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


def in_force(workspace: Any, name: str) -> list[dict[str, Any]]:
    """Return the lines of a mixture's log that say which shares were in force."""
    return [line for line in lines(workspace, name) if "proportions" in line]


def cut_back(out: Path, step: int, rounds: int | None = None) -> Path:
    """Leave of a finished run what one that was killed behind a step has left; return its folder.

    Args:
        out: its output folder.
        step: the last checkpoint that stays.
        rounds: of so many the journal stays; None: all of it.
    """
    for folder in out.glob("checkpoint-*"):
        if int(folder.name.partition("-")[2]) > step:
            shutil.rmtree(folder)
    for path in (*out.glob("*model*.safetensors"), out / "trainer_state.json"):
        path.unlink(missing_ok=True)
    for path in out.glob("rounds/*.parquet"):
        if rounds is not None and int(path.stem.partition("-")[2]) >= rounds:
            path.unlink()
    return out


def note_drawn(patch: pytest.MonkeyPatch, note: Callable[[list[int]], object]) -> None:
    """Call `note` with the rows of every micro-batch when it is asked for."""
    from dataflex.trainers.rounds import _Batches  # a sampler that no name of the package leads to

    begin = _Batches.__iter__

    def noted(self: Any) -> Iterator[list[int]]:
        for rows in begin(self):
            note(rows)
            yield rows

    patch.setattr(_Batches, "__iter__", noted)


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def weigh(workspace: Any, name: str, method: str | None = "loss", params: Any = None, **keys: Any) -> Path:
    """Write a run file of three plain gradient steps over all weights, in which a wrong scale shows as it is.

    Without a method it is LLaMA-Factory's own training.
    """
    values: dict[str, Any] = {
        "train_type": "dynamic_weight" if method else "static",
        "component_name": method,
        "warmup_step": None,
        "update_step": None,
        "update_times": None,
        "max_steps": 3,
        "finetuning_type": "full",
        "lora_target": None,
        "lora_rank": None,
        "lora_dropout": None,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "save_steps": None,
        "eval_dataset": None,
        "dataflex": {"store": str(workspace.folder / "store"), "params": params or {}} if method else None,
    }
    return workspace.write(name, **{**values, **keys})


def shaped(shape: tuple[int, int], **keys: Any) -> dict[str, Any]:
    """Return keys of micro-batches of shape[0] rows, shape[1] to a step."""
    return {"per_device_train_batch_size": shape[0], "gradient_accumulation_steps": shape[1], **keys}


def logged(workspace: Any, name: str, key: str = "loss") -> list[float]:
    """Return what a run logged at each step."""
    state = json.loads((workspace.folder / "out" / name / "trainer_state.json").read_text("utf-8"))
    return [entry[key] for entry in state["log_history"] if key in entry]


def difference(workspace: Any, one: str, other: str) -> float:
    """Return how far the weights that two runs ended with lie apart, against how far the first has moved; 0 to 1."""
    from safetensors.torch import load_file

    first, second = workspace.weights(one), workspace.weights(other)
    begun = load_file(workspace.tiny.model / "model.safetensors")
    assert first.keys() == second.keys()
    moved = sum(float((first[k] - begun[k]).double().square().sum()) for k in first)
    apart = sum(float((first[k] - second[k]).double().square().sum()) for k in first)
    return math.sqrt(apart / moved)


def assert_alike(workspace: Any, one: str, other: str) -> None:
    """Hold losses and weights of two runs against each other: float32 sums in another order, nothing else."""
    np.testing.assert_allclose(logged(workspace, other), logged(workspace, one), rtol=2e-6)
    assert difference(workspace, one, other) < 2e-5
