"""Workers: launches without a process group that fill one store together, as a job array has them."""

from __future__ import annotations

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex.errors import CoverageError
from dataflex.stores.leases import Lease
from dataflex.stores.root import StoreRoot
from tests.processes import environment
from tests.roots import stored

FOLDER = Path(__file__).parents[1] / "examples" / "cluster"


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


def ended(command: list[str], again: tuple[int, ...] = (), **env: str) -> tuple[int, str]:
    """Run a task, anew where it ends with a code that its scheduler tries again; return its last code and words."""
    while True:
        ran = subprocess.run(command, env=environment(**env), stderr=subprocess.PIPE, text=True, check=False)
        if ran.returncode not in again:
            return ran.returncode, ran.stderr


@pytest.mark.timeout(500)
@pytest.mark.slow
def test_tasks_of_schedulers_compute_every_row_once(workspace: Any) -> None:
    """Three at once with one output folder: two of SLURM's array, a pod of Kubernetes; the first warms up for all."""
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "fragment_rows": 4}
    run = [str(workspace.write("run", dataflex=section)), "seed=42"]
    job = yaml.safe_load((FOLDER / "featurize.k8s.yml").read_text("utf-8"))
    [container] = job["spec"]["template"]["spec"]["containers"]
    array = ["bash", str(FOLDER / "featurize.sbatch"), *run]
    with ThreadPoolExecutor() as pool:
        tasks = [
            *(pool.submit(ended, array, SLURM_ARRAY_TASK_ID=task, WAIT="1", STEP="") for task in "01"),
            pool.submit(ended, [*container["command"], *run], (6,), JOB_COMPLETION_INDEX="2"),
        ]
        codes, said = zip(*(task.result() for task in tasks), strict=True)
    assert codes == (0, 0, 0), said
    # Whoever came last wrote the summary of the folder; each has said what it did itself.
    done = [int(re.findall(r"features computed (\d+)", text)[-1]) for text in said]
    assert sum(done) == 69
    assert sum(store.rows for store in StoreRoot(workspace.folder / "store").stores()) == 69
    assert len(stored(workspace.folder / "store")) == 69
    found = json.loads((workspace.folder / "out" / "run" / "status_featurize.json").read_text("utf-8"))
    assert (found["state"], found["exit_code"]) == ("finished", 0)
