"""Runs and what they use; removal of stores, states and leftovers: never what a run refers to, never what is young."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dataflex.cli import main
from dataflex.errors import ConfigError, ConflictError, DataflexError, MismatchError
from dataflex.stores.files import Files, LocalFiles
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.record import seal
from dataflex.stores.root import REMOVING, StoreRoot, open_files
from dataflex.stores.runs import RunRecord, read_runs
from dataflex.stores.upkeep.gc import Item, Scope, plan
from dataflex.stores.upkeep.listing import by_runs, lines_of
from dataflex.stores.upkeep.removal import carry_out
from tests.looked_at import faults, problems
from tests.roots import LAYOUT, LINEAGE, age, make_state, make_store, record, values


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def going(items: list[Item]) -> set[tuple[str, str]]:
    return {(item.kind, item.name) for item in items if item.goes}


def staying(items: list[Item]) -> dict[str, str]:
    return {item.name: item.why for item in items if not item.goes}


def collect(files: Files, scope: Scope) -> list[Item]:
    return carry_out(files, plan(files, scope), scope)


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel outlives every process that dies here, so syncing would only add the disk's time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(params=["local", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    if request.param == "memory":
        MemoryFileSystem.store.clear()
    return open_files({"local": f"{tmp_path}/root", "memory": "memory://gc/root"}[request.param])


def test_a_run_is_known_by_what_it_used(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_runs(files) == []
    RunRecord(files, "unused", "train", "identity").finish()
    assert read_runs(files) == []  # a run without features leaves nothing
    first = record(files, "saves/a", ("store", "gradient-" + "0" * 32), ("state", LINEAGE), finished=False)
    first.uses("store", "gradient-" + "0" * 32)
    again = record(files, "saves/a", ("store", "gradient-" + "1" * 32), finished=False)
    other = record(files, "saves/b", ("state", LINEAGE))
    assert first.id == again.id != other.id
    found = {run.id: run for run in read_runs(files)}
    assert found.keys() == {first.id, other.id}
    run = found[first.id]
    assert run.uses == (("state", LINEAGE), ("store", "gradient-" + "0" * 32), ("store", "gradient-" + "1" * 32))
    assert (run.output_dir, run.verb, run.method) == (os.path.abspath("saves/a"), "train", "less")
    assert run.is_called("saves/a")
    assert run.is_called(run.id[:8])
    assert not run.is_called(run.id[:7])
    assert not run.is_called("saves")
    hour = 3600
    assert (run.state(time.time() - hour), run.state(time.time() + hour)) == ("running", "not finished")
    assert found[other.id].state(time.time() - hour) == "finished"
    first.finish()  # the earlier launch ended, the later one did not
    run = next(run for run in read_runs(files) if run.id == first.id)
    assert (run.state(time.time() - hour), run.state(time.time() + hour)) == ("running", "finished")


def test_a_root_that_cannot_be_written_is_no_obstacle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class ReadOnly(LocalFiles):
        def create(self, path: str, data: bytes) -> bool:
            raise DataflexError(f"cannot write {path}")

    run = record(ReadOnly(tmp_path), "out", ("state", "a"), ("state", "b"))
    assert caplog.text.count("this run is not recorded") == 1
    assert read_runs(LocalFiles(tmp_path)) == []
    assert run.id


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


class Killed(BaseException):
    """The process is gone."""


class Mortal(LocalFiles):
    """Files whose owner dies at the n-th change and can do nothing afterwards."""

    left = 10**9

    def step(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise Killed

    def _create(self, path: Path) -> BinaryIO:
        self.step()
        return super()._create(path)

    def _link(self, temporary: Path, path: Path) -> bool:
        self.step()
        return super()._link(temporary, path)

    def _unlink(self, path: Path) -> None:
        self.step()
        super()._unlink(path)

    def prune(self, folder: str) -> None:
        self.step()
        super().prune(folder)


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


def test_a_storage_that_does_not_tell_ages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def modified(self: MemoryFileSystem, path: str) -> None:
        raise NotImplementedError

    make_store(open_files("memory://ageless"), 1)
    monkeypatch.setattr(MemoryFileSystem, "modified", modified)
    with pytest.raises(DataflexError, match="does not say when a file was written"):
        plan(open_files("memory://ageless"), Scope(unreferenced=True))


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


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


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


def test_featurize_and_train_are_recorded(workspace) -> None:
    path = workspace.write("less", update_times=1)
    workspace.run("featurize", path)
    workspace.run("train", path)
    root = StoreRoot(workspace.folder / "store")
    runs = {run.verb: run for run in read_runs(root.files)}
    assert runs.keys() == {"featurize", "train"}
    everything = {("store", store.folder) for store in root.stores()}
    assert len(everything) == 2
    (lineage,) = (name for kind, name in runs["train"].uses if kind == "state")
    assert root.states.find(lineage) is not None
    for each in runs.values():
        assert set(each.uses) == everything | {("state", lineage)}
        assert each.output_dir == str(workspace.folder / "out" / "less")
        assert (each.method, each.state(0)) == ("less", "finished")
    assert going(plan(root.files, Scope(unreferenced=True, leftovers=True, grace_hours=0))) == set()
    output = str(workspace.folder / "out" / "less")
    collect(root.files, Scope(runs=(output,), include_finished=True))
    assert (root.stores(), root.states.find(lineage), read_runs(root.files)) == ([], None, [])
