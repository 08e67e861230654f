from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.cli import main
from dataflex.errors import ConfigError, DataflexError
from dataflex.launch import command_line, environment, free_port
from dataflex.rows import KEY_DTYPE
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout, Values

ROOT = Path(__file__).parents[1]
HEAVY = "('torch', 'transformers', 'llamafactory', 'pydantic', 'omegaconf', 'numpy', 'pyarrow')"
RUN = """\
model_name_or_path: owner/model
stage: sft
do_train: true
dataset_dir: ONLINE
dataset: a/pool
eval_dataset: a/target
template: qwen
output_dir: out
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
train_type: dynamic_select
component_name: less
warmup_step: 10
update_step: 10
update_times: 2
"""
LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "FORCE_TORCHRUN", "DATAFLEX_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths} | env, capture_output=True, text=True, check=False
    )


def test_help_imports_nothing_heavy():
    """So that it is there at once."""
    code = f"import sys, dataflex.cli; print([m for m in {HEAVY} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"
    assert "featurize" in python("-m", "dataflex.cli", "--help").stdout


def test_validate_says_what_follows(capsys, monkeypatch):
    code, out, _ = run(capsys, "validate", "run.yaml", "dataflex.params.proj_dim=64", "dataflex.store=s3://bucket/x")
    assert code == 0
    assert "30 optimizer steps = 1 epoch x (10 warm-up + 2 updates x 10)" in out
    assert "8 rows per optimizer step and process" in out
    assert "gradient (adam, sjlt to 64) of the training rows, after the warm-up of 10 steps" in out
    assert "gradient (sgd, sjlt to 64) of the targets" in out
    assert "s3://bucket/x (float16)" in out
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "x 4 processes = 32 rows per optimizer step" in run(capsys, "validate", "run.yaml")[1]


def test_errors_print_their_text_and_exit_code(capsys):
    code, out, err = run(capsys, "validate", "run.yaml", "stage=dpo")
    assert (code, out) == (2, "")
    assert err.startswith("dataflex: 1 problem in the configuration:\n  command line: stage: found 'dpo'")
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", ["train", "featurize"])
def test_wrong_run_file_stops_before_anything_heavy(verb):
    done = python("-X", "importtime", "-m", "dataflex.cli", verb, "run.yaml", "learning_rat=1")
    assert done.returncode == 2
    assert "did you mean 'learning_rate'?" in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.endswith((" torch", " transformers"))]


def test_unknown_verb_is_a_usage_error(capsys):
    code, _, err = run(capsys, "trian", "run.yaml")
    assert code == 2
    assert "Did you mean 'train'?" in err
    assert run(capsys, "select", "run.yaml")[0] == 2


def test_ls_shows_parameters(capsys):
    code, out, _ = run(capsys, "ls")
    assert code == 0
    assert "proj_dim: int, default 8192." in out
    found = {(method["kind"], method["name"]): method for method in json.loads(run(capsys, "ls", "--json")[1])}
    assert {"name": "path", "required": True}.items() <= found["selector", "static"]["params"][0].items()
    assert {("selector", "less"), ("mixer", "static"), ("mixer", "odm"), ("weighter", "loss")} <= found.keys()


def test_version_names_what_it_stands_on(capsys):
    _, out, _ = run(capsys, "version")
    assert "llamafactory 0.9" in out
    assert f"python {sys.version.partition(' ')[0]}" in out


def make_store(folder: Path) -> str:
    store = StoreRoot(folder).open("loss", {"feature": {"kind": "loss"}}, Layout({"tokens": "int32"}))
    keys = np.arange(6, dtype=np.uint64).reshape(3, 2).view(KEY_DTYPE).reshape(3)
    store.append("f", Values(keys, np.zeros(3, np.uint8), {"tokens": np.arange(3, dtype=np.int32)}))
    return store.folder


def test_stores_are_listed_shown_verified_and_repaired(capsys, tmp_path):
    name = make_store(tmp_path / "stores")
    root = ("--root", str(tmp_path / "stores"))
    assert name in run(capsys, "store", "ls", *root)[1]
    assert json.loads(run(capsys, "store", "ls", *root, "--json")[1])[0]["rows"] == 3
    assert json.loads(run(capsys, "store", "show", name[:8], *root)[1])["recipe"] == {"feature": {"kind": "loss"}}
    code, out, _ = run(capsys, "store", "verify", *root)
    assert code == 0
    assert out.splitlines()[0] == f"{name}: intact, 0 unused files"
    assert out.splitlines()[1].startswith("looked at 1 stores, 0 kept states and 0 records of runs, ")
    (data,) = (tmp_path / "stores" / name / "data").glob("*.parquet")
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    code, out, err = run(capsys, "store", "verify", *root)
    assert code == 4
    assert f"{name}: damaged" in out
    assert "SHA-256" in err
    assert "removed: " in run(capsys, "store", "repair", *root)[1]
    assert run(capsys, "store", "verify", *root)[0] == 0


@pytest.mark.parametrize("verb", ["ls", "show loss", "verify", "repair", "gc --leftovers --grace 0 --delete"])
@pytest.mark.parametrize("root", [["--root", ""], ["--root", " "], ["--root="]])
def test_an_empty_root_is_not_the_working_folder(capsys, tmp_path, verb, root):
    name = make_store(tmp_path)
    (tmp_path / name / "data" / "left.parquet.tmp").touch()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, "store", *verb.split(), *root)
    assert (code, out) == (2, "")
    assert err.startswith("dataflex: command line: found an empty text (")
    assert err.count("--root") == 1
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["store", "show", ""],
        ["store", "gc", "--run", "", "--delete"],
        ["validate", ""],
        ["train", "run.yaml", ""],
        ["select", "run.yaml", "--num", "3", "--output", ""],
        ["doctor", ""],
        ["mix", "fit", "runs.csv", "--kl", "0", "--output", ""],
        ["mix", "fit", "runs.csv", "--sizes="],
        ["mix", "fit", "runs.csv", "--prior", ""],
        [""],
    ],
)
def test_an_empty_text_is_no_value(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("dataflex: command line: found an empty text (")


def test_a_key_may_be_set_to_an_empty_text(capsys):
    assert run(capsys, "validate", "run.yaml", "run_name=")[0] == 0


def test_no_store(capsys, tmp_path):
    assert run(capsys, "store", "ls", "--root", str(tmp_path))[1] == f"no stores under {tmp_path}\n"
    code, _, err = run(capsys, "store", "show", "loss", "--root", str(tmp_path))
    assert code == 3
    assert "no store loss" in err


@pytest.mark.parametrize("verb", ["", "train", "select", "validate", "ls", "store", "store gc", "mix fit"])
def test_help_by_its_short_name(capsys, verb):
    code, out, _ = run(capsys, *verb.split(), "-h")
    assert (code, out) == (0, run(capsys, *verb.split(), "--help")[1])
    assert out.startswith("Usage: dataflex")


def test_version_as_an_option(capsys):
    assert run(capsys, "--version") == run(capsys, "version")


def test_a_full_disk_is_told_without_a_traceback():
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "dataflex.cli", "ls"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "dataflex: No space left on device\n  make room, or write elsewhere (output_dir, dataflex.store, TMPDIR); what "
        "was committed stays\n"
    )


def test_a_reader_that_has_enough_is_no_fault():
    command = f"{sys.executable} -m dataflex.cli version | {sys.executable} -c pass"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("open('/dev/null/x')", "dataflex: /dev/null/x: Not a directory\n  see to it, and run the same command again"),
        (
            "os.rename('gone', 'there')",
            "dataflex: gone: there: No such file or directory\n  it was removed",
        ),
        (
            "raise Exception('No space left on device (os error 28)')",
            "dataflex: No space left on device\n  make room, or write elsewhere",
        ),
        (
            "raise ValueError('Error while serializing: IoError(Os { code: 28, kind: StorageFull })')",
            "dataflex: No space left on device\n  make room, or write elsewhere",
        ),
        (
            "b'x' * (1 << 62)",
            "dataflex: memory ran out\n  lower per_device_train_batch_size, cutoff_len or",
        ),
    ],
)
def test_what_the_machine_lacks_is_told_in_two_lines(capsys, monkeypatch, raised, said):
    monkeypatch.setattr("dataflex.cli._settings", lambda *_: exec(raised, {"os": os}))
    code, _, err = run(capsys, "validate", "run.yaml")
    assert code == 1
    assert err.startswith(said)
    assert len(err.splitlines()) == 2


def test_a_server_that_does_not_answer_is_worth_another_try(capsys, monkeypatch):
    raised = "import socket; socket.create_connection(('127.0.0.1', 1))"
    monkeypatch.setattr("dataflex.cli._settings", lambda *_: exec(raised))
    code, _, err = run(capsys, "validate", "run.yaml")
    assert code == 75
    assert err.startswith("dataflex: a server does not answer: Connection refused\n  see that the server runs")


def test_an_error_stands_below_the_progress_bars(capsys, monkeypatch):
    from tqdm import tqdm

    def drawn(*_):
        bars.append(tqdm(total=3, mininterval=0))
        raise DataflexError("ours")

    bars: list[Any] = []
    monkeypatch.setattr("dataflex.cli._settings", drawn)
    code, _, err = run(capsys, "validate", "run.yaml")
    assert code == 1
    assert err.endswith("\ndataflex: ours\n")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    for raised in ("1 + 'x'", "raise RuntimeError('ours')", "raise OSError('?')"):
        monkeypatch.setattr("dataflex.cli._settings", lambda *_, code=raised: exec(code))
        with pytest.raises((TypeError, RuntimeError, OSError)):
            main(["validate", "run.yaml"])


def test_a_store_that_cannot_be_reached_stops_a_run_before_anything_is_loaded(capsys):
    """On another machine its package may be there, so `validate` only notes it."""
    assert (
        "note        s3://bucket/x cannot be reached"
        in run(capsys, "validate", "run.yaml", "dataflex.store=s3://bucket/x")[1]
    )
    for verb in ("train", "featurize"):
        code, _, err = run(capsys, verb, "run.yaml", "dataflex.store=s3://bucket/x")
        assert code == 2
        assert err.startswith("dataflex: root of the stores: s3://bucket/x cannot be reached from here: ")
    assert run(capsys, "store", "ls", "--root", "nosuch://x")[0] == 2


@pytest.mark.parametrize("verb", ["train", "featurize"])
def test_ctrl_c_before_anything_is_begun(capsys, monkeypatch, verb):
    for name, value in LAUNCHED.items():  # so that it launches nothing
        monkeypatch.setenv(name, value)

    def interrupted(settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, f"dataflex.pipelines.{verb}", types.SimpleNamespace(**{verb: interrupted}))
    code, _, err = run(capsys, verb, "run.yaml")
    assert code == 130
    assert err == (
        f"dataflex: Ctrl-C: {verb} stopped; what is committed stays, and the same command begins where this one would "
        "have\n"
    )


def test_store_ls_imports_no_torch():
    done = python("-X", "importtime", "-m", "dataflex.cli", "store", "ls", "--root", ".")
    assert done.stdout == f"no stores under {Path.cwd()}\n"
    assert not [line for line in done.stderr.splitlines() if line.endswith((" torch", " transformers"))]


def test_interrupt_exits_with_130(tmp_path):
    (tmp_path / "slow.py").write_text("print('here', flush=True)\nimport time\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "dataflex.cli", "validate", "run.yaml", "component_name=./slow.py:Slow"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background jobs ignore the signal, and their children inherit that.
    pipes["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=env, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert "Traceback" not in process.stderr.read()


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
