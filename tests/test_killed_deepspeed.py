"""Under DeepSpeed a run on two processes that is killed goes on from its newest whole checkpoint, on the same rows."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from dataflex.stores.root import StoreRoot
from tests.mortal_processes import dying, script
from tests.processes import TORCHRUN, TWO, dataflex, ended, sharding
from tests.workspace import assert_equal_weights


@pytest.mark.slow
@pytest.mark.timeout(900)  # DeepSpeed compiles its communication first
@pytest.mark.parametrize("stage", [2, 3])
def test_killed_under_deepspeed_and_begun_again_it_ends_as_the_undisturbed_run(workspace: Any, stage: int) -> None:
    keys = {"deepspeed": sharding(workspace, stage), "use_cpu": None, "per_device_train_batch_size": 1}
    runs = {}
    for name in ("whole", "killed"):
        section = {"store": str(workspace.folder / f"store-{name}"), "params": {"proj_dim": 256}}
        runs[name] = workspace.write(name, dataflex=section, **keys)
    dataflex("train", runs["whole"], **TWO, DS_ACCELERATOR="cpu")
    command = [*TORCHRUN, script(workspace.folder), "train", str(runs["killed"])]
    status, said = ended(command, DS_ACCELERATOR="cpu", **dying("step", 9))  # in the first half of the fifth step
    assert status == -signal.SIGKILL, said[-4000:]
    out = workspace.folder / "out" / "killed"
    files = json.loads((out / "checkpoint-4" / "dataflex" / "complete.json").read_text("utf-8"))["files"]
    for rank in (0, 1):  # of both, in the one mark
        assert [name for name in files if name.endswith(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")], files
    assert workspace.rounds("killed")
    dataflex("train", runs["killed"], **TWO, DS_ACCELERATOR="cpu")
    assert workspace.rounds("killed") == workspace.rounds("whole")
    assert_equal_weights(workspace.weights("killed"), workspace.weights("whole"))
    assert StoreRoot(workspace.folder / "store-killed").states.infos() == []  # its checkpoints are pickles
