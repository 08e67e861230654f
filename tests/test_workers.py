"""Workers: launches without a process group that fill one store together, as a job array has them."""

from __future__ import annotations

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dataflex.errors import CoverageError
from dataflex.stores.leases import Lease
from dataflex.stores.root import StoreRoot
from tests.processes import environment
from tests.roots import stored

SCRIPT = Path(__file__).parents[1] / "examples" / "cluster" / "featurize.sbatch"


def test_a_worker_does_not_warm_up(workspace: Any) -> None:
    from dataflex.config import load
    from dataflex.pipelines.featurize import featurize

    path = workspace.write("run")
    with pytest.raises(CoverageError, match="--worker: found no kept state of the end of the warm-up under"):
        featurize(load(path, []), is_worker=True)
    workspace.run("featurize", path, "dataflex.nonfinite_limit=0.5")  # another launch has, and has computed all
    featurize(load(path, []), is_worker=True)
    summary = json.loads((workspace.folder / "out" / "run" / "dataflex_featurize.json").read_text("utf-8"))
    assert (summary["computed"], summary["reused"]) == (0, 69)


@pytest.mark.parametrize("leases", [True, False])
def test_no_lease_is_taken_where_the_run_file_says_so(
    workspace: Any, leases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Lease] = []
    real = Lease.take

    def take(lease: Lease) -> bool:
        taken.append(lease)
        return real(lease)

    monkeypatch.setattr(Lease, "take", take)
    path = workspace.write("run", warmup_step=0)
    assert workspace.run("featurize", path, f"dataflex.leases={leases}".lower())["computed"] == 69
    assert bool(taken) == leases


@pytest.mark.timeout(500)
@pytest.mark.slow
def test_the_job_array_computes_every_row_once(workspace: Any) -> None:
    """Its body, as three tasks at once with one output folder: two wait for the first one's warm-up."""
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "fragment_rows": 4}
    path = workspace.write("run", dataflex=section)
    tasks = [
        subprocess.Popen(
            ["bash", str(SCRIPT), str(path), "seed=42"],
            env=environment(SLURM_ARRAY_TASK_ID=str(task), WAIT="1", STEP=""),
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in (0, 1, 2)
    ]
    with ThreadPoolExecutor() as pool:  # all are read at once: none may wait for a reader
        said = list(pool.map(lambda task: task.communicate()[1], tasks))
    assert [task.returncode for task in tasks] == [0, 0, 0], said
    # Whoever came last wrote the summary of the folder; each has said what it did itself.
    done = [int(re.findall(r"features computed (\d+)", text)[-1]) for text in said]
    assert sum(done) == 69
    assert sum(store.rows for store in StoreRoot(workspace.folder / "store").stores()) == 69
    assert len(stored(workspace.folder / "store")) == 69
    found = json.loads((workspace.folder / "out" / "run" / "status_featurize.json").read_text("utf-8"))
    assert (found["state"], found["exit_code"]) == ("finished", 0)
