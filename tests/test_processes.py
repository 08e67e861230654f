"""Two processes give the features and rows of one, resume, stop together, and finish what a killed one began."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dataflex.checkpoints.marks import incomplete_reason, mark_complete
from dataflex.config import load
from dataflex.features.adam import Moments
from dataflex.launch import free_port
from dataflex.stores.root import StoreRoot
from tests.looked_at import problems
from tests.processes import (
    TORCHRUN,
    TWO,
    dataflex,
    ended,
    environment,
    launch,
    launch_several,
    sharding,
    signalled,
)
from tests.workspace import assert_equal_weights, cut_back

ENDING = """
import atexit, contextlib, os, sys
from pathlib import Path
from dataflex.cli import main

@atexit.register
def tell():
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            names.append((task / "comm").read_text().strip())
    (Path(__file__).parent / f"{sys.argv[1]}-{os.environ['RANK']}").write_text(" ".join(names))

main()
"""


def ending(folder: Path) -> str:
    """Write a script that is `dataflex` and leaves the names of its threads at exit; return its path."""
    path = folder / "ending.py"
    path.write_text(ENDING)
    return str(path)


def gloo_left(folder: Path, verb: str) -> list[str]:
    """Return the threads of gloo that both processes of a verb had left when the interpreter began to end."""
    return [name for rank in "01" for name in (folder / f"{verb}-{rank}").read_text().split() if "gloo_run" in name]


def values(store: Path) -> dict[tuple[str, bytes], np.ndarray]:
    """Return every vector under a root, or the sum of a loss, by feature and row key."""
    found: dict[tuple[str, bytes], np.ndarray] = {}
    for each in StoreRoot(store).stores():
        assert problems(each) == []
        for block in each.scan():
            numbers = block.scalars["loss_sum"] if block.vectors is None else block.vectors
            kind = json.dumps(each.recipe["feature"], sort_keys=True)
            found |= {(kind, k.tobytes()): v for k, v in zip(block.keys, numbers, strict=True)}
    return found


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_two_processes_featurize_as_one_and_either_finishes_the_others_work(workspace: Any) -> None:
    """Features at given checkpoints, where the state is the same whatever the processes."""
    made = workspace.write("made", component_name="random", lora_dropout=0.0, update_times=1, dataflex=None)
    workspace.run("train", made)
    params = {"proj_dim": 256, "checkpoints": [str(workspace.folder / "out" / "made" / "checkpoint-5")]}
    runs = {}
    for name in ("one", "two"):
        section = {"store": str(workspace.folder / name), "params": params, "fragment_rows": 16, "storage": "float32"}
        runs[name] = workspace.write(name, dataflex=section)
    workspace.run("featurize", runs["one"])
    accelerate = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]  # --cpu would start one
    port = ["--main_process_port", str(free_port())]
    launch([sys.executable, "-m", *accelerate, *port, ending(workspace.folder), "featurize", str(runs["two"])])
    assert gloo_left(workspace.folder, "featurize") == []
    one, two = values(workspace.folder / "one"), values(workspace.folder / "two")
    assert one.keys() == two.keys()
    assert len(one) == 61 + 8
    for key in one:
        np.testing.assert_allclose(two[key], one[key], atol=1e-5 * np.abs(one[key]).max())
    # Half of a store made by two processes is finished by one.
    gradient = max(StoreRoot(workspace.folder / "two").stores(), key=lambda store: store.rows)
    lost = sorted((Path(gradient.path) / "log").glob("*.json"))[0]
    lost.unlink()
    summary = workspace.run("featurize", runs["two"])
    assert 0 < summary["computed"] < 61
    assert values(workspace.folder / "two").keys() == one.keys()


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_two_processes_train_the_same_rows_and_resume_inside_a_round(workspace: Any) -> None:
    path = workspace.write("two", per_device_train_batch_size=1, lora_dropout=0.1)
    launch([*TORCHRUN, ending(workspace.folder), "train", str(path)])
    assert gloo_left(workspace.folder, "train") == []
    out = workspace.folder / "out"
    assert [len(rows) for rows in workspace.rounds("two")] == [12, 8, 8]
    cut_back(shutil.copytree(out / "two", out / "resumed"), 4, rounds=2)
    dataflex("train", workspace.write("resumed", per_device_train_batch_size=1, lora_dropout=0.1), **TWO)
    assert workspace.rounds("resumed") == workspace.rounds("two")
    assert_equal_weights(workspace.weights("resumed"), workspace.weights("two"))
    # One process with the same global batch warms up on the same rows.
    one = workspace.run("train", workspace.write("one", per_device_train_batch_size=2, lora_dropout=0.1))
    assert workspace.rounds("one")[0] == workspace.rounds("two")[0]
    # What they say of the first update is of all rows, whoever has read them.
    two, resumed = (json.loads((out / n / "dataflex_summary.json").read_text()) for n in ("two", "resumed"))
    assert resumed["diagnostics"] == two["diagnostics"]
    assert (one["diagnostics"][0]["scored"], two["diagnostics"][0]["scored"]) == (62, 62)
    shares = [summary["diagnostics"][0]["common_direction"]["gradient"] for summary in (one, two)]
    assert shares[0] == pytest.approx(shares[1], abs=0.02)


STOPPED = """
import os, signal, sys
from dataflex.cli import main
from dataflex.access.sources import ModelSource
from dataflex.trainers.trainer import DataflexTrainer

where, step = os.environ["STOP_AT"], int(os.environ["STOP_STEP"])

def sends(owner, name, is_time):
    real = getattr(owner, name)
    def first(self, *args, **kwargs):
        if os.environ["RANK"] == os.environ["STOP_RANK"] and is_time(self):
            os.kill(os.getppid() if where == "launcher" else os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)
    setattr(owner, name, first)

if where == "update":
    trained = []
    real = DataflexTrainer.training_step
    def noted(self, *args, **kwargs):
        trained.append(self.state.global_step)
        return real(self, *args, **kwargs)
    DataflexTrainer.training_step = noted
    sends(ModelSource, "compute", lambda _: trained[-1:] == [step - 1])
else:
    sends(DataflexTrainer, "training_step", lambda trainer: trainer.state.global_step == step)
main()
"""


def stopped(space: Any, name: str, where: str, step: int, rank: int) -> tuple[int, str]:
    """Train a run file on two processes, one of which sends a signal at a step; return exit code and output."""
    keys = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "dataloader_num_workers": 1}
    section = {"store": str(space.folder / f"store-{name}"), "params": {"proj_dim": 256}, "fragment_rows": 16}
    path = space.write(name, save_strategy="no", dataflex=section, **keys)
    script = space.folder / "stopped.py"
    script.write_text(STOPPED)
    command = [*TORCHRUN, str(script), "train", str(path)]
    return ended(command, STOP_AT=where, STOP_STEP=str(step), STOP_RANK=str(rank), **TWO)


@pytest.fixture(scope="module")
def through(tiny: Any, tmp_path_factory: pytest.TempPathFactory, workspace_class: Any) -> Any:
    """A run of seven steps on two processes that nothing stops."""
    space = workspace_class(tmp_path_factory.mktemp("through"), tiny)
    code, said = stopped(space, "run", "step", -1, 0)
    assert code == 0, said[-4000:]
    return space


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("where", "step", "rank", "saved", "goes_on"),
    [("step", 1, 1, 2, True), ("step", 5, 0, 6, False), ("update", 3, 1, 3, True), ("launcher", 4, 0, 5, False)],
)
def test_a_signal_to_one_process_stops_both_at_the_same_step(
    workspace: Any, through: Any, where: str, step: int, rank: int, saved: int, goes_on: bool
) -> None:
    """In the first of two micro-batches, inside an update, and by the launcher, which signals loaders' workers too."""
    code, said = stopped(workspace, "run", where, step, rank)
    assert code != 0, said[-4000:]
    out = workspace.folder / "out" / "run"
    status = json.loads((out / "status.json").read_text("utf-8"))
    assert (status["state"], status["exit_code"]) == ("interrupted", 75), said[-4000:]
    assert status["message"].endswith(f"goes on from step {saved}, no step is done again"), said[-4000:]
    assert [folder.name for folder in out.glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    assert incomplete_reason(out / f"checkpoint-{saved}") is None
    assert "SIGKILL" not in said, said[-4000:]
    if not goes_on:  # the checkpoint is whole, and one of its kind is gone on from in another case
        return
    code, said = stopped(workspace, "run", "step", -1, 0)
    assert code == 0, said[-4000:]
    assert workspace.rounds("run") == through.rounds("run")
    assert_equal_weights(workspace.weights("run"), through.weights("run"))


ALONE = """
import os
from dataflex.cli import main
from dataflex.errors import CoverageError
from dataflex.trainers.trainer import DataflexTrainer

real = DataflexTrainer.training_step

def step(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.state.global_step == 1:
        raise CoverageError("rank 1 lacks rows")
    return real(self, *args, **kwargs)

DataflexTrainer.training_step = step
main()
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_status_says_what_one_process_alone_failed_of(workspace: Any) -> None:
    """Whether the other meets a broken connection or is ended by the launcher."""
    script = workspace.folder / "failing.py"
    script.write_text(ALONE)
    path = workspace.write("run", per_device_train_batch_size=1)
    code, said = ended([*TORCHRUN, str(script), "train", str(path)], **TWO)
    assert code != 0, said[-4000:]
    status = json.loads((workspace.folder / "out" / "run" / "status.json").read_text("utf-8"))
    found = (status["state"], status["exit_code"], status["message"])
    assert found == ("failed", 6, "rank 1 lacks rows"), said[-4000:]


NODE = """
import os, sys
import torch.distributed as dist
from dataflex.checkpoints.marks import agreed

dist.init_process_group("gloo")
print(agreed(sys.argv[1]))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_checkpoint_counts_if_it_is_whole_on_every_node(tmp_path: Path) -> None:
    """Two processes as of two nodes with a disk each: one lacks the newest, the other has the one before damaged."""
    nodes = [tmp_path / name / "run" for name in "ab"]
    for node in nodes:
        for step in (1, 2, 3, 4):
            (node / f"checkpoint-{step}").mkdir(parents=True)
            (node / f"checkpoint-{step}" / "optimizer.pt").write_bytes(bytes(8))
            if (node.parent.name, step) != ("b", 4):
                mark_complete(node / f"checkpoint-{step}", {"global_step": step})
    (nodes[0] / "checkpoint-3" / "optimizer.pt").write_bytes(bytes(7) + b"1")
    port = str(free_port())
    processes = []
    for rank, node in enumerate(nodes):
        env = environment(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        command = [sys.executable, "-c", NODE, "run"]
        processes.append(subprocess.Popen(command, env=env, cwd=node.parent, stdout=subprocess.PIPE, text=True))
    assert [process.communicate(timeout=200)[0].strip() for process in processes] == ["run/checkpoint-2"] * 2


FAILING = """
import time
import torch.distributed as dist
from dataflex import distributed, stop
from dataflex.errors import CorruptionError

dist.init_process_group("gloo")
try:
    with distributed.together():
        if dist.get_rank() == 1:
            stop.announce()
            raise CorruptionError("bad")
        while not stop.is_asked():
            time.sleep(0.05)
except CorruptionError as error:
    print(f"{error} {error.everywhere};", end="")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_one_process_refuses_ends_the_others_in_the_middle_of_their_work(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    done = subprocess.run([*TORCHRUN, str(tmp_path / "failing.py")], env=environment(), capture_output=True, text=True)
    assert done.stdout.split(";") == ["bad True", "bad True", ""], done.stderr


CHOOSING = {
    "less": {"proj_dim": 256},
    "near": {},
    "tsds": {"max_K": 6},
    "cluster_less": {"proj_dim": 256, "cluster_size": 8, "samples_per_cluster": 2},
    "delta_loss": {"window_size": 0.4},
    "composed": {"representation": {"kind": "gradient", "proj_dim": 64}, "similarity": "whitened_cosine"},
}


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_every_way_of_choosing_is_the_same_with_two_processes(workspace: Any) -> None:
    """At the same initial state, so that nothing but the choosing could differ; also with gradient accumulation."""

    def write(name: str, method: str, **keys: Any) -> Path:
        section = {"store": str(workspace.folder / name / "store"), "params": CHOOSING[method], "storage": "float32"}
        once = {"warmup_step": 0, "update_times": 1, "save_strategy": "no", "lora_dropout": 0.0}
        return workspace.write(f"{name}-{method}", component_name=method, dataflex=section, **(once | keys))

    batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    launch_several(workspace.folder, [write("two", method, **batches) for method in CHOOSING])
    for method in CHOOSING:
        workspace.run("train", write("one", method, per_device_train_batch_size=4, gradient_accumulation_steps=1))
        workspace.run("train", write("four", method, per_device_train_batch_size=1, gradient_accumulation_steps=4))
        one = workspace.rounds(f"one-{method}")
        assert [len(rows) for rows in one] == [8]
        assert workspace.rounds(f"four-{method}") == one, method
        assert workspace.rounds(f"two-{method}") == one, method


@pytest.mark.timeout(600)  # DeepSpeed compiles its communication first
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_features_under_deepspeed_are_those_of_single_rows(workspace: Any, stage: int) -> None:
    """Each row's own gradient, not the mean over ranks: equal to one process's at the state that DeepSpeed reached."""
    config = sharding(workspace, stage)
    section = {"store": str(workspace.folder / "sharded"), "params": {"proj_dim": 256}, "storage": "float32"}
    keys = {"deepspeed": config, "use_cpu": None, "dataflex": section, "lora_dropout": 0.0, "loraplus_lr_ratio": 4.0}
    run = workspace.write("sharded", per_device_train_batch_size=1, **keys)
    dataflex("train", run, "update_times=1", **TWO, DS_ACCELERATOR="cpu")
    checkpoint = workspace.folder / "out" / "sharded" / "checkpoint-3"
    scalars = Moments.load(checkpoint / "dataflex" / "moments.safetensors").scalars
    assert {name: s.rate for name, s in scalars.items()} == {n: 4.0 if "lora_B" in n else 1.0 for n in scalars}
    section = {**section, "store": str(workspace.folder / "alone")}
    section["params"] = {"proj_dim": 256, "checkpoints": [str(checkpoint)]}
    workspace.run("featurize", workspace.write("alone", lora_dropout=0.0, dataflex=section))
    sharded, alone = values(workspace.folder / "sharded"), values(workspace.folder / "alone")
    assert sharded.keys() == alone.keys()
    for key, expected in alone.items():
        np.testing.assert_allclose(sharded[key], expected, atol=2e-4 * np.abs(expected).max())
    # And so the selection is one process's, but for rows whose scores differ by less than that.
    chosen = workspace.folder / "chosen.json"
    from dataflex.pipelines.select import select

    select(load(workspace.folder / "alone.yaml"), 8, chosen)
    rows = pq.read_table(chosen.with_suffix(".parquet"))["index"].to_pylist()
    assert len(set(rows) & set(workspace.rounds("sharded")[1])) >= 7


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_killed_featurize_is_finished_by_the_next(workspace: Any) -> None:
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "fragment_rows": 16}
    section |= {"features": [{"kind": "loss"}, {"kind": "embedding"}]}
    path = workspace.write("killed", dataflex=section)
    command = [sys.executable, "-m", "dataflex.cli", "featurize", str(path)]
    begun = time.monotonic()
    launch(command)
    seconds = time.monotonic() - begun
    whole = values(workspace.folder / "store")
    shutil.rmtree(workspace.folder / "store")
    draw = random.Random(0)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1):
        end = time.monotonic() + seconds * draw.uniform(0.6, 0.98)
        code, _ = signalled(command, number, lambda end=end: time.monotonic() > end)  # type: ignore[misc]
        status = json.loads((workspace.folder / "out" / "killed" / "status_featurize.json").read_text("utf-8"))
        # The process may have been at its end already.
        assert status["state"] in ("interrupted" if code == 75 else "running", "finished")
    workspace.run("featurize", path)
    again = values(workspace.folder / "store")
    assert again.keys() == whole.keys()
    for key in whole:
        np.testing.assert_allclose(again[key], whole[key], atol=2e-3 * max(np.abs(whole[key]).max(), 1e-6))
