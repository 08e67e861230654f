"""Launches that share one store, and ranks of one job: together they compute every row once."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.launches import launched, synthetic
from dataflex.access.grid import SMALLEST
from dataflex.stores.root import StoreRoot
from tests.processes import TORCHRUN, environment

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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_leases_what_is_committed_first_is_kept(tmp_path: Path) -> None:
    rows = launched(str(tmp_path / "root"), 2, CELLS, 0.05, leases=False)
    assert CELLS * SMALLEST <= sum(rows) <= 1.3 * CELLS * SMALLEST  # 40 cells are few to go past each other in
    check(tmp_path / "root")


HEEDING = """
import json, sys, time
import torch.distributed as dist
from benchmarks.launches import Sleeping, fill
from dataflex import distributed

compute = Sleeping.compute

def done(more):
    return distributed.store().add("test/done", more)

def heeding(self, *args):
    if distributed.rank() == 0:
        done(1)
        return compute(self, *args)
    until = min(done(0) + 3, 10**6)
    while done(0) < until:
        time.sleep(0.01)
    return compute(self, *args)

Sleeping.compute = heeding
dist.init_process_group("gloo")
computed = fill(sys.argv[1], int(sys.argv[2]), 0.0, True).computed
if distributed.rank() == 0:
    done(10**6)  # nobody waits any more
print(json.dumps([distributed.rank(), computed]))
distributed.barrier()
distributed.leave()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_that_does_one_cell_while_the_other_does_three_has_a_quarter_of_them(tmp_path: Path) -> None:
    """Whatever the clock says: the slow one waits at each of its cells until the other has done three more."""
    (tmp_path / "heeding.py").write_text(HEEDING)
    command = [*TORCHRUN, str(tmp_path / "heeding.py"), str(tmp_path / "root"), str(CELLS)]
    ran = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    done = dict(map(json.loads, ran.stdout.splitlines()))
    assert done[0] + done[1] == CELLS * SMALLEST
    assert SMALLEST <= done[1] <= (CELLS // 4 + 1) * SMALLEST
    check(tmp_path / "root")
