"""A removal that is killed at any change, or meets a run that starts, loses nothing that is referred to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from dataflex.errors import ConflictError
from dataflex.stores.files import LocalFiles
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import REMOVING, StoreRoot
from dataflex.stores.runs import read_runs
from dataflex.stores.upkeep.gc import Scope, plan
from dataflex.stores.upkeep.removal import carry_out
from tests.looked_at import faults, problems
from tests.mortal import Killed, Mortal
from tests.removals import collect, content, staying
from tests.roots import LAYOUT, LINEAGE, age, make_state, make_store, record, values

pytestmark = pytest.mark.usefixtures("unsynced")


def test_a_crash_at_every_single_change(tmp_path: Path) -> None:
    made = LocalFiles(tmp_path / "made")
    kept, lost = make_store(made, 1), make_store(made, 2)
    make_state(made, tmp_path / "state")
    record(made, "a", ("store", kept.folder))
    record(made, "b", ("store", kept.folder), ("store", lost.folder), ("state", LINEAGE))
    age(tmp_path / "made")
    scope = Scope(runs=("b",), include_finished=True)
    protected = {path: data for path, data in content(tmp_path / "made").items() if path.startswith(kept.folder)}
    for n in range(1, 100):
        root = tmp_path / str(n)
        shutil.copytree(tmp_path / "made", root)
        files = Mortal(root)
        planned = plan(files, scope)
        files.left = n
        try:
            carry_out(files, planned, scope)
        except Killed:
            pass
        again = StoreRoot(root)
        if (root / lost.folder / REMOVING).exists():
            with pytest.raises(ConflictError, match="is being removed"):
                again.open("gradient", {"r": 2}, LAYOUT)
        else:
            found = again.find("gradient", {"r": 2})
            assert found is None or (found.rows, faults(found)) == (10, [])
        # Whatever the crash left is removed later, under any name: the run may be gone, the removal half done.
        collect(LocalFiles(root), Scope(leftovers=True, unreferenced=True, grace_hours=0))
        if any(run.is_called("b") for run in read_runs(LocalFiles(root))):
            collect(LocalFiles(root), scope)
        assert {path: data for path, data in content(root).items() if path.startswith(kept.folder)} == protected
        assert {path.split("/")[0] for path in content(root)} == {kept.folder, "runs"}
        assert [run.output_dir for run in read_runs(LocalFiles(root))] == [os.path.abspath("a")]
        assert make_store(LocalFiles(root), 2).rows == 10
        if files.left > 0:
            break
    assert 15 < n < 99


def test_order_of_a_removal(tmp_path: Path) -> None:
    class Told(LocalFiles):
        def remove(self, path: str) -> None:
            told.append(path.removeprefix(f"{store.folder}/").partition("/")[0])
            super().remove(path)

    told: list[str] = []
    store = make_store(LocalFiles(tmp_path), 1)
    (tmp_path / store.folder / "derived").mkdir()
    (tmp_path / store.folder / "derived" / "index").write_bytes(b"x")
    age(tmp_path)
    collect(Told(tmp_path), Scope(unreferenced=True))
    # What names goes before what is named, and the mark, which keeps runs out, goes last.
    assert told == ["recipe.json", "log", "log", "data", "data", "derived", REMOVING]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["before the mark", "after the mark"])
def test_a_run_that_starts_during_the_removal(tmp_path: Path, moment: str) -> None:
    class Late(LocalFiles):
        """Files on which a run starts just before, or just after, the mark is there."""

        def _link(self, temporary: Path, path: Path) -> bool:
            if path.name != REMOVING:
                return super()._link(temporary, path)
            if moment == "before the mark":
                start()
            made = super()._link(temporary, path)
            if moment == "after the mark":
                with pytest.raises(ConflictError, match="is being removed"):
                    start()
            return made

    def start() -> None:
        record(LocalFiles(tmp_path), "late", ("store", store.folder), finished=False)
        opened.append(make_store(LocalFiles(tmp_path), 1))

    opened: list[ParquetStore] = []
    store = make_store(LocalFiles(tmp_path), 1)
    age(tmp_path)
    items = collect(Late(tmp_path), Scope(unreferenced=True))
    assert "refers to it now" in staying(items)[store.folder]
    assert len(opened) == (moment == "before the mark")
    assert make_store(LocalFiles(tmp_path), 1).rows == 10  # the mark is withdrawn
    assert problems(StoreRoot(tmp_path).stores()[0]) == []


def test_a_store_written_to_by_nobody_known_stays(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    store = make_store(files, 1)
    age(tmp_path)
    planned = plan(files, Scope(unreferenced=True))
    store.append("f7", values(7))
    assert staying(carry_out(files, planned, Scope(unreferenced=True))) == {store.folder: "it was written to just now"}
    assert StoreRoot(tmp_path).stores()[0].rows == 15
