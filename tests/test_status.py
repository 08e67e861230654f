"""A status file says what a command did and how it ended, whatever raises or signals it."""

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
from typing import Any

import pytest

from dataflex import stop
from dataflex.errors import Cancelled, ConfigError, CorruptionError, CoverageError, DataflexError, Interrupted
from dataflex.faults import told
from dataflex.status import reported, training_begins


def status(folder: Path) -> tuple[str, int | None]:
    found = json.loads((folder / "status.json").read_text("utf-8"))
    assert found["command"] == "train"
    return found["state"], found["exit_code"]


def test_it_runs_and_finishes(tmp_path: Path) -> None:
    with reported("train", tmp_path / "new"):
        assert status(tmp_path / "new") == ("running", None)
    assert status(tmp_path / "new") == ("finished", 0)


OVER = """
import sys, time
from dataflex import stop
from dataflex.status import reported

stop.last()
with reported("train", sys.argv[1]):
    pass
print("over", flush=True)
time.sleep(3)
"""


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_a_signal_after_the_end_does_not_make_a_failure_of_it(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", OVER, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(number)
    assert child.returncode == 0
    assert status(tmp_path) == ("finished", 0)


def test_a_signal_while_the_end_is_written_down_changes_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    from dataflex.status import Report

    finish = Report.finish

    def signalled(report: Report) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        finish(report)

    monkeypatch.setattr(Report, "finish", signalled)
    with reported("train", tmp_path):
        pass
    assert status(tmp_path) == ("finished", 0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a program that calls it goes on as before


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (CoverageError("rows are missing"), "failed", 6),
        (ZeroDivisionError(), "failed", 1),
        (MemoryError("3 GiB"), "failed", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_errors_are_recorded_and_go_on(tmp_path: Path, error: BaseException, state: str, code: int) -> None:
    with pytest.raises(type(error)), reported("train", tmp_path):
        raise error
    assert status(tmp_path) == (state, code)


def test_the_text_that_is_printed_is_kept(tmp_path: Path) -> None:
    for error in (MemoryError("3 GiB"), FileNotFoundError(2, "No such file", "x"), CoverageError("rows are missing")):
        with pytest.raises(type(error)), reported("train", tmp_path):
            raise error
        assert json.loads((tmp_path / "status.json").read_text())["message"] in (told(error) or ())


def test_a_rank_that_fails_alone_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher ends the others, which would say that a signal did."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with contextlib.suppress(Cancelled), reported("train", tmp_path):
        monkeypatch.setenv("RANK", "1")
        with contextlib.suppress(CoverageError), reported("train", tmp_path):
            assert status(tmp_path) == ("running", None)
            raise CoverageError("rank 1 lacks rows")
        monkeypatch.setenv("RANK", "0")
        raise Cancelled("a signal came")
    assert status(tmp_path) == ("failed", 6)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_who_lost_another_process_does_not_overwrite_why_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    lost = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    with contextlib.suppress(CorruptionError), reported("train", tmp_path):
        raise CorruptionError("a bit has flipped")
    before = (tmp_path / "status.json").read_text()
    monkeypatch.setenv("RANK", "1")
    with contextlib.suppress(RuntimeError), reported("train", tmp_path):
        raise lost
    assert (tmp_path / "status.json").read_text() == before
    (tmp_path / "status.json").unlink()
    with contextlib.suppress(RuntimeError), reported("train", tmp_path):
        raise lost
    assert status(tmp_path) == ("failed", 75)


def test_what_every_rank_meets_is_rank_0s_to_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = CoverageError("rows are missing")
    error.everywhere = True
    monkeypatch.setenv("RANK", "1")
    for raised in (error, Cancelled("a signal came"), None):
        with contextlib.suppress(CoverageError, Cancelled), reported("train", tmp_path):
            if raised is not None:
                raise raised
        assert list(tmp_path.iterdir()) == []


def test_only_train_owns_the_status_of_a_training(tmp_path: Path) -> None:
    """Neither another command nor a start that is refused hides how a training ended."""
    with reported("train", tmp_path):
        training_begins()
    missing, wrong = CoverageError("rows are missing"), ConfigError("no such option")
    for verb, error in (("featurize", None), ("select", missing), ("train", wrong)):
        with contextlib.suppress(DataflexError), reported(verb, tmp_path):
            if error is not None:
                raise error
        assert status(tmp_path) == ("finished", 0)
        found = json.loads((tmp_path / f"status_{verb}.json").read_text("utf-8"))
        assert found["command"] == verb
        assert (found["state"], found["exit_code"]) == (
            ("finished", 0) if error is None else ("failed", error.exit_code)
        )
        assert found["message"] == (None if error is None else str(error))
    with contextlib.suppress(CoverageError), reported("train", tmp_path):
        training_begins()  # from here on the folder holds another training
        assert status(tmp_path) == ("running", None)
        assert not (tmp_path / "status_train.json").exists()
        raise missing
    assert status(tmp_path) == ("failed", 6)


@pytest.mark.parametrize("found", ["", "null", "[]", "{}", '{"state": "interrupted"}'])
def test_what_no_training_has_finished_is_written_over(tmp_path: Path, found: str) -> None:
    (tmp_path / "status.json").write_text(found)
    with pytest.raises(CoverageError), reported("train", tmp_path):
        raise CoverageError("rows are missing")
    assert status(tmp_path) == ("failed", 6)


@pytest.mark.parametrize("verb", ["train", "select"])
def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, verb: str) -> None:
    (tmp_path / "file").write_text("")
    said = r"output_dir: found .*file/run, which cannot be written to .Not a directory"
    with pytest.raises(ConfigError, match=said), reported(verb, tmp_path / "file" / "run"):
        raise AssertionError("it was not refused before the work began")


def test_a_disk_that_fills_up_does_not_change_how_the_command_ends(tmp_path: Path) -> None:
    def work(folder: Path, error: Exception | None) -> None:
        with reported("train", folder):
            (folder / "status.json").unlink()
            folder.rmdir()
            folder.write_text("")  # where no status can be written any more
            if error is not None:
                raise error

    work(tmp_path / "run", None)
    with pytest.raises(CoverageError):
        work(tmp_path / "other", CoverageError("rows are missing"))


def test_work_that_holds_signals_asks_for_them_and_hears_only_the_first() -> None:
    with stop.listening():
        with stop.held():
            assert not stop.is_asked()
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_asked()
            assert stop.is_asked_anywhere()
        with pytest.raises(Interrupted, match=r"^SIGUSR1: stopped$"):
            stop.leave()
        os.kill(os.getpid(), signal.SIGTERM)  # on the way up
    assert not stop.is_asked()


def test_work_that_may_be_dropped_is_dropped_when_a_signal_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "PATIENCE", 0.2)
    with stop.listening(), stop.held():
        os.kill(os.getpid(), signal.SIGTERM)
        begun = time.monotonic()
        with pytest.raises(Interrupted), stop.droppable():
            time.sleep(60)
        assert time.monotonic() < begun + 50


def forked() -> Any:
    """Start a process as a loader does, and wait until it is up: Python forgets a signal that comes while it forks."""
    fork = multiprocessing.get_context("fork")
    is_up = fork.Event()

    def work() -> None:
        is_up.set()
        time.sleep(60)

    worker = fork.Process(target=work, daemon=True)
    worker.start()
    assert is_up.wait(60)
    return worker


def test_a_worker_hears_its_parent_alone(tmp_path: Path) -> None:
    """A launcher signals the whole process group, loaders' workers too, which their parent still needs."""
    with stop.listening(), stop.held():
        worker = forked()
        for number in ("TERM", "USR1"):
            subprocess.run(["bash", "-c", f"kill -{number} {worker.pid}"], check=True)
        worker.join(1)
        assert worker.is_alive()
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_interrupts_through_handlers_of_exceptions(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=number.name), reported("train", tmp_path), contextlib.suppress(Exception):
        os.kill(os.getpid(), number)
    assert status(tmp_path) == ("interrupted", 75)
    assert signal.getsignal(number) == before


def test_a_forked_worker_dies_as_ever(tmp_path: Path) -> None:
    with reported("train", tmp_path):
        worker = forked()
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
