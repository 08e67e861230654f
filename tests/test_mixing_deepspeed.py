"""Weighted and observed losses under DeepSpeed on two processes are those without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import TWO, dataflex, sharding
from tests.workspace import logged

NAMES = "target_words,target_records,target_arithmetic"


@pytest.mark.slow
@pytest.mark.timeout(900)  # DeepSpeed compiles its communication first
@pytest.mark.parametrize(("stage", "name"), [(2, "documented"), (3, "equal")])
def test_equal_weights_and_statistics_under_deepspeed(workspace: Any, stage: int, name: str) -> None:
    """The weights of a weighter of either kind, and what a mixer sees, in both ways of sharding."""
    once: dict[str, Any] = {"dataset": NAMES, "eval_dataset": None, "lora_dropout": 0.0, "save_strategy": "no"}
    once |= {"warmup_step": None, "update_step": None, "update_times": None, "disable_shuffling": True}
    once |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_steps": None}
    sharded = {"deepspeed": sharding(workspace, stage), "use_cpu": None}

    def write(name: str, **keys: Any) -> Path:
        return workspace.write(name, **{**once, **keys})

    plain = write("plain", train_type="static", component_name=None, max_steps=4, dataflex=None, **sharded)
    uniform = {"params": {"strategy": "uniform"}}
    weighted = {"train_type": "dynamic_weight", "component_name": "loss", "train_step": 4}
    mixed = {"train_type": "dynamic_mix", "component_name": "odm", "train_step": 4}
    section = {"store": str(workspace.folder / "store")}
    dataflex("train", plain, **TWO, DS_ACCELERATOR="cpu")
    weighers: dict[str, dict[str, Any]] = {
        "equal": {"dataflex": {**section, **uniform}},
        "documented": {
            "component_name": "own_step",
            "dataflex": {**section, "plugins": ["tests.custom_weighter"]},
        },
    }
    dataflex("train", write(name, **{**weighted, **weighers[name], **sharded}), **TWO, DS_ACCELERATOR="cpu")
    dataflex("train", write("mixed", dataflex=section, **mixed, **sharded), **TWO, DS_ACCELERATOR="cpu")
    np.testing.assert_allclose(logged(workspace, name), logged(workspace, "plain"), rtol=1e-4)
    plain, found = workspace.weights("plain"), workspace.weights(name)
    for key, weight in plain.items():
        np.testing.assert_allclose(found[key], weight, atol=2e-3 * float(weight.abs().max()), err_msg=name)
    alone = write("alone", dataflex=section, **{**mixed, "gradient_accumulation_steps": 4})
    workspace.run("train", alone)
    shares = [
        [
            list(json.loads(line)["proportions"].values())
            for line in (workspace.folder / "out" / each / "mixture.jsonl").read_text("utf-8").splitlines()
        ]
        for each in ("alone", "mixed")
    ]
    np.testing.assert_allclose(shares[1], shares[0], rtol=1e-3)
