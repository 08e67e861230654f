"""Workers under Ray, on two CPUs: one is killed, one is asked to stop, and every row is computed all the same."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataflex.stores.root import StoreRoot
from dataflex.stores.upkeep.inspection import inspect
from tests.processes import environment, sharding

SCRIPT = Path(__file__).parents[1] / "examples" / "cluster" / "featurize_ray.py"
SAID = re.compile(r"pid=(\d+)\).*features computed (\d+), reused (\d+)")


HEAD = """
import ray, sys
context = ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
print(context.address_info["address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A cluster of Ray with two CPUs, whatever the machine has; the variables that a driver finds it by."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("there is no Ray; `pip install -e '.[dev]'` brings it")
    found = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    found["RAY_worker_niceness"] = "0"  # of 15 otherwise, which on a busy machine is next to nothing
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HEAD]  # a process of its own: beside a Ray at work LLaMA-Factory does other things
    for _ in range(6):
        with subprocess.Popen(
            command, env=environment(**found), stdin=pipe, stdout=pipe, stderr=pipe, text=True
        ) as head:
            assert head.stdin
            assert head.stdout
            assert head.stderr
            if address := head.stdout.readline().strip():
                yield found | {"RAY_ADDRESS": address}
                head.stdin.close()  # and with its end Ray's
                return
            said = head.stderr.read()
        assert "timed out during startup" in said, said  # Ray gives its own processes 30 seconds, on a busy machine too
    pytest.fail(said)


def started(cluster: dict[str, str], path: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(path), "--gpus", "0", "--wait", "0.2", "--ending", "300", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(**cluster), stdout=pipe, stderr=pipe, text=True)


def at_work(root: StoreRoot) -> list[int]:
    """Return the processes that hold a lease."""
    found = []
    for store in root.stores():
        for name in fnmatch.filter(store.files.names(f"{store.folder}/tmp"), "*.lease"):
            with contextlib.suppress(FileNotFoundError, ValueError):  # given back, or not written yet
                found.append(json.loads(store.files.read(f"{store.folder}/tmp/{name}"))["pid"])
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_a_killed_actor_was_at_is_computed_by_the_others(workspace: Any, cluster: dict[str, str]) -> None:
    from examples.quickstart import pool

    rows = pool.split("words", 1, pool=600, target=1, test=0, pretrain=0).pool
    target = pool.split("arithmetic", 1, pool=1, target=8, test=0, pretrain=0).target
    pool.write_datasets(workspace.folder / "data", {"pool": rows, "target": target})
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "fragment_rows": 4}
    data = {"dataset_dir": str(workspace.folder / "data"), "dataset": "pool", "eval_dataset": "target"}
    path = workspace.write("run", dataflex=section, **data)
    driver = started(cluster, path, "--workers", "2", "learning_rate=2e-3")
    root = StoreRoot(workspace.folder / "store")
    seen: list[int] = []
    while len(seen) < 2:
        assert driver.poll() is None, driver.communicate()
        seen += [pid for pid in at_work(root) if pid not in seen]
        time.sleep(0.02)
    first, second = seen  # the second has waited for the first one's warm-up
    os.kill(first, signal.SIGKILL)
    os.kill(second, signal.SIGTERM)
    assert sum(store.rows for store in root.stores()) < 608
    out, err = driver.communicate(timeout=700)
    assert driver.returncode == 0, err[-3000:]
    said = [tuple(map(int, found)) for found in SAID.findall(out + err)]
    assert {pid for pid, _, _ in said} - {first, second}  # Ray has started another for the one that was killed
    assert second in {pid for pid, _, _ in said}  # and called the one again that was asked to stop
    assert {computed + reused for _, computed, reused in said} == {608}
    assert sum(store.rows for store in root.stores()) == 608
    assert [part for part in inspect(root.files) if part.problems] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_a_worker_refuses_ends_the_driver_with_its_text_and_code(workspace: Any, cluster: dict[str, str]) -> None:
    path = workspace.write("run", deepspeed=sharding(workspace, 2))
    driver = started(cluster, path, "--workers", "1")
    _, err = driver.communicate(timeout=500)
    assert driver.returncode == 2, err
    assert "\ndataflex: featurize: found deepspeed in the run file" in err
    assert "Traceback" not in err
