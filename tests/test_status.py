"""What a command leaves in status.json, and what signals do to it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dataflex.errors import CoverageError, Interrupted
from dataflex.status import reported


def status(folder: Path) -> tuple[str, int | None]:
    found = json.loads((folder / "status.json").read_text("utf-8"))
    assert found["command"] == "train"
    return found["state"], found["exit_code"]


def test_it_runs_and_finishes(tmp_path: Path) -> None:
    with reported("train", tmp_path / "new"):
        assert status(tmp_path / "new") == ("running", None)
    assert status(tmp_path / "new") == ("finished", 0)


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (CoverageError("rows are missing"), "failed", 6),
        (ZeroDivisionError(), "failed", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_errors_are_recorded_and_go_on(tmp_path: Path, error: BaseException, state: str, code: int) -> None:
    with pytest.raises(type(error)), reported("train", tmp_path):
        raise error
    assert status(tmp_path) == (state, code)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_interrupts_through_handlers_of_exceptions(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=number.name), reported("train", tmp_path), contextlib.suppress(Exception):
        os.kill(os.getpid(), number)
    assert status(tmp_path) == ("interrupted", 75)
    assert signal.getsignal(number) == before


def test_a_forked_worker_dies_as_ever(tmp_path: Path) -> None:
    with reported("train", tmp_path):
        fork = multiprocessing.get_context("fork")
        is_up = fork.Event()  # Python forgets a signal that comes while it forks

        def work() -> None:
            is_up.set()
            time.sleep(60)

        worker = fork.Process(target=work, daemon=True)
        worker.start()
        assert is_up.wait(20)
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == -signal.SIGTERM
    assert status(tmp_path) == ("finished", 0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_exit_codes_of_the_command(tmp_path: Path, number: signal.Signals, code: int) -> None:
    program = f"""
        import os, typer
        from dataflex import cli
        from dataflex.status import reported

        @cli.app.command()
        def wait() -> None:
            with reported("train", {str(tmp_path)!r}):
                os.kill(os.getpid(), {int(number)})

        cli.main(["wait"])
    """
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert status(tmp_path) == ("interrupted", code)
