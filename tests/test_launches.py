"""Launches that share one store, and ranks of one job: together they compute every row once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.launches import launched, synthetic
from dataflex.access.grid import SMALLEST
from dataflex.launch import free_port
from dataflex.stores.root import StoreRoot
from tests.processes import TORCHRUN, TWO, ended

CELLS = 40
ROOT = Path(__file__).resolve().parents[1]


def check(root: Path, cells: int = CELLS) -> None:
    """Every row is there once, with its value, and no lease is left."""
    (store,) = StoreRoot(root).stores()
    assert store.rows == cells * SMALLEST
    keys = np.unique(synthetic(cells * SMALLEST).keys)
    expected = keys.view(np.uint64).reshape(-1, 2)[:, 0] / 2**64
    assert (store.read(keys).scalars["loss_sum"] == expected).all()
    assert store.files.names(f"{store.folder}/tmp") == []


@pytest.mark.timeout(300)
def test_two_launches_compute_every_row_once(tmp_path: Path) -> None:
    rows = launched(str(tmp_path / "root"), 2, CELLS, 0.05, leases=True)
    assert sum(rows) == CELLS * SMALLEST
    assert min(rows) > 0
    check(tmp_path / "root")


@pytest.mark.timeout(300)
def test_without_leases_what_is_committed_first_is_kept(tmp_path: Path) -> None:
    rows = launched(str(tmp_path / "root"), 2, CELLS, 0.05, leases=False)
    assert CELLS * SMALLEST <= sum(rows) <= 1.3 * CELLS * SMALLEST  # 40 cells are few to go past each other in
    check(tmp_path / "root")


@pytest.mark.timeout(300)
def test_a_slow_rank_takes_fewer_cells(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [str(free_port()), "-m", "benchmarks.launches", str(tmp_path / "root"), "--worker"]
    command += ["--cells", str(CELLS), "--seconds", "0.05", "--slow-rank", "6"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    done = {line["rank"]: line["computed"] for line in map(json.loads, ran.stdout.splitlines())}
    assert done[0] + done[1] == CELLS * SMALLEST
    assert 0 < done[1] < done[0]
    check(tmp_path / "root")


GONE = """
import os, signal
from dataflex.access.fragments import Work
from dataflex.cli import main

real = Work.compute

def compute(self, cell, least, tally):
    real(self, cell, least, tally)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

Work.compute = compute
main()
"""


@pytest.mark.timeout(300)
def test_a_process_that_is_gone_ends_in_words_and_its_work_is_kept(workspace: Any) -> None:
    script = workspace.folder / "gone.py"
    script.write_text(GONE)
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "fragment_rows": 16}
    path = workspace.write("run", warmup_step=0, dataflex=section)
    code, said = ended([*TORCHRUN, str(script), "featurize", str(path)], **TWO)
    assert code != 0
    assert "the same command" in said, said[-4000:]
    assert "stay" in said, said[-4000:]
    own = said.partition("torch/distributed/run.py")[0].partition("ChildFailedError")[0]
    assert "Traceback" not in own.rpartition("dataflex: ")[0], said[-4000:]
    (store,) = StoreRoot(workspace.folder / "store").stores()
    assert store.rows > 0
    again = workspace.run("featurize", path)
    assert 0 < again["computed"] < 69
