"""A round that was written comes back as it was or not at all, and a checkpoint counts only if it is whole."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dataflex.checkpoints.marks import incomplete_reason, mark_complete, newest_complete, require_whole, unmark
from dataflex.errors import CorruptionError, MismatchError
from dataflex.fingerprint import digest
from dataflex.rows import KEY_DTYPE
from dataflex.schedule import Round
from dataflex.trainers.journal import Journal
from dataflex.trainers.resumption import Resumption
from dataflex.trainers.rounds import DecidedRound, micro_batches
from tests.held import pool

ROUND = Round(2, "update", 10, 2, 0, 2)
KEYS = np.frombuffer(np.random.default_rng(0).bytes(16 * 9), dtype=KEY_DTYPE)
ROWS = replace(
    pool(9),
    keys=KEYS,
    dataset=np.array([0] * 5 + [1] * 4, np.int32),
    index=np.array([0, 1, 3, 4, 7, 2, 1, 0, 5]),
    length=np.arange(9, dtype=np.int32) + 20,
    names=("first", "second", "target"),
)


def decided() -> DecidedRound:
    rows = np.array([3, 1, 1, 8])
    return DecidedRound(
        ROUND, rows, np.array([0.5, np.nan, -1.0, 2.0]), np.array([0, -1, 3, 0], np.int32), {"method": "x"}
    )


def test_a_round_comes_back_as_it_was(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rounds")
    assert journal.read(ROUND, KEYS, 2) is None
    journal.write(decided(), ROWS)
    found = journal.read(ROUND, KEYS, 2)
    assert found is not None
    assert found.rows.tolist() == [3, 1, 1, 8]
    np.testing.assert_array_equal(found.scores, decided().scores)
    assert found.ages.tolist() == [0, -1, 3, 0]
    assert found.info == {"method": "x"}
    assert [p.name for p in (tmp_path / "rounds").iterdir()] == ["round-00002.parquet"]
    table = pq.read_table(journal.path(2))
    assert table["dataset"].to_pylist() == ["first", "first", "first", "second"]
    assert table["record"].to_pylist() == [4, 1, 1, 5]
    assert table["tokens"].to_pylist() == [23, 21, 21, 28]


def test_a_round_without_the_later_columns_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(decided(), ROWS)
    table = pq.read_table(journal.path(2))
    pq.write_table(table.drop_columns(["dataset", "record", "tokens"]), journal.path(2))
    found = journal.read(ROUND, KEYS, 2)
    assert found is not None
    assert found.rows.tolist() == [3, 1, 1, 8]


def test_a_round_of_other_data_or_another_schedule_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(decided(), ROWS)
    with pytest.raises(MismatchError, match="not the rows of this training set"):
        journal.read(ROUND, KEYS[::-1], 2)
    with pytest.raises(MismatchError, match="not the rows of this training set"):
        journal.read(ROUND, KEYS[:5], 2)
    with pytest.raises(MismatchError, match="schedule"):
        journal.read(Round(2, "update", 12, 2, 0, 2), KEYS, 2)


def test_a_round_of_another_batch_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(decided(), ROWS)
    with pytest.raises(MismatchError, match=r"global batch of 4\. Resume with .* that give 2 rows per step"):
        journal.read(ROUND, KEYS, 4)


def test_a_damaged_round_is_never_used(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(decided(), ROWS)
    path = journal.path(2)
    whole = path.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CorruptionError, match="round-00002"):
            journal.read(ROUND, KEYS, 2)


def test_a_damaged_pool_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write_pool(1, np.zeros(3), np.zeros(3, np.int32), np.zeros(3), np.zeros(3))
    path = tmp_path / "pool-00001.parquet"
    whole = path.read_bytes()
    journal.write(decided(), ROWS)
    for damaged in (b"", whole[:20], whole[:-1], bytes(len(whole)), journal.path(2).read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(CorruptionError, match="pool-00001"):
            journal.read_pool(1)
    journal.path(2).write_bytes(whole)  # a pool in a round's place
    with pytest.raises(CorruptionError, match="round-00002"):
        journal.read(ROUND, KEYS, 2)


def test_the_pool_keeps_what_cannot_be_chosen_apart(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.read_pool(1) is None
    journal.write_pool(1, np.array([1.5, -np.inf, np.nan]), np.array([0, 1, 1], np.int32), np.zeros(3), np.zeros(3))
    found = journal.read_pool(1)
    assert found is not None
    assert found[0].tolist() == [1.5, -np.inf, -np.inf]
    assert found[1].tolist() == [0, 1, 1]


def test_rounds_travel_with_a_checkpoint(tmp_path: Path) -> None:
    journal, copy = Journal(tmp_path / "a"), Journal(tmp_path / "b")
    journal.write(decided(), ROWS)
    journal.copy_to(tmp_path / "b", [1, 2])
    journal.clear()
    assert journal.numbers() == []
    assert copy.numbers() == [2]
    assert copy.read(ROUND, KEYS, 2) is not None


def test_a_round_that_is_a_link_is_copied(tmp_path: Path) -> None:
    """As in a checkpoint made of a kept state, which may be gone when the run goes on."""
    Journal(tmp_path / "kept").write(decided(), ROWS)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "round-00002.parquet").symlink_to(tmp_path / "kept" / "round-00002.parquet")
    own = tmp_path / "own"
    own.mkdir()
    (own / "round-00002.parquet").symlink_to(tmp_path / "nowhere")  # of an earlier run
    Journal(linked).copy_to(own, [2])
    (tmp_path / "kept" / "round-00002.parquet").unlink()
    found = Journal(own).read(ROUND, KEYS, 2)
    assert found is not None
    assert found.rows.tolist() == [3, 1, 1, 8]
    assert [path.name for path in own.iterdir()] == ["round-00002.parquet"]


def make_checkpoint(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt", "sub/rng.pth"):
        (folder / name).write_bytes(os.urandom(10))
    mark_complete(folder, {"global_step": 3})
    return folder


def test_a_checkpoint_lacking_any_file_is_incomplete(tmp_path: Path) -> None:
    names = ["trainer_state.json", "optimizer.pt", "sub/rng.pth", "dataflex/complete.json"]
    for number, name in enumerate(names):
        folder = make_checkpoint(tmp_path / f"{number}")
        assert incomplete_reason(folder) is None
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1])
        assert incomplete_reason(folder) is not None
        (folder / name).unlink()
        assert Path(name).name in str(incomplete_reason(folder))


def test_a_mark_that_was_never_finished_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "again" / "dataflex").mkdir(parents=True)
    (tmp_path / "again" / "dataflex" / ".complete.json").write_text("{")
    assert incomplete_reason(make_checkpoint(tmp_path / "again")) is None


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    assert newest_complete(tmp_path) == (None, [])
    for step in (3, 20, 100):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-100" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-final").mkdir()
    found, skipped = newest_complete(tmp_path)
    assert found == str(tmp_path / "checkpoint-20")
    assert [Path(path).name for path, _ in skipped] == ["checkpoint-100"]
    assert "optimizer.pt is missing" in skipped[0][1]


def test_a_checkpoint_that_was_renamed_is_not_gone_on_from(tmp_path: Path) -> None:
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        mark_complete(folder, {})
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-50")
    found, ((_, reason),) = newest_complete(tmp_path)
    assert found == str(tmp_path / "checkpoint-2")
    assert reason == "its trainer_state.json is of step 4: was the folder renamed? Call it checkpoint-4 again"
    named = {"output_dir": str(tmp_path), "resume_from_checkpoint": str(tmp_path / "checkpoint-50")}
    with pytest.raises(MismatchError, match="is of step 4"):
        Resumption.of(named, takes_unmarked=False).arguments()
    (tmp_path / "checkpoint-50").rename(tmp_path / "best")  # a name that says nothing of a step
    assert incomplete_reason(tmp_path / "best") is None


def test_any_changed_byte_makes_a_checkpoint_incomplete(tmp_path: Path) -> None:
    """Sizes stay as they are; the mark's own bytes count too, as what it says of the optimizer does."""
    folder = make_checkpoint(tmp_path / "checkpoint-3")
    draw = random.Random(0)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for _ in range(200):
        path = draw.choice(paths)
        data = path.read_bytes()
        at = draw.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
        reason = incomplete_reason(folder)
        # JSON may be written in several ways; a byte of white space between its parts says nothing.
        meant = path.name != "complete.json" or json.loads(data) != read_json(path)
        assert (reason is not None) == meant, (path, at)
        assert reason is None or path.name in reason
        path.write_bytes(data)
    assert incomplete_reason(folder) is None
    (folder / "optimizer.pt").write_bytes(b"x" * 10)
    with pytest.raises(CorruptionError, match=r"checkpoint-3 is damaged: optimizer\.pt is damaged"):
        require_whole(folder)
    assert incomplete_reason(folder, contents=False) is None


def read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError:
        return None


@pytest.mark.parametrize(
    "mark",
    [
        None,
        [],
        {},
        {"files": None},
        {"version": 1, "files": None},
        {"version": 1, "files": {"optimizer.pt": None}},
        {"version": 2, "files": {}},
        {"version": 2, "files": {"optimizer.pt": 10}},
        {"version": 2, "files": {"optimizer.pt": {}}},
        {"version": "2", "files": {"optimizer.pt": {"bytes": 10, "sha256": 0}}},
        {"version": 3, "files": {"optimizer.pt": {"bytes": "ten", "sha256": None}}},
        "[" * 100_000,
    ],
)
def test_a_mark_that_is_none_is_said_to_be_damaged(tmp_path: Path, mark: object) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-3")
    for signed in (mark, mark | {"digest": digest(mark)}) if isinstance(mark, dict) else (mark,):
        text = signed if isinstance(signed, str) else json.dumps(signed)
        (folder / "dataflex" / "complete.json").write_text(text)
        assert "complete.json is damaged" in str(incomplete_reason(folder))
        with pytest.raises(CorruptionError, match=r"complete\.json is damaged"):
            require_whole(folder)


def test_a_checkpoint_may_get_files_that_no_loader_reads(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-3")
    (folder / "preprocessor_config.json").write_text("{}")
    assert incomplete_reason(folder) is None
    (folder / "model.safetensors").write_bytes(b"planted")
    assert "model.safetensors was put there after" in str(incomplete_reason(folder))


def test_a_mark_of_sizes_alone_is_taken_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-3")
    mark = folder / "dataflex" / "complete.json"
    files = {name: about["bytes"] for name, about in json.loads(mark.read_text())["files"].items()}
    mark.write_text(json.dumps({"version": 1, "files": files, "global_step": 3}))
    assert incomplete_reason(folder) is None
    assert "contents are not checked" in caplog.text
    (folder / "optimizer.pt").write_bytes(b"short")
    assert "optimizer.pt has 5 bytes, 10 were written" in str(incomplete_reason(folder))


def test_a_folder_without_a_mark_is_no_checkpoint_of_ours(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-3")
    unmark(folder)
    require_whole(folder)
    assert "has no dataflex/complete.json" in str(incomplete_reason(folder))


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2), (4, 1), (2, 1), (1, 1)])
def test_the_rows_of_a_step_depend_on_the_global_batch_alone(world: int, accumulation: int) -> None:
    rows, steps, batch = np.random.default_rng(1).permutation(48), 3, 16
    dealt = [micro_batches(rows, steps, accumulation, world, rank) for rank in range(world)]
    for step in range(steps):
        mine = [part for rank in dealt for part in rank[step * accumulation : (step + 1) * accumulation]]
        assert {len(part) for part in mine} == {batch // world // accumulation}
        assert sorted(row for part in mine for row in part) == sorted(rows[step * batch : (step + 1) * batch].tolist())
