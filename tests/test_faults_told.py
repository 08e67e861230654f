"""What the machine lacks, and Ctrl-C, is told in two lines without a traceback; a fault of the program has one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from typing import Any

import pytest

from dataflex.cli import main
from dataflex.errors import DataflexError
from tests.command import LAUNCHED, run
from tests.processes import signalled

pytestmark = pytest.mark.usefixtures("run_file")


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
    monkeypatch.setattr("dataflex.config.load", lambda *_: exec(raised, {"os": os}))
    code, _, err = run(capsys, "validate", "run.yaml")
    assert code == 1
    assert err.startswith(said)
    assert len(err.splitlines()) == 2


def test_a_server_that_does_not_answer_is_worth_another_try(capsys, monkeypatch):
    raised = "import socket; socket.create_connection(('127.0.0.1', 1))"
    monkeypatch.setattr("dataflex.config.load", lambda *_: exec(raised))
    code, _, err = run(capsys, "validate", "run.yaml")
    assert code == 75
    assert err.startswith("dataflex: a server does not answer: Connection refused\n  see that the server runs")


def test_an_error_stands_below_the_progress_bars(capsys, monkeypatch):
    from tqdm import tqdm

    def drawn(*_):
        bars.append(tqdm(total=3, mininterval=0))
        raise DataflexError("ours")

    bars: list[Any] = []
    monkeypatch.setattr("dataflex.config.load", drawn)
    code, _, err = run(capsys, "validate", "run.yaml")
    assert code == 1
    assert err.endswith("\ndataflex: ours\n")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    for raised in ("1 + 'x'", "raise RuntimeError('ours')", "raise OSError('?')"):
        monkeypatch.setattr("dataflex.config.load", lambda *_, code=raised: exec(code))
        with pytest.raises((TypeError, RuntimeError, OSError)):
            main(["validate", "run.yaml"])


@pytest.mark.parametrize("verb", ["train", "featurize"])
def test_ctrl_c_before_anything_is_begun(capsys, monkeypatch, verb):
    for name, value in LAUNCHED.items():  # so that it launches nothing
        monkeypatch.setenv(name, value)

    def interrupted(settings: Any, **_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, f"dataflex.pipelines.{verb}", types.SimpleNamespace(**{verb: interrupted}))
    code, _, err = run(capsys, verb, "run.yaml")
    assert code == 130
    assert err == (
        f"dataflex: Ctrl-C: {verb} stopped; what is committed stays, and the same command begins where this one would "
        "have\n"
    )


def test_interrupt_exits_with_130(tmp_path):
    (tmp_path / "slow.py").write_text("open('here', 'w').close()\nimport time\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "dataflex.cli", "validate", "run.yaml", "component_name=./slow.py:Slow"]
    status, said = signalled(command, signal.SIGINT, (tmp_path / "here").exists)
    assert status == 130
    assert "Traceback" not in said
