"""Removal of stores and states: never what a run refers to, never what is young, and nothing before it is asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dataflex.errors import ConfigError, DataflexError, MismatchError
from dataflex.stores.files import Files, LocalFiles
from dataflex.stores.root import StoreRoot, open_files
from dataflex.stores.runs import read_runs
from dataflex.stores.upkeep.gc import Scope, plan
from dataflex.stores.upkeep.listing import by_runs, lines_of
from dataflex.stores.upkeep.removal import carry_out
from tests.command import run
from tests.looked_at import faults
from tests.removals import collect, content, going, staying
from tests.roots import LAYOUT, LINEAGE, age, empty_root, make_state, make_store, record

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture(params=["local", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    return empty_root(request.param, tmp_path)


def test_unreferenced(files: Files, tmp_path: Path) -> None:
    used, unused = make_store(files, 1), make_store(files, 2)
    make_state(files, tmp_path / "state"), make_state(files, tmp_path / "state", "kept")
    record(files, "a", ("store", used.folder), ("state", "kept"), finished=False)
    before = {file.path for file in files.stored("")}
    assert going(plan(files, Scope(unreferenced=True))) == set()
    assert "younger than the grace period" in staying(plan(files, Scope(unreferenced=True)))[unused.folder]
    items = plan(files, Scope(unreferenced=True, grace_hours=0))
    assert going(items) == {("store", unused.folder), ("state", LINEAGE)}
    size = {item.name: item.bytes for item in items}
    assert size[unused.folder] == sum(file.bytes for file in files.stored(unused.folder)) > unused.bytes
    assert {file.path for file in files.stored("")} == before
    assert going(collect(files, Scope(unreferenced=True, grace_hours=0))) == going(items)
    assert {file.path.split("/")[0] for file in files.stored("")} == {used.folder, "states", "runs"}
    assert {file.path.split("/")[1] for file in files.stored("states")} == {"kept"}
    assert StoreRoot(files).states.fetch("kept", tmp_path / "scratch")
    assert [store.rows for store in StoreRoot(files).stores()] == [10]
    assert make_store(files, 2).rows == 10  # it can be made again
    if isinstance(files, LocalFiles):
        assert sorted(path.name for path in (files.root / "states").iterdir()) == ["kept", "tmp"]


def test_named_runs(files: Files, tmp_path: Path) -> None:
    own, shared, foreign = make_store(files, 1), make_store(files, 2), make_store(files, 3)
    make_state(files, tmp_path / "state")
    record(files, "a", ("store", own.folder), ("store", shared.folder), ("state", LINEAGE))
    record(files, "b", ("store", shared.folder), ("store", foreign.folder))
    a, b = (next(run for run in read_runs(files) if run.is_called(name)) for name in "ab")
    items = plan(files, Scope(runs=("a",)))
    assert (going(items), staying(items)) == (set(), {a.id: "it has finished; add --include-finished if it may go"})
    items = plan(files, Scope(runs=("a",), include_finished=True))
    assert going(items) == {("store", own.folder), ("state", LINEAGE), ("run", a.id)}
    assert staying(items) == {shared.folder: f"run {b.id[:8]} ({os.path.abspath('b')}) refers to it too"}
    both = plan(files, Scope(runs=(a.id, b.id[:10]), include_finished=True))
    assert {name for kind, name in going(both) if kind == "store"} == {own.folder, shared.folder, foreign.folder}
    assert len(read_runs(files)) == 2
    collect(files, Scope(runs=("a",), include_finished=True))
    assert [run.id for run in read_runs(files)] == [b.id]
    assert {store.folder for store in StoreRoot(files).stores()} == {shared.folder, foreign.folder}
    assert files.stored(f"runs/{a.id}") == files.stored(own.folder) == files.stored("states") == []
    for store in StoreRoot(files).stores():
        assert faults(store) == []


def test_a_run_that_may_be_live_is_never_touched(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    store = make_store(files, 1)
    record(files, "a", ("store", store.folder), finished=False)
    items = plan(files, Scope(runs=("a",), include_finished=True, unreferenced=True))
    (run,) = read_runs(files)
    assert going(items) == set()
    assert "may be running" in staying(items)[run.id]
    age(tmp_path)
    assert going(plan(files, Scope(unreferenced=True))) == set()  # not finished, but it refers to the store
    assert going(plan(files, Scope(runs=("a",)))) == {("store", store.folder), ("run", run.id)}
    planned = plan(files, Scope(runs=("a",)))
    record(files, "a", ("store", store.folder), finished=False)  # it is started again before the removal
    assert going(carry_out(files, planned, Scope(runs=("a",)))) == set()
    assert store.rows == 10


def test_scopes_are_refused(tmp_path: Path) -> None:
    record(LocalFiles(tmp_path), "a", ("state", "s"))
    with pytest.raises(ConfigError, match=r"--run .*--unreferenced .*--leftovers"):
        plan(LocalFiles(tmp_path), Scope())
    with pytest.raises(ConfigError, match="--include-finished: found no --run"):
        plan(LocalFiles(tmp_path), Scope(unreferenced=True, include_finished=True))
    with pytest.raises(ConfigError, match="--grace: found -1"):
        plan(LocalFiles(tmp_path), Scope(leftovers=True, grace_hours=-1))
    with pytest.raises(MismatchError, match=r"no run b is recorded under .*; found [0-9a-f]{8} \(.*/a\)"):
        plan(LocalFiles(tmp_path), Scope(runs=("b",)))


def test_a_storage_that_does_not_tell_ages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def modified(self: MemoryFileSystem, path: str) -> None:
        raise NotImplementedError

    make_store(open_files("memory://ageless"), 1)
    monkeypatch.setattr(MemoryFileSystem, "modified", modified)
    with pytest.raises(DataflexError, match="does not say when a file was written"):
        plan(open_files("memory://ageless"), Scope(unreferenced=True))


def test_what_an_older_engine_computed_is_named_as_such(files: Files, tmp_path: Path) -> None:
    """Whichever scope names it; what a run refers to stays, and rewards, of which no engine is part, are not older."""
    recipes: dict[str, dict[str, Any]] = {
        "old": {"numerics": {"engine": 1}},
        "held": {"numerics": {"engine": 1}, "r": 2},
        "encoder": {"encoder": {"files": "ab"}},
        "new": {"numerics": {"engine": 2}},
        "reward": {"feature": {"kind": "reward"}},
    }
    names = {name: StoreRoot(files).open("gradient", recipe, LAYOUT).folder for name, recipe in recipes.items()}
    for lineage, engine in (("old-state", 1), ("new-state", 2)):
        (tmp_path / lineage).mkdir()
        (tmp_path / lineage / "weights").write_bytes(b"w")
        StoreRoot(files).states.put(lineage, tmp_path / lineage, {"parent": {"numerics": {"engine": engine}}})
    record(files, "a", ("store", names["held"]))
    items = plan(files, Scope(older_engine=True, grace_hours=0), engine=2)
    assert going(items) == {("store", names["old"]), ("store", names["encoder"]), ("state", "old-state")}
    assert staying(items).keys() == {names["held"]}
    assert all("computed by engine 1, which this one (2) does not reuse" in item.why for item in items)
    told = {item.name: item.why for item in plan(files, Scope(unreferenced=True, grace_hours=0), engine=2)}
    assert {name for name, why in told.items() if "engine 1" in why} == {names["old"], names["encoder"], "old-state"}
    assert told.keys() >= {names["new"], names["reward"], "new-state"}
    assert plan(files, Scope(older_engine=True, grace_hours=0), engine=1) == []


def test_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    used, rest = make_store(files, 1), make_store(files, 2)
    record(files, "saves/a", ("store", used.folder), ("state", "gone"))
    age(tmp_path)
    root = ("--root", str(tmp_path))
    code, out, _ = run(capsys, "store", "ls", "--by-run", *root)
    assert code == 0
    assert f"{os.path.abspath('saves/a')}  train less, finished" in out
    assert "removed  gone" in out
    assert out.splitlines()[-2:] == ["no run", lines_of(by_runs(files))[-1]]
    assert rest.folder in out.splitlines()[-1]
    listed = json.loads(run(capsys, "store", "ls", "--by-run", "--json", *root)[1])
    assert [[use["name"] for use in each["uses"]] for each in listed] == [["gone", used.folder], [rest.folder]]
    code, _, err = run(capsys, "store", "gc", *root)
    assert code == 2
    assert "--unreferenced" in err
    before = content(tmp_path)
    code, out, _ = run(capsys, "store", "gc", "--unreferenced", *root)
    assert code == 0
    assert out.startswith("would go")
    assert out.endswith("would go; --delete removes them\n")
    assert content(tmp_path) == before
    told = json.loads(run(capsys, "store", "gc", "--run", "saves/a", "--json", "--delete", *root)[1])
    assert [(item["kind"], item["goes"]) for item in told["items"]] == [("run", False)]
    assert content(tmp_path) == before
    assert run(capsys, "store", "gc", "--unreferenced", "--delete", *root)[1].splitlines()[-1].startswith("removed 1 ")
    assert [store.folder for store in StoreRoot(tmp_path).stores()] == [used.folder]
    assert run(capsys, "store", "gc", "--leftovers", *root)[1] == "nothing to remove\n"
