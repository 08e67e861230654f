"""The grid: cells of a dataset's sorted keys, which no number of processes, no start time and no earlier work moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.launches import Sleeping, fill, synthetic
from dataflex.access.fragments import NonfiniteLimit, Tally, Work, cells_of, waves
from dataflex.access.grid import SMALLEST, Grid
from dataflex.access.progress import Progress
from dataflex.access.tickets import tickets, worth_waiting
from dataflex.features.spec import EmbeddingSpec, LossSpec
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout


def keys_of(count: int) -> np.ndarray:
    return np.unique(synthetic(count).keys)


@pytest.mark.parametrize(
    ("count", "most", "rows"),
    [(1, 2048, 64), (64, 2048, 64), (8192, 2048, 64), (8193, 2048, 65), (10**6, 2048, 2048), (1000, 16, 16)],
)
def test_rows_of_a_cell_follow_from_the_dataset_alone(count: int, most: int, rows: int) -> None:
    keys = np.zeros(count, "V16")  # how many there are is all that counts
    assert Grid(keys, most).rows == rows
    assert Grid(keys, most).name == f"g{rows}"


def test_what_is_asked_for_falls_into_the_same_cells_whatever_else_is_asked_for() -> None:
    keys = keys_of(500)
    grid = Grid(keys, 64)
    whole = [keys[part].tobytes() for part in grid.cells(keys)]
    assert b"".join(whole) == keys.tobytes()
    assert [len(part) // 16 for part in whole] == [64] * 7 + [52]
    rng = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.9):
        asked = keys[rng.random(len(keys)) < share]
        parts = [{key.tobytes() for key in asked[part]} for part in grid.cells(asked)]
        assert sum(map(len, parts)) == len(asked)
        for part in parts:  # each lies within one cell of the whole, and no other has a row of that cell
            (home,) = [cell for cell in whole if any(cell[i : i + 16] in part for i in range(0, len(cell), 16))]
            assert part == {k.tobytes() for k in asked} & {home[i : i + 16] for i in range(0, len(home), 16)}
    assert grid.cells(keys[:0]) == []


@pytest.fixture
def store(tmp_path: Path) -> ParquetStore:
    spec = LossSpec()
    return StoreRoot(tmp_path / "root").open(spec.kind, {"synthetic": True}, Layout(dict(spec.scalars)))


def test_a_cell_is_whole_unless_some_of_it_was_asked_for_before(store: ParquetStore) -> None:
    keys, spec = keys_of(200), LossSpec()
    grid, at = Grid(keys, 64), np.arange(200)
    nothing = np.ones((1, 200), bool)
    cells = cells_of(grid, keys, at, {spec: store}, nothing)
    assert [len(cell.keys) for cell in cells] == [64, 64, 64, 8]
    assert len({cell.name for cell in cells}) == 4
    committed = nothing.copy()
    committed[0, 64:128] = False
    again = cells_of(grid, keys, at, {spec: store}, committed)
    assert [cell.name for cell in again] == [cells[0].name, cells[2].name, cells[3].name]
    committed[0, 0:3] = False  # as after another request
    (rest, *_) = cells_of(grid, keys, at, {spec: store}, committed)
    assert rest.at.tolist() == list(range(3, 64))
    assert rest.name not in {cell.name for cell in cells}


def test_features_that_lack_the_same_rows_of_a_cell_are_computed_together(store: ParquetStore, tmp_path: Path) -> None:
    keys, at = keys_of(128), np.arange(128)
    spec, other = LossSpec(), EmbeddingSpec()
    second = StoreRoot(tmp_path / "root").open("embedding", {"synthetic": True}, Layout({}, 4))
    absent = np.ones((2, 128), bool)
    absent[1, :64] = False  # the first cell's embeddings are there
    first, last = cells_of(Grid(keys, 64), keys, at, {spec: store, other: second}, absent)
    assert (first.specs, last.specs) == ([spec], [spec, other])


def test_ranks_that_meet_in_every_layer_compute_the_same_features_at_a_time(
    store: ParquetStore, tmp_path: Path
) -> None:
    """Where one feature lacks other rows of a cell than another, the cell is done in two passes."""
    keys, at = keys_of(256), np.arange(256)
    spec, other = LossSpec(), EmbeddingSpec()
    second = StoreRoot(tmp_path / "root").open("embedding", {"synthetic": True}, Layout({}, 4))
    absent = np.ones((2, 256), bool)
    absent[0, ::2] = False
    cells = cells_of(Grid(keys, 64), keys, at, {spec: store, other: second}, absent)
    assert [tuple(cell.specs) for cell in cells] == [(spec,), (other,)] * 4
    for world in (1, 2, 3):
        found = list(waves(cells, world))
        assert all(len({tuple(cell.specs) for cell in wave}) == 1 and len(wave) <= world for wave in found)
        assert sorted(cell.name for wave in found for cell in wave) == sorted(cell.name for cell in cells)


def test_what_another_launch_commits_meanwhile_is_not_computed(store: ParquetStore, tmp_path: Path) -> None:
    rows, spec = synthetic(192), LossSpec()
    keys, at = np.unique(rows.keys, return_index=True)
    cells = cells_of(Grid(keys, SMALLEST), keys, at, {spec: store}, np.ones((1, 192), bool))
    assert fill(str(tmp_path / "root"), 1, 0.0, True).computed == 64  # of the first 64 rows, in a grid of their own
    tally, other = Tally(), Tally()
    Work(Sleeping(0), rows, cells, 8192, NonfiniteLimit(0, 192)).run(tally, Progress())
    Work(Sleeping(0), rows, cells, 8192, NonfiniteLimit(0, 192)).run(other, Progress())
    assert (tally.computed, other.computed, other.reused) == (192, 0, 192)


def test_every_ticket_is_drawn_once() -> None:
    assert list(tickets(3)) == [0, 1, 2]
    assert list(tickets(0)) == []
    asked = iter([False] * 4)
    assert list(tickets(3, lambda: next(asked, True))) == [0, 1]  # it is asked before a ticket is drawn and after


def test_the_last_tickets_are_left_to_who_has_done_them_sooner() -> None:
    """In units of a ticket of one's own; the others have one in hand each, which comes first."""
    assert worth_waiting(3, left=1, others=1) == pytest.approx(2 / 3)  # one that is three times as fast
    assert worth_waiting(3, left=2, others=1) == 0  # it would have done both as soon
    assert worth_waiting(9, left=5, others=3) == pytest.approx(8 / 9)
    assert worth_waiting(9, left=6, others=3) == 0
    for others in (1, 3, 63):  # all are alike
        assert all(worth_waiting(others, left, others) == 0 for left in range(1, 200))
    assert worth_waiting(3, left=-1, others=1) == 0  # all are drawn, and each of two has asked once more
