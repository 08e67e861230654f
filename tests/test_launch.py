"""Processes are launched as LLaMA-Factory's variables say; a launcher or process that is told nonsense is refused."""

from __future__ import annotations

import json
import sys

import pytest

from dataflex.errors import ConfigError
from dataflex.launch import command_line, environment, free_port
from tests.command import LAUNCHED, python, run
from tests.run_file import RUN

pytestmark = pytest.mark.usefixtures("run_file")


@pytest.mark.parametrize(
    ("env", "devices", "expected"),
    [
        ({}, 1, None),
        ({}, 0, None),
        ({"LOCAL_RANK": "0", "FORCE_TORCHRUN": "1"}, 8, None),
        ({"RANK": "0"}, 8, None),
        ({"WORLD_SIZE": "2"}, 8, None),
        (
            {"FORCE_TORCHRUN": "1", "RANK": "1", "WORLD_SIZE": "2", "NNODES": "2", "NODE_RANK": "1"}
            | {"MASTER_ADDR": "h", "MASTER_PORT": "7"},
            4,
            "--nproc-per-node 4 --nnodes 2 --node-rank 1 --master-addr h --master-port 7",
        ),
        ({"USE_RAY": "1"}, 8, None),
        (
            {"MASTER_PORT": "29501"},
            8,
            "--nproc-per-node 8 --nnodes 1 --node-rank 0 --master-addr 127.0.0.1 --master-port 29501",
        ),
        (
            {"FORCE_TORCHRUN": "1", "MASTER_PORT": "1"},
            0,
            "--nproc-per-node 1 --nnodes 1 --node-rank 0 --master-addr 127.0.0.1 --master-port 1",
        ),
        (
            {"NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "7"},
            8,
            "--nproc-per-node 4 --nnodes 2 --node-rank 1 --master-addr h --master-port 7",
        ),
        (
            {
                "RDZV_ID": "job",
                "MIN_NNODES": "1",
                "MAX_NNODES": "3",
                "MAX_RESTARTS": "2",
                "MASTER_ADDR": "h",
                "MASTER_PORT": "7",
            },
            2,
            "--nproc-per-node 2 --nnodes 1:3 --rdzv-id job --rdzv-backend c10d --rdzv-endpoint h:7 --max-restarts 2",
        ),
    ],
)
def test_launch_follows_llamafactorys_variables(env, devices, expected):
    arguments = ["train", "a folder/rün.yaml", "seed=1"]
    command = command_line(arguments, env, lambda: devices)
    if expected is None:
        assert command is None
    else:
        head = [sys.executable, "-m", "torch.distributed.run"]
        assert command == [*head, *expected.split(), "-m", "dataflex.cli", *arguments]


def test_launch_refuses_what_would_hang():
    with pytest.raises(ConfigError, match="NNODES: found 2 without MASTER_ADDR and MASTER_PORT"):
        command_line(["train"], {"NNODES": "2"}, lambda: 8)
    with pytest.raises(ConfigError, match="NODE_RANK: found 'x'; expected a whole number"):
        command_line(["train"], {"NODE_RANK": "x"}, lambda: 8)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") for value in ("abc", "", "-1", "1.5")]
    + [("WORLD_SIZE", "0"), ("RANK", "1")],
)
@pytest.mark.parametrize("verb", [("validate", "run.yaml"), ("train", "run.yaml"), ("store", "ls"), ("version",)])
def test_a_process_that_does_not_know_which_it_is(capsys, monkeypatch, verb, name, value):
    monkeypatch.setenv(name, value)
    code, _, err = run(capsys, *verb)
    assert code == 2
    assert err.startswith(f"dataflex: environment variable {name}: found '{value}'; expected a whole number from ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_PORT", "MIN_NNODES", "MAX_NNODES", "MAX_RESTARTS")
        for value in ("abc", "-1", "70000")
    ]
    + [("NPROC_PER_NODE", "0"), ("NNODES", "0"), ("NODE_RANK", "1"), ("MAX_NNODES", "0")],
)
@pytest.mark.parametrize("verb", ["validate", "train"])
def test_a_launcher_is_told_nothing_wrong(capsys, monkeypatch, verb, name, value):
    monkeypatch.setenv(name, value)
    if verb == "validate":
        assert run(capsys, verb, "run.yaml")[0] == 0  # no launcher is asked for
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    code, _, err = run(capsys, verb, "run.yaml")
    assert code == 2
    assert err.startswith(f"dataflex: environment variable {name}: found '{value}'; expected a whole number from ")


@pytest.mark.parametrize(
    ("env", "missing"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({**LAUNCHED, "MASTER_ADDR": ""}, "MASTER_ADDR"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "featurize"])
def test_a_process_that_cannot_find_the_others(capsys, monkeypatch, verb, env, missing):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    code, _, err = run(capsys, verb, "run.yaml")
    assert code == 2
    assert f" without {missing}; expected all that a launcher such as torchrun sets" in err
    monkeypatch.setenv("FORCE_TORCHRUN", "0")
    for name, value in {**LAUNCHED, "MASTER_PORT": "70000"}.items():
        monkeypatch.setenv(name, value)
    assert "MASTER_PORT: found '70000'" in run(capsys, verb, "run.yaml")[2]


def test_deepspeed_is_launched_on_one_device_too():
    command = command_line(["train"], {}, lambda: 1, needs_processes=True)
    assert command is not None
    assert command[3:5] == ["--nproc-per-node", "1"]
    assert 0 < free_port() < 65536


def test_allocator_settings_of_llamafactory():
    assert environment({})["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert environment({"PYTORCH_CUDA_ALLOC_CONF": "mine"})["PYTORCH_CUDA_ALLOC_CONF"] == "mine"
    assert environment({"OPTIM_TORCH": "0"}) == {"OPTIM_TORCH": "0"}


def test_two_processes_are_started_with_the_same_arguments(tmp_path):
    # The plugin ends each worker as soon as it is imported, after leaving a note, whatever dataflex makes of an end.
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "probe.py").write_text(
        "import json, os, sys\n"
        "if 'RANK' in os.environ:\n"
        "    note = {name: os.environ[name] for name in ('WORLD_SIZE', 'TORCH_NCCL_AVOID_RECORD_STREAMS')}\n"
        "    json.dump([sys.argv[1:], note], open('rank' + os.environ['RANK'], 'w'))\n"
        "    os._exit(0)\n"
        "class Probe:\n"
        "    def __init__(self, dataset): ...\n"
        "    def select(self): ...\n"
    )
    (folder / "rün.yaml").write_text(RUN)
    arguments = ["train", "a folder/rün.yaml", "component_name=a folder/probe.py:Probe", "seed=1"]
    done = python("-m", "dataflex.cli", *arguments, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    notes = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)]
    assert notes == [[arguments, {"WORLD_SIZE": "2", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1"}]] * 2
