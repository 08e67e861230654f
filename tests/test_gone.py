"""Of several processes one is gone, or fails: the others end soon and say so, and the same command goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from dataflex.faults import is_of_a_lost_process, told
from tests.mortal_processes import by_hand, dying, script
from tests.processes import TORCHRUN, TWO, ended
from tests.roots import stored

FOREVER = 180000000
"""The `ddp_timeout` of LLaMA-Factory's examples, in seconds: nobody may wait for who is known to be gone."""


def write(workspace: Any, **keys: Any) -> Path:
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "fragment_rows": 8}
    return Path(workspace.write("run", dataflex=section, ddp_timeout=FOREVER, **keys))


def status(workspace: Any, name: str) -> tuple[str, int, str]:
    found = json.loads((workspace.folder / "out" / "run" / f"{name}.json").read_text("utf-8"))
    return found["state"], found["exit_code"], found["message"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_that_is_gone_ends_in_words_and_its_work_is_kept(workspace: Any) -> None:
    path = write(workspace, warmup_step=0)
    command = [*TORCHRUN, script(workspace.folder), "featurize", str(path)]
    code, said = ended(command, **TWO, **dying("cell", 1, who="1"))
    assert code != 0
    assert "the same command" in said, said[-4000:]
    assert "stay" in said, said[-4000:]
    own = said.partition("torch/distributed/run.py")[0].partition("ChildFailedError")[0]
    assert "Traceback" not in own.rpartition("dataflex: ")[0], said[-4000:]
    assert status(workspace, "status_featurize")[1] == 75
    done = len(stored(workspace.folder / "store"))
    assert 0 < done
    again = workspace.run("featurize", path)
    assert again["computed"] == 69 - done


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("verb", "where", "who", "how"),
    [("featurize", "cell", 0, "killed"), ("featurize", "cell", 1, "raises"), ("train", "step", 1, "killed")],
)
def test_the_other_ends_by_itself_where_no_launcher_ends_it(
    workspace: Any, verb: str, where: str, who: int, how: str
) -> None:
    """Rank 0 holds the store that tickets are drawn from, which is gone with it."""
    path = write(workspace, per_device_train_batch_size=1, **({"warmup_step": 0} if verb == "featurize" else {}))
    ranks = by_hand([script(workspace.folder), verb, str(path)], **dying(where, 2, str(who), how, nap=0.3))
    (gone, why), (left, said) = ranks[who], ranks[1 - who]
    assert gone == {"killed": -signal.SIGKILL, "raises": 1}[how], why[-4000:]
    assert left == 75, said[-4000:]
    assert "Traceback" not in said, said[-4000:]
    assert "another process of this run is gone" in said, said[-4000:]
    found = status(workspace, "status" if verb == "train" else f"status_{verb}")
    if how == "raises":
        assert found == ("failed", 1, "RuntimeError('out of order')")
    else:
        assert found[:2] == ("failed", 75)
        assert "run the same command again" in found[2]
    done = len(stored(workspace.folder / "store"))
    again = workspace.run(verb, path, "per_device_train_batch_size=2")  # on one process now
    if verb == "featurize":
        assert 0 < done < 69
        assert again["computed"] == 69 - done
    else:
        assert [len(rows) for rows in workspace.rounds("run")] == [12, 8, 8]


@pytest.mark.parametrize(
    "text",
    [
        "[pair.cc:534] gloo/transport/tcp/pair.cc: Connection closed by peer [127.0.0.1]:1",
        "Connection reset by peer",  # by the store of torch.distributed
        "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "failed to send, got -1 bytes",
        "Broken pipe",
    ],
)
def test_what_gloo_and_the_store_say_of_a_process_that_is_gone_is_understood(text: str) -> None:
    from torch.distributed import DistNetworkError

    found = told(DistNetworkError(text))
    assert found is not None
    assert found[1] == 75
    assert not is_of_a_lost_process(OSError(104, "Connection reset by peer"))  # a server
    assert told(DistNetworkError("The server socket has failed to listen on any local network address")) is None
