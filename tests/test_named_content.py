"""What a run's parameters name is part of what its decisions are known by, by content and not by path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dataflex.fingerprint import model_digest
from tests.workspace import cut_back


def change(folder: Path) -> None:
    """Give a model's or adapter's weights other numbers."""
    (file,) = folder.glob("*model.safetensors")
    rng = np.random.default_rng(0)
    found = {k: v + rng.normal(0, 0.5, v.shape).astype(v.dtype) for k, v in load_file(file).items()}
    save_file(found, file, {"format": "pt"})


def about(workspace: Any, name: str, step: int) -> dict[str, Any]:
    """Return what a checkpoint says of its run."""
    mark = workspace.folder / "out" / name / f"checkpoint-{step}" / "dataflex" / "complete.json"
    return dict(json.loads(mark.read_text("utf-8"))["run"])


def test_sums_that_are_known_give_the_same_digest(tiny: Any, tmp_path: Path) -> None:
    assert model_digest(tiny.model, {"model.safetensors": "0"}) != model_digest(tiny.model)
    with pytest.raises(FileNotFoundError):
        model_digest(tmp_path, {"model.safetensors": "0"})


@pytest.mark.slow
def test_a_changed_baseline_replays_no_round_and_a_moved_one_does(workspace: Any) -> None:
    keys: dict[str, Any] = {"eval_dataset": None, "warmup_step": 1, "update_step": 1, "update_times": 1}
    section = {"store": str(workspace.folder / "store")}
    workspace.run("train", workspace.write("ref", component_name="random", **keys, dataflex=section))
    baseline = workspace.folder / "baseline"
    shutil.copytree(workspace.folder / "out" / "ref" / "checkpoint-2", baseline)
    shutil.rmtree(baseline / "dataflex")  # as LLaMA-Factory alone leaves it

    def trained(folder: Path) -> list[Any]:
        params = {"baseline": str(folder), "rule": "top_k"}
        path = workspace.write("run", component_name="delta_loss", **keys, dataflex={**section, "params": params})
        cut_back(workspace.folder / "out" / "run", 1)
        return list(workspace.run("train", path)["updates"])

    assert len(trained(baseline)) == 1
    moved = baseline.rename(workspace.folder / "moved")
    assert trained(moved) == []
    before = workspace.rounds("run")
    change(moved)
    assert len(trained(moved)) == 1
    assert workspace.rounds("run") != before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoints", "encoder", "reference", "own"])
def test_what_a_method_names_is_in_its_identity(workspace: Any, kind: str) -> None:
    folder = workspace.folder / "named"
    keys: dict[str, Any] = {"warmup_step": 0, "update_step": 1, "update_times": 1, "dataset": "pool,target_words"}
    section: dict[str, Any] = {"store": str(workspace.folder / "store")}
    if kind == "checkpoints":
        workspace.run("train", workspace.write("ref", component_name="random", **keys, dataflex=section))
        shutil.copytree(workspace.folder / "out" / "ref" / "checkpoint-1", folder)
        shutil.rmtree(folder / "dataflex")
        params: dict[str, Any] = {"proj_dim": 64, "gradient_type": "sgd", "checkpoints": [str(folder)]}
        keys["component_name"] = "less"
    else:
        shutil.copytree(workspace.tiny.model, folder)
    if kind == "encoder":
        params, keys["component_name"] = {"embedding_model_name_or_path": str(folder)}, "embedding"
    if kind == "reference":
        params = {"reference_model_path": str(folder), "reference": "live"}
        keys |= {"component_name": "doremi", "train_type": "dynamic_mix"}
    if kind == "own":
        file = workspace.folder / "own.py"
        file.write_text(
            "from dataflex.selectors import Selector\nclass Own(Selector):\n"
            "    def __init__(self, dataset, accelerator, data_collator, cache_dir, folder):\n"
            "        super().__init__(dataset, accelerator, data_collator, cache_dir)\n"
            "    def select(self, model, step_id, num_samples, **kwargs):\n        return list(range(num_samples))\n"
        )
        params, keys["component_name"] = {"folder": str(folder)}, f"{file}:Own"
    path = workspace.write("run", **keys, dataflex={**section, "params": params})
    seen = []
    for i in range(2):
        if i:
            change(folder)
            shutil.rmtree(workspace.folder / "out" / "run")
        workspace.run("train", path)
        seen.append(about(workspace, "run", 1))
    assert str(folder) not in json.dumps([seen[0]["params"], seen[0]["unnamed"]])
    assert seen[0]["params"] != seen[1]["params"]
    assert {k: v for k, v in seen[0].items() if k != "params"} == {k: v for k, v in seen[1].items() if k != "params"}
