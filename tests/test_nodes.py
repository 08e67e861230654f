"""Several launches that are one run, as on several nodes; and runs that go on with another number of processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.launch import free_port
from tests.processes import TWO, dataflex, environment
from tests.workspace import assert_equal_weights, cut_back

pytestmark = pytest.mark.slow

TOGETHER = {"per_device_train_batch_size": 1, "lora_dropout": 0.0}
ALONE = {"per_device_train_batch_size": 2, "lora_dropout": 0.0}
"""The same global batch of one process."""


def on_two_nodes(verb: str, path: Path) -> None:
    """Run a verb as two nodes of one process each do, by LLaMA-Factory's variables."""
    port = str(free_port())
    with tempfile.TemporaryFile("w+") as log:
        nodes = [
            subprocess.Popen(
                [sys.executable, "-m", "dataflex.cli", verb, str(path)],
                env=environment(
                    FORCE_TORCHRUN="1", NPROC_PER_NODE="1", NNODES="2", NODE_RANK=str(rank),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                ),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            codes = [node.wait(400) for node in nodes]
        finally:
            for node in nodes:
                node.kill()
        log.seek(0)
        assert codes == [0, 0], log.read()[-4000:]


@pytest.mark.timeout(600)
def test_two_nodes_train_as_one_node_of_two_processes_and_featurize_for_both(workspace: Any) -> None:
    here = workspace.write("here", **TOGETHER)
    there = workspace.write("there", **TOGETHER, dataflex={"store": str(workspace.folder / "other"), **params()})
    dataflex("train", here, **TWO)
    on_two_nodes("featurize", there)
    on_two_nodes("train", there)
    assert workspace.rounds("there") == workspace.rounds("here")
    assert_equal_weights(workspace.weights("there"), workspace.weights("here"))


def params() -> dict[str, Any]:
    return {"params": {"proj_dim": 256}, "fragment_rows": 64}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["less", "loss"])
def test_two_processes_then_one_then_two_choose_the_same_rows(workspace: Any, method: str) -> None:
    keys: dict[str, Any] = {"component_name": method}
    if method == "loss":
        keys |= {"eval_dataset": None, "dataflex": {"store": str(workspace.folder / "store")}}
    out = workspace.folder / "out"
    dataflex("train", workspace.write("two", **TOGETHER, **keys), **TWO)
    chosen = workspace.rounds("two")
    assert [len(rows) for rows in chosen] == [12, 8, 8]
    cut_back(shutil.copytree(out / "two", out / "changed"), 2, rounds=1)  # inside the warm-up
    workspace.run("train", workspace.write("changed", **ALONE, **keys))
    assert workspace.rounds("changed") == chosen
    cut_back(out / "changed", 4, rounds=2)  # inside the first update's rows
    dataflex("train", workspace.write("changed", **TOGETHER, **keys), **TWO)
    assert workspace.rounds("changed") == chosen
    first, second = workspace.weights("two"), workspace.weights("changed")
    for key, weight in first.items():
        np.testing.assert_allclose(second[key], weight, atol=2e-3 * float(weight.abs().max()), err_msg=key)
