"""Parts of many files: what near parts of a file cost in requests, and that they are the bytes asked for."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.object_store import Proxy
from dataflex.errors import ConfigError, CorruptionError, MismatchError
from dataflex.fingerprint import digest
from dataflex.stores import extents, remote_file
from dataflex.stores.extents import merged
from dataflex.stores.files import Extent, Files, LocalFiles
from dataflex.stores.record import FORMAT, read_records, seal
from dataflex.stores.remote_files import RemoteFiles
from dataflex.stores.root import StoreRoot, open_files
from tests.roots import LAYOUT, record, values

DATA = np.random.default_rng(0).bytes(300_000)
EXTENTS = st.tuples(
    st.sampled_from(["a/x", "a/y", "a/none"]),
    st.integers(0, 400_000),
    st.none() | st.integers(0, 400_000),
).map(lambda e: (e[0], e[1], e[2] if e[2] is None else e[1] + e[2]))


@pytest.fixture(scope="module")
def memory() -> Files:
    files = open_files("memory://fetched/root")
    for name in ("a/x", "a/y"):
        with files.output(name) as file:
            file.write(DATA)
    return files


@given(st.lists(EXTENTS, max_size=12))
def test_parts_are_the_bytes_asked_for(memory: Files, wanted: list[Extent]) -> None:
    assert memory.fetch(wanted) == [None if path == "a/none" else DATA[start:stop] for path, start, stop in wanted]


@given(st.lists(EXTENTS, max_size=12))
def test_requests_hold_their_parts_and_are_near_or_alone(wanted: list[Extent]) -> None:
    found = merged(wanted)
    assert sorted(number for inside in found.values() for number in inside) == list(range(len(wanted)))
    for (path, start, stop), inside in found.items():
        parts = [wanted[number] for number in inside]
        assert {part[0] for part in parts} == {path}
        assert min(part[1] for part in parts) == start
        assert stop is None or all(part[2] is not None and part[2] <= stop for part in parts)


def test_near_parts_are_one_request_up_to_a_bound() -> None:
    gap, longest = extents.GAP, extents.LONGEST
    assert list(merged([("x", 0, 10), ("x", 10 + gap, 20 + gap)])) == [("x", 0, 20 + gap)]
    assert len(merged([("x", 0, 10), ("x", 11 + gap, 20 + gap)])) == 2
    assert len(merged([("x", 0, 10), ("y", 10, 20)])) == 2
    assert len(merged([("x", 0, longest), ("x", longest, longest + 1)])) == 2
    assert list(merged([("x", 0, 3 * longest), ("x", 5, 10)])) == [("x", 0, 3 * longest)]
    assert merged([("x", 5, 5), ("x", 5, 5)]) == {("x", 5, 6): [0, 1]}
    assert merged([("x", 0, None), ("x", 0, None)]) == {("x", 0, None): [0, 1]}


def test_what_it_costs_in_requests(bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    files = open_files(f"s3://{bucket}/x")
    with files.output("a/x") as file:
        file.write(DATA)
    with files.output("a/empty") as file:
        file.write(b"")

    def cost(requests: int) -> bool:
        seen = list(proxy.seen)
        proxy.begin()
        return len(seen) == requests

    assert cost(2)
    assert files.read("a/x", 100) == DATA[:100]
    assert cost(1)
    assert files.read("a/empty", 100) == files.read("a/empty") == b""
    assert cost(2)
    assert files.sha256("a/x") == hashlib.sha256(DATA).hexdigest()
    assert cost(1)
    wanted: list[Extent] = [("a/x", 0, 9), ("a/x", 20, 29), ("a/x", 299_990, 300_010), ("a/empty", 0, 1)]
    assert files.fetch(wanted) == [DATA[:9], DATA[20:29], DATA[-10:], b""]
    assert cost(3)
    assert files.fetch([("a/x", 300_000, 300_001), ("a/none", 0, None), ("a/x", 4, 4)]) == [b"", None, b""]
    assert cost(3)
    with files.open("a/x") as source:
        source.seek(-10, 2)
        assert source.read() == DATA[-10:]
        source.seek(100)
        assert source.read(5) + source.read(5) == DATA[100:110]
    assert cost(3)
    assert files.names("a") == ["empty", "x"]
    assert cost(1)
    monkeypatch.setattr("dataflex.stores.remote_files.LONGEST", 100_000)
    assert files.sha256("a/x") == hashlib.sha256(DATA).hexdigest()
    assert cost(4)  # the last finds the end
    monkeypatch.setattr(remote_file, "BUFFER", 1000)
    with pytest.raises(FileNotFoundError):
        files.read("a/none")
    with pytest.raises(FileNotFoundError):
        files.open("a")


def test_a_reader_of_a_store_asks_for_the_new_entries_at_a_time(bucket: str, proxy: Proxy) -> None:
    store = StoreRoot(f"s3://{bucket}/x").open("gradient", {"r": 1}, LAYOUT)
    for number in range(3):
        store.append(f"f{number}", values(number))
    files = store.files
    assert isinstance(files, RemoteFiles)
    asked: list[int] = []
    fetch = files.fetch
    files.fetch = lambda wanted: asked.append(len(wanted)) or fetch(wanted)  # type: ignore[method-assign, func-returns-value]
    assert store.rows == 15
    assert asked == [3]


def test_requests_of_many_parts_are_under_way_together(bucket: str, proxy: Proxy) -> None:
    files = open_files(f"s3://{bucket}/x")
    for number in range(8):
        assert files.create(f"a/{number}", b"x")
    proxy.begin("slow", lambda *_: True, seconds=0.5)
    begun = time.monotonic()
    assert files.fetch([(f"a/{number}", 0, 1) for number in range(8)]) == [b"x"] * 8
    assert time.monotonic() - begun < 8 * 0.5


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_documents_are_read_together_and_each_for_itself(kind: str, tmp_path: Path) -> None:
    files = LocalFiles(tmp_path) if kind == "local" else open_files(f"memory://{tmp_path.name}")
    newer = {"format": FORMAT + 1}
    documents = {
        "whole": seal({"x": 1}),
        "cut": seal({"x": 1})[:-5],
        "long": seal({"x": "y" * 300_000}),
        "newer": json.dumps({**newer, "digest": digest(newer)}).encode(),
    }
    for name, data in documents.items():
        assert files.create(f"a/{name}.json", data)
    if kind == "local":
        (tmp_path / "a" / "folder.json").mkdir()
    names = ["whole", "none", "cut", "newer", "folder" if kind == "local" else "none", "whole", "long"]
    found = list(read_records(files, [f"a/{name}.json" for name in names]))
    assert found[0] == found[5] == {"x": 1, "format": 1}
    assert found[6] == {"x": "y" * 300_000, "format": 1}
    assert found[1] is None
    assert isinstance(found[2], CorruptionError)
    assert isinstance(found[3], MismatchError)
    assert found[4] is None or "is a folder; expected a file" in str(found[4])


def test_a_bucket_that_goes_away_is_not_taken_for_an_empty_one(bucket: str) -> None:
    with pytest.raises(ConfigError, match=f"found no bucket '{bucket}-gone'"):
        open_files(f"s3://{bucket}-gone/x").exists()
    files = open_files(f"s3://{bucket}")
    assert files.exists()  # a bucket without anything in it
    assert not open_files(f"s3://{bucket}/x").exists()
    record(open_files(f"s3://{bucket}/x"), "/out", ("store", "loss-x"))
    assert open_files(f"s3://{bucket}/x").exists()
