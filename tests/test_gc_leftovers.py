"""What a crash left is removed once it is old, and what was or will be committed is not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from dataflex.stores.files import LocalFiles
from dataflex.stores.record import seal
from dataflex.stores.root import StoreRoot
from dataflex.stores.upkeep.gc import Scope, plan
from dataflex.stores.upkeep.removal import carry_out
from tests.looked_at import problems
from tests.removals import collect, content, going
from tests.roots import LINEAGE, age, make_state, make_store

pytestmark = pytest.mark.usefixtures("unsynced")


def test_leftovers(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path / "root")
    store = make_store(files, 1)
    make_state(files, tmp_path / "state")
    intact = content(tmp_path / "root")
    lost = [
        f"{store.folder}/data/{'0' * 64}.parquet",
        f"{store.folder}/tmp/{'1' * 32}",
        f"{store.folder}/log/note.txt",
        f"states/{LINEAGE}/{'2' * 32}/adapter.safetensors",
        f"states/{'3' * 32}/{'4' * 32}/adapter.safetensors",
        f"states/tmp/{'5' * 32}",
        f"runs/tmp/{'6' * 32}",
        f"loss-{'7' * 32}/data/{'8' * 64}.parquet",
    ]
    for path in lost:
        (tmp_path / "root" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / path).write_bytes(b"left by a crash")
    (tmp_path / "root" / "notes of mine.txt").write_bytes(b"keep")
    assert going(collect(files, Scope(leftovers=True))) == set()  # a live writer may be about to commit them
    assert len(content(tmp_path / "root")) == len(intact) + len(lost) + 1
    age(tmp_path / "root")
    young = f"{store.folder}/data/{'9' * 64}.parquet"
    (tmp_path / "root" / young).write_bytes(b"of a live writer")
    items = plan(files, Scope(leftovers=True))
    assert sorted(file.path for item in items for file in item.files if item.goes) == sorted(lost)
    collect(files, Scope(leftovers=True))
    assert content(tmp_path / "root") == intact | {"notes of mine.txt": b"keep", young: b"of a live writer"}
    assert [problem.path for problem in problems(store)] == [young]
    assert not (tmp_path / "root" / f"loss-{'7' * 32}").exists()


def test_a_leftover_that_is_committed_meanwhile_stays(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    store = make_store(files, 1, fragments=1)
    whole = make_store(LocalFiles(tmp_path / "elsewhere"), 1)
    (data,) = set(os.listdir(Path(whole.path) / "data")) - set(os.listdir(Path(store.path) / "data"))
    shutil.copy(Path(whole.path) / "data" / data, Path(store.path) / "data" / data)  # written, not committed: a crash
    shutil.rmtree(tmp_path / "elsewhere")
    age(tmp_path)
    planned = plan(files, Scope(leftovers=True))
    assert going(planned) == {("leftovers", store.folder)}
    make_store(files, 1)  # the same values again, committed this time
    carry_out(files, planned, Scope(leftovers=True))
    assert problems(StoreRoot(tmp_path).stores()[0]) == []
    assert store.rows == 10


def test_data_of_a_damaged_log_entry_is_left_to_repair(tmp_path: Path) -> None:
    store = make_store(LocalFiles(tmp_path), 1)
    (Path(store.path) / "log" / "f0.json").write_bytes(b"{}")
    age(tmp_path)
    assert plan(LocalFiles(tmp_path), Scope(leftovers=True)) == []


def test_what_a_newer_dataflex_wrote_is_left_alone(tmp_path: Path) -> None:
    store = make_store(LocalFiles(tmp_path), 1)
    path = Path(store.path) / "log" / "f9.json"
    path.write_bytes(seal({"x": 1}).replace(b'"format": 1', b'"format": 9'))
    age(tmp_path)
    assert going(plan(LocalFiles(tmp_path), Scope(leftovers=True))) == set()
