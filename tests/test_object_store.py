"""Stores on an S3 server of which one request after the other fails: nothing is lost, nothing is there twice."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.object_store import FAULTS, Proxy
from dataflex.errors import Interrupted, UnavailableError
from dataflex.stores import parquet, remote_files, retries
from dataflex.stores.leases import Lease
from dataflex.stores.remote_files import RemoteFiles
from dataflex.stores.root import StoreRoot, open_files
from dataflex.stores.upkeep.inspection import inspect
from tests.roots import LAYOUT, lived_through, make_state, record, values

Chosen = Callable[[int, str, str], bool]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave repetition to DataFlex, without pauses: botocore's, of up to a second, is tried apart."""
    once = {"retries": {"total_max_attempts": 1}, "read_timeout": 1.0}
    monkeypatch.setattr(remote_files, "_S3", remote_files._S3 | once)
    monkeypatch.setattr(retries, "FIRST", 0.01)
    monkeypatch.setattr(parquet, "_TAIL", 1)


def at(number: int) -> Chosen:
    return lambda found, method, path: found == number


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what DataFlex has logged.

    asyncio may log as well: s3fs leaves the end of a session to a loop that nobody runs, whenever the garbage collector
    finds a client of an earlier test in the main thread.
    """
    return [found.getMessage() for found in caplog.records if found.name.split(".")[0] == "dataflex"]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("shift", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 6))])
def test_every_request_of_a_store_may_fail_once(
    shift: int, bucket: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """The kinds of faults take turns."""
    kinds = itertools.cycle(FAULTS[shift:] + FAULTS[:shift])
    assert lived_through(f"s3://{bucket}", proxy, kinds) > 25
    assert ours(caplog) == []


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("fault", ["lost", "lost 500", "409"])
def test_every_write_may_fail_once(fault: str, bucket: str, proxy: Proxy) -> None:
    for number in itertools.count():
        writes = itertools.count()
        files = open_files(f"s3://{bucket}/{number}")
        proxy.begin(fault, lambda _, method, path: method in ("PUT", "DELETE") and next(writes) == number)  # noqa: B023
        assert files.create("a/b", b"mine")
        assert not files.create("a/b", b"another's")
        lease = Lease(files, ["a/tmp/x.lease"])
        assert lease.take()
        with lease.held():
            assert not Lease(files, ["a/tmp/x.lease"]).take()
        with files.output("a/c") as file:
            file.write(b"2")
        struck = proxy.struck
        proxy.begin()
        assert files.read("a/b") == b"mine"
        assert [file.path for file in files.stored("")] == ["a/b", "a/c"]
        if not struck:
            break
    assert number > 7


@pytest.mark.usefixtures("at_once")
def test_a_state_and_records_of_runs_outlive_every_fault(
    bucket: str, proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, fault in zip(itertools.count(), itertools.cycle(["lost", "500", "cut"]), strict=False):
        proxy.begin(fault, at(number))
        files = open_files(f"s3://{bucket}/{number}")
        lineage = make_state(files, tmp_path / "made")
        record(files, "/out", ("state", lineage))
        (tmp_path / str(number)).mkdir()
        kept = StoreRoot(files).states.fetch(lineage, tmp_path / str(number))
        assert (kept / "adapter.safetensors").read_bytes() == b"w" * 1000
        struck = proxy.struck
        proxy.begin()
        if not struck:
            break
    assert [part for part in inspect(files) if part.problems] == []
    assert ours(caplog) == []


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("fault", FAULTS)
def test_many_requests_that_fail_at_a_time(fault: str, bucket: str, proxy: Proxy) -> None:
    files = open_files(f"s3://{bucket}/x")
    for name in range(20):
        with files.output(f"a/{name:02}") as file:
            file.write(bytes([name]) * 10)
    failed: set[str] = set()

    def once_each(number: int, method: str, path: str) -> bool:
        return path not in failed and not failed.add(path)  # type: ignore[func-returns-value]

    proxy.begin(fault, once_each)
    assert files.fetch([(f"a/{name:02}", 2, 5) for name in range(21)]) == [*(bytes([n]) * 3 for n in range(20)), None]
    assert proxy.struck == 21


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("fault", ["500", "429", "dropped", pytest.param("hangs", marks=pytest.mark.slow), "cut"])
def test_what_fails_for_good_is_told_in_one_message(fault: str, bucket: str, proxy: Proxy) -> None:
    url = f"s3://{bucket}/x"
    store = StoreRoot(url).open("gradient", {"r": 1}, LAYOUT)
    files = store.files
    assert isinstance(files, RemoteFiles)
    files.patience = 0.1

    def output() -> None:
        with files.output("a/b") as file:
            file.write(b"1")

    calls: dict[str, Callable[[], Any]] = {
        "read": lambda: files.read(f"{store.folder}/recipe.json"),
        "fetch": lambda: files.fetch([(f"{store.folder}/recipe.json", 0, 5), ("a/b", 0, 1)]),
        "names": lambda: files.names(""),
        "stored": lambda: files.stored(""),
        "exists": files.exists,
        "append": lambda: store.append("f0", values(0)),
        "open": lambda: files.open(f"{store.folder}/recipe.json"),
        "create": lambda: files.create("a/c", b"1"),
        "output": output,
    }
    for what in list(calls)[: 6 if fault == "cut" else None]:  # the answers to the last have nothing to break off in
        proxy.begin(fault, lambda *_: True)
        with pytest.raises(UnavailableError) as caught:
            calls[what]()
        assert 1 <= proxy.struck < 20, what
        assert str(caught.value).startswith(f"{url}: ")
        assert str(caught.value).count("\n") == 1


def test_botocore_repeats_once_and_no_more(bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs would repeat what botocore has repeated, and for reads that again."""
    monkeypatch.setattr(retries, "ATTEMPTS", 3)
    for fault, most in (("503", 6), ("dropped", 12)):  # aiohttp tries again where an old connection turns out closed
        files = open_files(f"s3://{bucket}/x")
        proxy.begin(fault, lambda *_: True)
        with pytest.raises(UnavailableError):
            files.read("a/b")
        assert 6 <= proxy.struck <= most


@pytest.mark.usefixtures("at_once")
def test_who_tidies_up_after_a_failure_does_not_wait_as_long_again(
    bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", 4)
    files = open_files(f"s3://{bucket}/x")
    assert isinstance(files, RemoteFiles)
    proxy.begin("500", lambda *_: True)
    for attempts in (retries.ATTEMPTS, 1, 1):
        proxy.seen.clear()
        with pytest.raises(UnavailableError):
            files.remove("a/b")
        assert len(proxy.seen) == attempts
    proxy.begin("500", at(0))  # what is no tidying is asked again as ever
    assert files.create("a/c", b"1")
    assert proxy.struck == 1


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("asked", [KeyboardInterrupt(), Interrupted("SIGTERM: stopped")])
def test_who_was_asked_to_stop_tidies_up_at_once(asked: BaseException, bucket: str, proxy: Proxy) -> None:
    files = open_files(f"s3://{bucket}/x")
    proxy.begin("500", lambda *_: True)

    def stopped() -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(files.remove, "a/b")
            raise asked

    with pytest.raises(UnavailableError):
        stopped()
    assert len(proxy.seen) == 1


@pytest.mark.usefixtures("at_once")
def test_two_writers_commit_each_fragment_once(bucket: str, proxy: Proxy) -> None:
    """Each answer to a commit of the first is lost, so both find their fragments taken."""
    proxy.begin("lost", lambda number, method, path: method == "PUT" and "/log/" in path and number % 2 == 0)
    kept: list[list[bool]] = []

    def write(seed: int) -> None:
        store = StoreRoot(f"s3://{bucket}/x").open("gradient", {"r": 1}, LAYOUT)
        mine = [values(number) for number in range(6)]
        for each in mine:
            each.scalars["norm"] += seed  # of the same rows, other values
        kept.append([store.append(f"f{number}", each) for number, each in enumerate(mine)])

    writers = [threading.Thread(target=write, args=(seed,)) for seed in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    proxy.begin()
    assert np.sum(kept, axis=0).tolist() == [1] * 6
    store = StoreRoot(f"s3://{bucket}/x").open("gradient", {"r": 1}, LAYOUT)
    assert store.rows == 30
    assert store.committed_fragments() == [f"f{number}" for number in range(6)]


@pytest.mark.usefixtures("at_once")
def test_a_large_file_is_put_in_parts_of_which_any_may_fail(bucket: str, proxy: Proxy, monkeypatch: Any) -> None:
    monkeypatch.setattr(remote_files, "_S3", remote_files._S3 | {"read_timeout": 15})  # parts take their time
    files = open_files(f"s3://{bucket}/x")
    assert isinstance(files, RemoteFiles)
    put = files.fs.put_file
    monkeypatch.setattr(files.fs, "put_file", lambda *args: put(*args, chunksize=5 << 20))
    data = np.random.default_rng(0).bytes(11 << 20)
    for number, fault in enumerate(["lost", "503", "lost 500", "dropped", "lost", "lost"]):
        proxy.begin(fault, at(number))
        with files.output(f"a/{number}") as file:
            file.write(data)
        assert proxy.struck == (number < 5)
        assert files.sha256(f"a/{number}") == hashlib.sha256(data).hexdigest()
