"""Stores on Google Cloud Storage, as far as a server of its interface shows it."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.object_store import Proxy
from dataflex.errors import ConfigError, UnavailableError
from dataflex.stores import parquet, remote_files, retries
from dataflex.stores.leases import Lease
from dataflex.stores.remote_files import RemoteFiles
from dataflex.stores.root import StoreRoot, open_files, refuse_unusable
from dataflex.stores.upkeep.inspection import inspect
from tests import google_storage
from tests.roots import check, life, lived_through

FAULTS = ("409", "429", "500", "503", "dropped", "lost", "lost 500", "cut", "hangs")


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with google_storage.serving() as found:
        yield found


@pytest.fixture
def google_bucket(server: Proxy) -> Iterator[str]:
    with google_storage.bucket(server) as name:
        yield name


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the pauses of both repetitions out: gcsfs's own is of six attempts."""

    async def sleep(seconds: float) -> None:
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(remote_files, "_S3", remote_files._S3 | {"read_timeout": 1.0})
    monkeypatch.setattr(retries, "FIRST", 0.01)
    monkeypatch.setattr(parquet, "_TAIL", 1)


def test_a_store_lives_there(google_bucket: str, server: Proxy) -> None:
    url = f"gs://{google_bucket}/root"
    files = open_files(url)
    life(url)
    check(files)
    assert [part for part in inspect(files) if part.problems] == []
    assert files.create("a/b", b"mine")
    assert not files.create("a/b", b"another's")
    assert files.read("a/b") == b"mine"
    assert files.fetch([("a/b", 2, 4), ("a/b", 9, 12), ("a/none", 0, 1)]) == [b"ne", b"", None]
    data = np.random.default_rng(0).bytes(6 << 20)  # put in parts
    with files.output("a/large") as file:
        file.write(data)
    assert files.sha256("a/large") == hashlib.sha256(data).hexdigest()
    files.remove("a/large")
    assert files.names("a") == ["b"]
    lease = Lease(files, ["a/tmp/x.lease"])
    assert lease.take()
    assert not Lease(files, ["a/tmp/x.lease"]).take()


def test_of_many_writers_one_creates_a_file(google_bucket: str) -> None:
    files = open_files(f"gs://{google_bucket}/root")
    begin = threading.Barrier(4)
    won: list[tuple[int, int]] = []

    def write(writer: int) -> None:
        for number in range(12):
            begin.wait()
            if files.create(f"a/{number}", b"%d" % writer):
                won.append((number, writer))

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(number for number, _ in won) == list(range(12))
    assert [files.read(f"a/{number}") for number, _ in won] == [b"%d" % writer for _, writer in won]


def test_a_bucket_that_is_missing_is_named(google_bucket: str) -> None:
    refuse_unusable(f"gs://{google_bucket}/none/yet")
    with pytest.raises(ConfigError, match=f"found no bucket '{google_bucket}-no'; expected one that is there"):
        refuse_unusable(f"gs://{google_bucket}-no/x")


@pytest.mark.parametrize("fault", ["403", "500", "dropped"])
def test_what_fails_for_good_is_told_in_one_message(
    fault: str, google_bucket: str, server: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"gs://{google_bucket}/x"
    files = open_files(url)
    assert isinstance(files, RemoteFiles)
    files.patience = 0.1
    calls: dict[str, Callable[[], Any]] = {
        "read": lambda: files.read("a/b"),
        "names": lambda: files.names(""),
        "create": lambda: files._pipe_new("a/c", b"1"),
        "exists": files.exists,
    }
    for what, call in calls.items():
        server.begin(fault, lambda *_: True)
        with pytest.raises(ConfigError if fault == "403" else UnavailableError) as caught:
            call()
        assert server.struck, what
        assert str(caught.value).startswith(f"{url}: ")
        assert str(caught.value).count("\n") == 1
    # gcsfs would log each with its traceback
    assert [found for found in caplog.records if found.name.split(".")[0] in ("dataflex", "gcsfs")] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("often", "step"), [(1, 1), (7, 3)])  # gcsfs gives up behind the sixth
def test_every_request_of_a_store_may_fail(often: int, step: int, google_bucket: str, server: Proxy) -> None:
    kinds = itertools.cycle(FAULTS[: None if often == 1 else -1])
    assert lived_through(f"gs://{google_bucket}", server, kinds, often, step) > 20


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_launches_share_the_work(google_bucket: str) -> None:
    from benchmarks.launches import launched, synthetic
    from dataflex.access.grid import SMALLEST

    url = f"gs://{google_bucket}/root"
    rows = launched(url, 2, 30, 0.05, leases=True)
    assert 30 * SMALLEST <= sum(rows) <= 1.1 * 30 * SMALLEST, rows
    (store,) = StoreRoot(url).stores()
    assert store.rows == 30 * SMALLEST
    assert store.contains(np.unique(synthetic(30 * SMALLEST).keys)).all()
    assert store.files.names(f"{store.folder}/tmp") == []
