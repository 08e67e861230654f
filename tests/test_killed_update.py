"""A run that is killed between the cells of an update, and begun again, ends as an undisturbed one: bit for bit.

In bfloat16, where a batch of other rows gives other bits, and with several cells per update.
"""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.mortal_processes import dying, script
from tests.processes import TORCHRUN, TWO, dataflex, ended, launch_several
from tests.roots import stored
from tests.workspace import assert_equal_weights


@pytest.fixture
def data(tmp_path: Path, tiny: Any) -> dict[str, Any]:
    """272 rows of many lengths, in five cells of the grid, and a target set."""
    from examples.quickstart import pool

    sets = [pool.split(name, 1, pool=91, target=8, test=0, pretrain=0) for name in ("arithmetic", "words", "records")]
    rows = [dict(row) for some in sets for row in some.pool][:272]
    pool.write_datasets(tmp_path / "data", {"many": rows, "target": sets[0].target})
    return {"dataset_dir": str(tmp_path / "data"), "dataset": "many", "eval_dataset": "target", "bf16": True}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_begun_again_equals_undisturbed(workspace: Any, data: dict[str, Any]) -> None:
    """After one cell of the first update, and in the second."""
    runs = write(workspace, data)
    workspace.run("train", runs["whole"])
    for cells in (1, 7):
        command = [sys.executable, script(workspace.folder), "train", str(runs["killed"])]
        status, said = ended(command, **dying("cell", cells))
        assert status == -signal.SIGKILL, said[-3000:]
        half = stored(workspace.folder / "store-killed")
        again = workspace.run("train", runs["killed"])
        assert again["reused"] > 0
        assert_as_whole(workspace, half)
        shutil.rmtree(workspace.folder / "store-killed")
        shutil.rmtree(workspace.folder / "out" / "killed")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_that_are_killed_and_begun_again_end_as_two_undisturbed_ones(
    workspace: Any, data: dict[str, Any]
) -> None:
    """Both, and what started them, while one is between two cells of an update."""
    runs = write(workspace, data, per_device_train_batch_size=1)
    launch_several(workspace.folder, [runs["whole"]])
    command = [*TORCHRUN, script(workspace.folder), "train", str(runs["killed"])]
    status, said = ended(command, **dying("cell", 2))
    assert status == -signal.SIGKILL, said[-3000:]
    half = stored(workspace.folder / "store-killed")
    dataflex("train", runs["killed"], **TWO)
    assert_as_whole(workspace, half)


def write(workspace: Any, data: dict[str, Any], **more: Any) -> dict[str, Path]:
    """Write two run files that differ in where they write to."""
    keys = {**data, "update_times": 2, "warmup_step": 2, **more}
    runs = {}
    for name in ("whole", "killed"):
        section = {"store": str(workspace.folder / f"store-{name}"), "params": {"proj_dim": 256}}
        runs[name] = workspace.write(name, dataflex=section, **keys)
    return runs


def assert_as_whole(workspace: Any, half: dict[tuple[str, bytes], bytes]) -> None:
    """Hold what was killed and begun again against what was not; `half` of it had been there in between."""
    whole = stored(workspace.folder / "store-whole")
    assert 0 < len(half) < len(whole)
    assert stored(workspace.folder / "store-killed") == whole
    assert workspace.rounds("killed") == workspace.rounds("whole")
    assert_equal_weights(workspace.weights("killed"), workspace.weights("whole"))
