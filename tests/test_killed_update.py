"""A run that is killed between the cells of an update, and begun again, ends as an undisturbed one: bit for bit.

In bfloat16, where a batch of other rows gives other bits, and with several cells per update.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dataflex.stores.root import StoreRoot
from tests.processes import ended

KILLED = """
import os, signal
from dataflex.access.fragments import Work
from dataflex.cli import main

left = int(os.environ["CELLS"])
real = Work.compute

def compute(self, cell, least, tally):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return real(self, cell, least, tally)

Work.compute = compute
main()
"""


@pytest.fixture
def data(tmp_path: Path, tiny: Any) -> dict[str, Any]:
    """272 rows of many lengths, in five cells of the grid, and a target set."""
    from examples.quickstart import pool

    sets = [pool.split(name, 1, pool=91, target=8, test=0, pretrain=0) for name in ("arithmetic", "words", "records")]
    rows = [dict(row) for some in sets for row in some.pool][:272]
    pool.write_datasets(tmp_path / "data", {"many": rows, "target": sets[0].target})
    return {"dataset_dir": str(tmp_path / "data"), "dataset": "many", "eval_dataset": "target", "bf16": True}


def stored(folder: Path) -> dict[tuple[str, bytes], bytes]:
    """Return every value of every store, by store and key."""
    found: dict[tuple[str, bytes], bytes] = {}
    for store in StoreRoot(folder).stores():
        for block in store.scan():
            numbers = block.scalars["loss_sum"] if block.vectors is None else block.vectors
            found |= {(store.folder, k.tobytes()): v.tobytes() for k, v in zip(block.keys, numbers, strict=True)}
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cells", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)])
def test_killed_and_begun_again_equals_undisturbed(workspace: Any, data: dict[str, Any], cells: int) -> None:
    keys = {**data, "update_times": 2, "warmup_step": 2}
    runs = {}
    for name in ("whole", "killed"):
        section = {"store": str(workspace.folder / f"store-{name}"), "params": {"proj_dim": 256}}
        runs[name] = workspace.write(name, dataflex=section, **keys)
    workspace.run("train", runs["whole"])
    script = workspace.folder / "killed.py"
    script.write_text(KILLED)
    status, said = ended([sys.executable, str(script), "train", str(runs["killed"])], CELLS=str(cells))
    assert status == -signal.SIGKILL, said[-3000:]
    half = stored(workspace.folder / "store-killed")
    assert half
    again = workspace.run("train", runs["killed"])
    assert again["reused"] > 0
    whole = stored(workspace.folder / "store-whole")
    assert len(half) < len(whole)
    assert stored(workspace.folder / "store-killed") == whole
    assert workspace.rounds("killed") == workspace.rounds("whole")
    before, after = workspace.weights("whole"), workspace.weights("killed")
    assert all(torch.equal(before[name], after[name]) for name in before)
