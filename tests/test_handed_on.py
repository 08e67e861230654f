"""Work of any number of processes is used, and finished, by any other number of them: to the same bits."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dataflex.launch import free_port
from dataflex.stores.root import StoreRoot
from tests.looked_at import faults
from tests.mortal_processes import dying, script
from tests.processes import ACCELERATE, TORCHRUN, TWO, ended, launch, launch_verbs, signalled
from tests.roots import stored

SPLIT = {
    1: {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    2: {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
}
"""The same global batch, on as many processes."""


def write(workspace: Any, name: str, store: str, processes: int, **keys: Any) -> Path:
    section = {"store": str(workspace.folder / store), "params": {"proj_dim": 256}, "fragment_rows": 8}
    section |= {"storage": "float32"} | keys.pop("section", {})
    return Path(workspace.write(name, dataflex=section, update_times=1, **SPLIT[processes], **keys))


def summary(workspace: Any, name: str, verb: str) -> dict[str, Any]:
    file = "dataflex_summary.json" if verb == "train" else f"dataflex_{verb}.json"
    return dict(json.loads((workspace.folder / "out" / name / file).read_text("utf-8")))


def featurize_by_accelerate(path: Path) -> list[str]:
    return [*ACCELERATE, "--main_process_port", str(free_port()), "-m", "dataflex.cli", "featurize", str(path)]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_one_process_featurized_two_reuse_and_the_other_way_round(workspace: Any) -> None:
    """Nothing is computed again, and what trains on it chooses the same rows: after a warm-up by either of them."""
    at_one = workspace.run("featurize", write(workspace, "one", "store-one", 1))
    assert at_one["computed"] == 69
    launch_verbs(
        workspace.folder,
        [
            ("featurize", write(workspace, "two", "store-two", 2)),
            ("featurize", write(workspace, "two-on-one", "store-one", 2)),
            ("train", write(workspace, "two-trains-one", "store-one", 2)),
            ("train", write(workspace, "two-trains-two", "store-two", 2)),
            ("select", write(workspace, "two-select-one", "store-one", 2)),
        ],
    )
    assert summary(workspace, "two", "featurize")["computed"] == 69
    assert workspace.run("featurize", write(workspace, "one-on-two", "store-two", 1))["computed"] == 0
    workspace.run("train", write(workspace, "one-trains-one", "store-one", 1))
    workspace.run("train", write(workspace, "one-trains-two", "store-two", 1))
    assert summary(workspace, "two-on-one", "featurize")["computed"] == 0
    for by in ("one", "two"):
        for name in (f"one-trains-{by}", f"two-trains-{by}"):
            found = summary(workspace, name, "train")
            assert (found["computed"], found["reused"]) == (0, 69), name
            assert [len(rows) for rows in workspace.rounds(name)] == [12, 8]
        assert workspace.rounds(f"two-trains-{by}") == workspace.rounds(f"one-trains-{by}")
    chosen = pq.read_table(workspace.folder / "out" / "two-select-one.parquet")["index"].to_pylist()
    assert sorted(chosen) == sorted(workspace.rounds("one-trains-one")[1])  # a round is shuffled


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_on_two_then_on_one_and_finished_on_two_the_features_are_those_of_one(workspace: Any) -> None:
    """In bfloat16, where a batch of other rows would give other bits."""
    whole = write(workspace, "whole", "whole", 1, bf16=True)
    assert workspace.run("featurize", whole)["computed"] == 69
    root = workspace.folder / "handed"
    # The end of the same warm-up: of another division of the batch it would differ in its last bits.
    shutil.copytree(workspace.folder / "whole" / "states", root / "states")
    on = {number: write(workspace, f"on{number}", "handed", number, bf16=True) for number in (1, 2)}
    begun = [0]
    for number, python in ((2, TORCHRUN), (1, [sys.executable])):
        command = [*python, script(workspace.folder), "featurize", str(on[number])]
        code, said = ended(command, **dying("cell", 2))
        assert code == -signal.SIGKILL, said[-4000:]
        begun.append(len(stored(root)))
        assert begun[-2] < begun[-1] < 69
    launch(featurize_by_accelerate(on[2]))
    assert summary(workspace, "on2", "featurize")["computed"] == 69 - begun[-1]
    assert stored(root) == stored(workspace.folder / "whole")
    for store in StoreRoot(root).stores():
        assert faults(store) == []
    assert workspace.run("featurize", on[1])["computed"] == 0


NAPPING = """
import time
from dataflex.access.fragments import Work

compute = Work.compute

def napping(self, *args):
    time.sleep(0.5)
    return compute(self, *args)

Work.compute = napping
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("launcher", "number"), [("dataflex", signal.SIGUSR1), ("accelerate", signal.SIGTERM)])
def test_a_signal_to_what_started_two_processes_ends_featurize_with_75_and_it_goes_on(
    workspace: Any, launcher: str, number: signal.Signals
) -> None:
    (workspace.folder / "napping.py").write_text(NAPPING)
    section = {"plugins": [str(workspace.folder / "napping.py")]}
    path = write(workspace, "run", "store", 2, warmup_step=0, section=section)
    started = [sys.executable, "-m", "dataflex.cli", "featurize", str(path)]
    command, env = (started, TWO) if launcher == "dataflex" else (featurize_by_accelerate(path), {})
    log = (workspace.folder / "store").glob
    code, said = signalled(command, number, lambda: len(list(log("*/log/*.json"))) >= 2, **env)
    assert code != 0, said[-4000:]
    found = json.loads((workspace.folder / "out" / "run" / "status_featurize.json").read_text("utf-8"))
    assert (found["state"], found["exit_code"]) == ("interrupted", 75), said[-4000:]
    assert found["message"].endswith("the same command computes the rest"), found
    assert "SIGKILL" not in said, said[-4000:]
    done = len(stored(workspace.folder / "store"))
    assert 0 < done < 69
    assert workspace.run("featurize", path)["computed"] == 69 - done
