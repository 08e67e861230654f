"""Mixing and weighting on one process and two: the same rows, and weights that differ by rounding."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_processes import environment

NAMES = ("target_words", "target_records", "target_arithmetic")
LAUNCHED = """
import json, os, sys
import torch
from dataflex.config import load
from dataflex.pipelines.train import train
from dataflex.trainers import rounds

torch.distributed.destroy_process_group = lambda *_: None  # LLaMA-Factory's last act; the next run needs the group
begin = rounds._Batches.__iter__
for path in sys.argv[1:]:
    settings = load(path)
    name = settings.llamafactory["output_dir"] + f"-drawn-{os.environ['RANK']}.jsonl"
    with open(name, "a") as file:
        def noted(self):
            for rows in begin(self):
                print(json.dumps(rows), file=file)
                yield rows
        rounds._Batches.__iter__ = noted
        train(settings)
"""
RUNS: dict[str, dict[str, Any]] = {
    "static": {"component_name": "static", "init_mixture_proportions": [3, 2, 1]},
    "odm": {"component_name": "odm"},
    "batches": {"component_name": "odm", "dataflex": {"params": {"variant": "paper", "batches": "single"}}},
    "both": {
        "component_name": "ado",
        "dataflex": {
            "params": {"ignore_steps": 1, "fit_interval": 2},
            "weighter": {"name": "loss", "params": {"normalisation": "batch"}},
        },
    },
}


def write(workspace: Any, name: str, method: str, **keys: Any) -> Path:
    own = dict(RUNS[method])
    section = {"store": str(workspace.folder / "store"), **own.pop("dataflex", {})}
    once: dict[str, Any] = {"dataset": ",".join(NAMES), "eval_dataset": None, "warmup_step": None, "update_step": None}
    once |= {"update_times": None, "train_step": 6, "lora_dropout": 0.0, "train_type": "dynamic_mix"}
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return workspace.write(name, **{**once, **batches, **own, **keys}, dataflex=section)  # type: ignore[no-any-return]


def launch(workspace: Any, *files: Path) -> None:
    several = workspace.folder / "several.py"
    several.write_text(LAUNCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29757"]
    arguments = [*command, str(several), *map(str, files)]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def steps(workspace: Any, name: str, ranks: int, per_step: int) -> list[list[int]]:
    """Return the rows of each step, sorted: the ranks' micro-batches of a step belong together."""
    files = [Path(f"{workspace.folder}/out/{name}-drawn-{rank}.jsonl") for rank in range(ranks)]
    parts = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    found = []
    for at in range(0, len(parts[0]), per_step):
        found.append(sorted(row for part in parts for batch in part[at : at + per_step] for row in batch))
    return found


def shares(workspace: Any, name: str) -> np.ndarray:
    text = (workspace.folder / "out" / name / "mixture.jsonl").read_text("utf-8").splitlines()
    found = {line["step"]: list(line["proportions"].values()) for line in map(json.loads, text) if "step" in line}
    return np.array([found[step] for step in sorted(found)])


@pytest.mark.timeout(400)
def test_two_processes_train_what_one_trains_and_either_resumes_the_other(
    workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataflex.trainers.rounds import _Batches

    begin = _Batches.__iter__

    def alone(name: str, method: str) -> None:
        path = write(workspace, name, method)
        with Path(f"{workspace.folder}/out/{name}-drawn-0.jsonl").open("a") as file:

            def noted(self: Any) -> Any:
                for rows in begin(self):
                    print(json.dumps(rows), file=file)
                    yield rows

            monkeypatch.setattr(_Batches, "__iter__", noted)
            workspace.run("train", path)

    (workspace.folder / "out").mkdir()
    for method in RUNS:
        alone(f"one-{method}", method)
    two = [write(workspace, f"two-{method}", method, gradient_accumulation_steps=1) for method in RUNS]
    # One process stops after step 2, two go on to step 4, one ends the run.
    changed = workspace.folder / "out" / "changed"
    shutil.copytree(workspace.folder / "out" / "one-odm", changed)
    for step in range(3, 7):
        shutil.rmtree(changed / f"checkpoint-{step}")
    middle = write(workspace, "changed", "odm", gradient_accumulation_steps=1)
    launch(workspace, *two, middle)
    for method in RUNS:
        one, other = steps(workspace, f"one-{method}", 1, 2), steps(workspace, f"two-{method}", 2, 1)
        assert len(one) == 6
        assert other == one, method
        np.testing.assert_allclose(shares(workspace, f"two-{method}"), shares(workspace, f"one-{method}"), rtol=1e-4)
        first, second = workspace.weights(f"one-{method}"), workspace.weights(f"two-{method}")
        for name, weight in first.items():
            np.testing.assert_allclose(second[name], weight, atol=2e-3 * float(weight.abs().max()), err_msg=method)
    assert steps(workspace, "changed", 2, 1) == steps(workspace, "one-odm", 1, 2)[2:]
    for step in (5, 6):
        shutil.rmtree(changed / f"checkpoint-{step}")
    Path(f"{workspace.folder}/out/changed-drawn-0.jsonl").unlink()
    alone("changed", "odm")
    assert steps(workspace, "changed", 1, 2) == steps(workspace, "one-odm", 1, 2)[4:]
    first, second = workspace.weights("one-odm"), workspace.weights("changed")
    for name, weight in first.items():
        np.testing.assert_allclose(second[name], weight, atol=2e-3 * float(weight.abs().max()))
