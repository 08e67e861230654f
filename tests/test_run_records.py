"""A run is known by the stores and states that it used, whoever writes that down and whatever prevents it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dataflex.errors import DataflexError
from dataflex.stores.files import Files, LocalFiles
from dataflex.stores.root import StoreRoot
from dataflex.stores.runs import RunRecord, read_runs
from dataflex.stores.upkeep.gc import Scope, plan
from tests.removals import collect, going
from tests.roots import LINEAGE, empty_root, record

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture(params=["local", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    return empty_root(request.param, tmp_path)


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
