"""Mixing and weighting on one process, on two, and on one again train the same rows; weights differ by rounding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import processes
from tests.workspace import NAMES, cut_back, in_force, logged, note_drawn

LAUNCHED = """
import json, os, sys
import pytest
from dataflex import distributed
from dataflex.config import load
from dataflex.pipelines.train import train
from tests.workspace import note_drawn

distributed.prepare()
for path in sys.argv[1:]:
    settings = load(path)
    name = settings.llamafactory["output_dir"] + f"-drawn-{os.environ['RANK']}.jsonl"
    with open(name, "a") as file, pytest.MonkeyPatch.context() as patch:
        note_drawn(patch, lambda rows: print(json.dumps(rows), file=file))
        train(settings)
distributed.leave()
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
    "random": {"component_name": "random", "update_step": 1, "update_times": -1},
    "doremi": {"component_name": "doremi", "dataflex": {"params": {"reference": "stored"}}},  # after static
}
WEIGHTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "loss": ("loss", {"normalisation": "batch"}),
    # Anchors of step 3 are in force where a run is resumed at 4, and those of step 0 at 2.
    "adapt": ("adapt", {"tau": 0.5, "refresh_interval": 3, "anchor_batch_size": 3}),
    "feature": ("feature", {"feature": {"kind": "loss"}, "function": "rank"}),
}
TWO = {
    False: {"gradient_accumulation_steps": 1},
    # A weighter compares the examples of a micro-batch on all ranks: as many of them, on two ranks.
    True: {"per_device_train_batch_size": 1},
}


def write(workspace: Any, name: str, method: str, **keys: Any) -> Path:
    """Write a run file of 6 steps of 4 rows; each run has a store of its own."""
    if method in WEIGHTERS:
        component, params = WEIGHTERS[method]
        own: dict[str, Any] = {"train_type": "dynamic_weight", "component_name": component}
        own |= {"eval_dataset": "target_words" if component == "adapt" else None, "dataflex": {"params": params}}
    else:
        own = dict(RUNS[method])
    section = {"store": str(workspace.folder / f"store-{name}"), **own.pop("dataflex", {})}
    if method == "doremi":
        section["params"] = section["params"] | {"reference_model_path": str(workspace.folder / "out" / "one-static")}
    once: dict[str, Any] = {"dataset": ",".join(NAMES), "eval_dataset": None, "warmup_step": None, "update_step": None}
    once |= {"update_times": None, "train_step": 6, "lora_dropout": 0.0, "train_type": "dynamic_mix"}
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return workspace.write(name, **{**once, **batches, **own, **keys}, dataflex=section)


def alone(workspace: Any, name: str, method: str) -> None:
    """Train on one process; note the rows drawn as LAUNCHED does."""
    path = write(workspace, name, method)
    with Path(f"{workspace.folder}/out/{name}-drawn-0.jsonl").open("w") as file, pytest.MonkeyPatch.context() as patch:
        note_drawn(patch, lambda rows: print(json.dumps(rows), file=file))
        workspace.run("train", path)


def launch(workspace: Any, files: Iterable[Path]) -> None:
    """Train run files one after the other on two processes, which are started once."""
    several = workspace.folder / "several.py"
    several.write_text(LAUNCHED)
    processes.launch([*processes.TORCHRUN, str(several), *map(str, files)])


def drawn(workspace: Any, name: str, rank: int) -> list[list[int]]:
    """Return the rows of each micro-batch of a rank."""
    text = Path(f"{workspace.folder}/out/{name}-drawn-{rank}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def steps(workspace: Any, name: str, ranks: int, per_step: int) -> list[list[int]]:
    """Return the rows of each step, sorted: the ranks' micro-batches of a step belong together."""
    parts = [drawn(workspace, name, rank) for rank in range(ranks)]
    found = []
    for at in range(0, len(parts[0]), per_step):
        found.append(sorted(row for part in parts for batch in part[at : at + per_step] for row in batch))
    return found


def recorded(workspace: Any, name: str, key: str) -> np.ndarray:
    """Return what a run has in force for its domains at each step, (steps, domains)."""
    found = {line["step"]: list(line[key].values()) for line in in_force(workspace, name)}
    return np.array([found[step] for step in sorted(found)])


def assert_as_one(workspace: Any, method: str, name: str) -> None:
    """Hold a run's weights, losses and shares of all steps against those of the run on one process."""
    one = f"one-{method}"
    first, second = workspace.weights(one), workspace.weights(name)
    assert first.keys() == second.keys()
    assert first
    for key, weight in first.items():
        np.testing.assert_allclose(second[key], weight, atol=2e-3 * float(weight.abs().max()), err_msg=name)
    keys = ["loss", "dataflex/weight_max"] if method in (*WEIGHTERS, "both") else ["loss"]
    for key in keys:
        expected = logged(workspace, one, key)
        assert len(expected) == 6
        np.testing.assert_allclose(logged(workspace, name, key), expected, rtol=1e-3, err_msg=f"{name}: {key}")
    if "dataflex/weight_max" in keys:
        assert max(abs(weight - 1) for weight in logged(workspace, one, "dataflex/weight_max")) > 0.01
    if method in RUNS:
        for key in ["proportions", "alpha"] if method == "doremi" else ["proportions"]:
            shares = recorded(workspace, one, key)
            np.testing.assert_allclose(recorded(workspace, name, key), shares, rtol=1e-4, err_msg=f"{name}: {key}")


def assert_chain(workspace: Any, methods: Sequence[str]) -> None:
    """Train on one process; on two; and on one up to step 2, on two up to step 4, on one to the end."""
    out = workspace.folder / "out"
    out.mkdir()
    files = []
    for method in methods:
        alone(workspace, f"one-{method}", method)
        cut_back(shutil.copytree(out / f"one-{method}", out / f"changed-{method}"), 2)
        for name in (f"two-{method}", f"changed-{method}"):
            files.append(write(workspace, name, method, **TWO[method in WEIGHTERS]))
    launch(workspace, files)
    for method in methods:
        two, changed = f"two-{method}", f"changed-{method}"
        assert_as_one(workspace, method, two)
        assert_as_one(workspace, method, changed)
        if method in RUNS:
            rows = steps(workspace, f"one-{method}", 1, 2)
            assert len(rows) == 6
            assert steps(workspace, two, 2, 1) == rows, method
            assert steps(workspace, changed, 2, 1) == rows[2:], method
        cut_back(out / changed, 4)
        alone(workspace, changed, method)
        assert_as_one(workspace, method, changed)
        if method in RUNS:
            assert steps(workspace, changed, 1, 2) == rows[4:], method


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_every_mixer_and_weighter_goes_on_with_another_number_of_processes(workspace: Any) -> None:
    """And whole batches of one domain are so on every rank."""
    assert_chain(workspace, [*RUNS, *WEIGHTERS])
    for name, ranks, count in (("one-batches", 1, 12), ("two-batches", 2, 6), ("changed-batches", 1, 4)):
        for rank in range(ranks):
            found = drawn(workspace, name, rank)
            assert len(found) == count
            assert all(len(rows) == 2 and len({row // 8 for row in rows}) == 1 for rows in found)
