"""The compacted log: opens a store in a few requests, says what the log says, and is not believed where it is stale."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores import parquet
from dataflex.stores.compacted import read_compacted, write_compacted
from dataflex.stores.files import LocalFiles
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout, Values
from tests.looked_at import problems, repaired

COUNT, ROWS = 12, 5


class Counting(LocalFiles):
    """Counts the files that are opened and the folders that are listed."""

    def __init__(self, root: Any):
        super().__init__(root)
        self.seen: list[str] = []

    def open(self, path: str) -> Any:
        self.seen.append(path)
        return super().open(path)

    def names(self, folder: str) -> list[str]:
        self.seen.append(folder)
        return super().names(folder)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_TAIL", 4)


def keys_of(number: int) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(number).bytes(16 * ROWS), KEY_DTYPE)


def values_of(number: int, more: float = 0.0) -> Values:
    status = np.where(np.arange(ROWS) == number % ROWS, Status.NO_LABELS, Status.OK).astype(np.uint8)
    return Values(keys_of(number), status, {"x": np.full(ROWS, number + more)}, np.full((ROWS, 3), number, np.float32))


def opened(root: Path, files: Any = None) -> ParquetStore:
    return StoreRoot(files or root).open("gradient", {"of": "it"}, Layout({"x": "float64"}, 3))


@pytest.fixture
def store(tmp_path: Path) -> ParquetStore:
    made = opened(tmp_path)
    for number in range(COUNT):
        made.append(f"f{number:02d}", values_of(number))
    made.compact()
    assert len(list(Path(made.path, "derived").iterdir())) == 1
    return made


def every_key() -> np.ndarray:
    return np.concatenate([keys_of(number) for number in range(COUNT)])


def test_membership_and_status_take_a_few_requests_and_no_data_file(store: ParquetStore, tmp_path: Path) -> None:
    files = Counting(tmp_path)
    again = opened(tmp_path, files)
    assert again.contains(every_key()).all()
    assert not again.contains(keys_of(COUNT)).any()
    status = again.read(every_key(), columns=[], vectors=False).status
    assert status.tolist() == [s for n in range(COUNT) for s in values_of(n).status]
    assert (again.rows, again.committed_fragments()) == (COUNT * ROWS, [f"f{n:02d}" for n in range(COUNT)])
    assert not [path for path in files.seen if "/data/" in path]
    assert not [path for path in files.seen if path.startswith(f"{store.folder}/log/")]
    assert len(files.seen) < 12
    assert again.version == store.version
    assert (again.read(every_key()).scalars["x"] == store.read(every_key()).scalars["x"]).all()


def test_what_is_committed_since_is_read_one_by_one_until_it_is_much(store: ParquetStore, tmp_path: Path) -> None:
    store.append("f90", values_of(90))
    other = opened(tmp_path)
    assert other.contains(keys_of(90)).all()
    other.compact()  # one entry is not much
    assert len(list(Path(store.path, "derived").iterdir())) == 1
    for number in range(91, 97):
        other.append(f"f{number}", values_of(number))
    other.compact()
    for number in range(97, 110):
        other.append(f"f{number}", values_of(number))
    other.compact()
    assert len(list(Path(store.path, "derived").iterdir())) == 2  # the newest, and the one before
    assert opened(tmp_path).contains(np.concatenate([keys_of(number) for number in range(90, 110)])).all()


def test_an_entry_that_is_gone_or_written_anew_is_not_believed(store: ParquetStore, tmp_path: Path) -> None:
    log = Path(store.path, "log")
    (log / "f03.json").unlink()
    assert not opened(tmp_path).contains(keys_of(3)).any()
    (log / "f04.json").unlink()
    opened(tmp_path).append("f04", values_of(4, more=0.5))
    assert set(opened(tmp_path).read(keys_of(4)).scalars["x"]) == {0.0, 4.5}  # the row without labels has zeros
    again = opened(tmp_path)
    again.append("f03", values_of(3))
    assert again.contains(every_key()).all()


def test_what_was_removed_and_written_anew_meanwhile_is_not_compacted_as_it_was(
    store: ParquetStore, tmp_path: Path
) -> None:
    """As `store repair` in one process and `featurize` in another do while a third has the store open."""
    shutil.rmtree(Path(store.path, "derived"))
    old = opened(tmp_path)
    assert old.contains(every_key()).all()
    entry = Path(store.path, "log", "f03.json")
    Path(store.path, "data", f"{json.loads(entry.read_text('utf-8'))['data']}.parquet").unlink()
    entry.unlink()
    opened(tmp_path).append("f03", values_of(3, more=0.5))
    old.compact()
    assert set(opened(tmp_path).read(keys_of(3)).scalars["x"]) == {0.0, 3.5}
    assert problems(store) == []


def test_one_that_says_another_thing_than_the_log_is_damage(store: ParquetStore, tmp_path: Path) -> None:
    held = read_compacted(store.files, store.folder)
    held["f03.json"] = replace(held["f03.json"], entry=replace(held["f03.json"].entry, data="0" * 64))
    write_compacted(store.files, store.folder, held)
    (problem,) = problems(store)
    assert "it is not what its name or the log says" in str(problem)
    repaired(store)
    assert problems(store) == []


def test_another_process_reads_what_was_compacted_meanwhile(tmp_path: Path) -> None:
    files = Counting(tmp_path)
    late = opened(tmp_path, files)
    assert not late.contains(keys_of(0)).any()
    made = opened(tmp_path)
    for number in range(COUNT):
        made.append(f"f{number:02d}", values_of(number))
    assert made.compact()
    late.look_anew()
    files.seen.clear()
    assert late.contains(every_key()).all()
    assert not [path for path in files.seen if "/data/" in path]


def test_a_copy_is_read_from_its_own_log(store: ParquetStore, tmp_path: Path) -> None:
    """Its log files may have been written at any time since."""
    other = tmp_path.with_name(f"{tmp_path.name}-copy")
    shutil.copytree(tmp_path, other)
    for path in other.rglob("*.json"):
        os.utime(path, (1, 1))
    files = Counting(other)
    assert opened(other, files).contains(every_key()).all()
    assert len([path for path in files.seen if "/log/" in path]) == COUNT


@pytest.mark.parametrize("flip", [3, -3, None])
def test_one_that_is_damaged_is_passed_over_and_repaired(
    store: ParquetStore, tmp_path: Path, flip: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = Path(store.path, "derived").iterdir()
    data = bytearray(path.read_bytes())
    if flip is None:
        data = data[: len(data) // 2]
    else:
        data[flip] ^= 1
    path.write_bytes(data)
    assert opened(tmp_path).contains(every_key()).all()
    assert "the log is read instead" in caplog.text
    (problem,) = problems(store)
    assert "is damaged: it is not what its name or the log says" in str(problem)
    repaired(store)
    assert not path.exists()
    assert problems(store) == []


def test_without_it_everything_is_there(store: ParquetStore, tmp_path: Path) -> None:
    shutil.rmtree(Path(store.path, "derived"))
    assert opened(tmp_path).contains(every_key()).all()
    opened(tmp_path).compact()
    assert len(list(Path(store.path, "derived").iterdir())) == 1


def test_a_root_that_takes_nothing_costs_time_alone(
    store: ParquetStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(Path(store.path, "derived"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalFiles, "_sync", full)
    again = opened(tmp_path)
    again.compact()
    assert "is not compacted" in caplog.text
    assert again.contains(every_key()).all()


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"data": "../../../victim"},
        {"data": "0" * 63 + "/"},
        {"bytes": "x"},
        {"rows": "5"},
        {"status": 1},
        {"more": 1},
    ],
)
def test_an_entry_that_the_log_could_not_hold_is_not_believed(
    store: ParquetStore, tmp_path: Path, said: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Also where its digest is right, as a writer's who means harm would be."""
    files = LocalFiles(tmp_path)
    [path] = [file.path for file in files.stored(f"{store.folder}/derived")]
    table = pq.read_table(tmp_path / path)
    about = [json.loads(text) for text in table.column("about").to_pylist()]
    about[3][1] |= said
    table = table.set_column(0, table.schema.field("about"), pa.array([json.dumps(each) for each in about]))
    files.remove(path)
    pq.write_table(table, tmp_path / "crafted", compression="NONE", use_dictionary=False)
    sha256 = files.sha256("crafted")
    (tmp_path / "crafted").rename(tmp_path / store.folder / "derived" / f"log-{COUNT * ROWS}-{sha256}.parquet")
    assert len(read_compacted(files, store.folder)) == (0 if said else COUNT)
    assert ("the log is read instead" in caplog.text) == bool(said)
    assert opened(tmp_path).contains(every_key()).all()
    assert len(problems(store)) == bool(said)


def test_rows_that_are_known_are_read_again_without_a_look_at_the_log(store: ParquetStore, tmp_path: Path) -> None:
    files = Counting(tmp_path)
    reader = opened(tmp_path, files)
    assert reader.contains(every_key()).all()
    files.seen.clear()
    for _ in range(3):
        assert sum(len(block.keys) for block in reader.scan(7, keys=every_key())) == COUNT * ROWS
    assert not [path for path in files.seen if path.endswith("/log")]
    store.append("another", values_of(77))
    keys = np.concatenate([every_key(), keys_of(77)])
    assert sum(len(block.keys) for block in reader.scan(7, keys=keys)) == len(keys)
    assert sum(len(block.keys) for block in reader.scan(7)) == len(keys)
