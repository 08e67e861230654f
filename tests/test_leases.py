"""Leases: one launch at a fragment at a time, until it is done, or has not been heard of for a while."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dataflex.stores import leases
from dataflex.stores.files import Files, LocalFiles
from dataflex.stores.leases import Lease
from dataflex.stores.remote_files import RemoteFiles

PATHS = ("one-0/tmp/a.lease", "two-0/tmp/a.lease")


@pytest.fixture(params=["file system", "object store"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    return LocalFiles(tmp_path) if request.param == "file system" else RemoteFiles(f"memory://{tmp_path.name}")


def test_the_first_who_asks_has_it_until_it_gives_it_back(files: Files) -> None:
    first, second = Lease(files, PATHS), Lease(files, PATHS)
    assert first.take()
    with first.held():
        assert not second.take()
    assert second.take()
    assert not first.take()


def test_who_gives_a_lease_back_waits_for_no_server_that_hangs(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SECONDS", 0.03)
    monkeypatch.setattr(leases, "_WAITED", 0.1)
    hangs, begun = threading.Event(), threading.Event()

    def output(path: str) -> Any:
        begun.set()
        hangs.wait(30)
        raise OSError

    monkeypatch.setattr(files, "output", output)
    lease = Lease(files, PATHS)
    assert lease.take()

    def interrupted() -> None:
        with lease.held():
            assert begun.wait(10)
            raise KeyboardInterrupt

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - before < 20
    hangs.set()


def test_a_lease_of_two_stores_is_had_whole_or_not_at_all(files: Files) -> None:
    assert Lease(files, PATHS[1:]).take()
    assert not Lease(files, PATHS).take()
    assert Lease(files, PATHS[:1]).take()  # what it had taken was given back


def document(**changes: Any) -> bytes:
    return json.dumps({"host": platform.node(), "pid": os.getpid(), "until": time.time() + 60} | changes).encode()


@pytest.fixture(scope="module")
def gone() -> int:
    """The number of a process that has ended."""
    code = "import os; print(os.getpid())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)


def test_one_that_has_expired_or_cannot_be_read_or_whose_owner_is_gone_is_free(files: Files, gone: int) -> None:
    far = document(host="elsewhere", until=time.time() + 3e7)  # of a clock that is wrong
    unread = (b"", b"{", b"[]", b"3", document(until="soon"), document(pid="x"))
    for held in (*unread, document(until=0), document(pid=gone), far):
        files.remove(PATHS[0])
        assert files.create(PATHS[0], held)
        assert Lease(files, PATHS[:1]).take(), held
        assert json.loads(files.read(PATHS[0]))["until"] > time.time()


def test_one_of_another_machine_is_left_alone(files: Files, gone: int) -> None:
    assert files.create(PATHS[0], document(host="elsewhere", pid=gone))
    assert not Lease(files, PATHS[:1]).take()


def test_it_is_renewed_as_long_as_it_is_held(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SECONDS", 0.3)
    lease = Lease(files, PATHS)
    assert lease.take()
    begun = json.loads(files.read(PATHS[1]))["until"]
    with lease.held():
        while json.loads(files.read(PATHS[1]))["until"] == begun:
            time.sleep(0.01)
    assert files.names("one-0/tmp") == files.names("two-0/tmp") == []


def test_one_that_cannot_be_looked_at_is_no_obstacle(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "create", refused)
    monkeypatch.setattr(files, "remove", refused)
    lease = Lease(files, PATHS)
    assert lease.take()
    with lease.held():
        pass


def test_a_fault_inside_gives_it_back(files: Files) -> None:
    lease = Lease(files, PATHS)
    assert lease.take()
    with pytest.raises(ZeroDivisionError), lease.held():
        raise ZeroDivisionError
    assert files.names("one-0/tmp") == []
