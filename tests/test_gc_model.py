"""Random runs, writers, crashes and removals never lose what a model beside them says must still be there."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.errors import ConflictError
from dataflex.rows import KEY_DTYPE
from dataflex.stores.root import StoreRoot, folder_name
from dataflex.stores.runs import RunRecord, read_runs
from dataflex.stores.upkeep.gc import Scope, plan
from dataflex.stores.upkeep.removal import carry_out
from dataflex.stores.values import Layout, Values
from tests.looked_at import faults
from tests.mortal import Killed, Mortal

LAYOUT = Layout({"value": "int64"})


class Collected:
    """`committed` is what a protected store must still hold; a store is protected while a run in `using` uses it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.committed: dict[int, set[int]] = {}
        self.using: dict[int, set[int]] = {}

    def files(self, left: int = 10**9) -> Mortal:
        return Mortal(self.folder, left)

    def use(self, run: int, store: int, fragment: int, dies: int, finishes: bool) -> None:
        """A run uses a store, writes a fragment, and may be killed on the way."""
        files = self.files(dies)
        record = RunRecord(files, f"out/{run}", "train", "identity")
        noted = False
        try:
            record.uses("store", folder_name("loss", {"r": store}))
            noted = True
            self.using.setdefault(run, set()).add(store)
            opened = StoreRoot(files).open("loss", {"r": store}, LAYOUT)
            self.recorded(store, opened.committed_fragments())
            opened.append(f"f{fragment}", values(fragment))
            self.committed.setdefault(store, set()).add(fragment)
            if finishes:
                record.finish()
        except ConflictError:  # refused, because a removal of the store was broken off
            assert noted
        except Killed:
            pass

    def recorded(self, store: int, fragments: list[str]) -> None:
        """What is found in a store is used from then on, whoever committed it."""
        self.committed[store] = {int(name.removeprefix("f")) for name in fragments}

    def pass_time(self, hours: int) -> None:
        """Everything gets older."""
        for path in self.folder.rglob("*"):
            if path.is_file():
                then = path.stat().st_mtime - 3600 * hours
                os.utime(path, (then, then))

    def collect(self, hours: int, named: list[int], unreferenced: bool, include_finished: bool, dies: int) -> None:
        """Some time later, a removal, which may be killed."""
        self.pass_time(hours)
        known = {run: each for run in named for each in read_runs(self.files()) if each.is_called(f"out/{run}")}
        scope = Scope(tuple(f"out/{run}" for run in known), unreferenced, True, include_finished and bool(known))
        day_ago = time.time() - 24 * 3600
        for run, each in known.items():
            finished = each.was_finished and not (not each.is_over and each.modified >= day_ago)
            running = not each.is_over and each.modified >= day_ago
            if not running and (not finished or include_finished):
                self.using.pop(run, None)  # it may go
        files = self.files()
        planned = plan(files, scope)
        files.left = dies
        try:
            carry_out(files, planned, scope)
        except Killed:
            pass

    def what_is_used_is_there(self) -> None:
        """Every store that a protected run uses holds what was committed, and nothing in it is damaged."""
        root = StoreRoot(self.files())
        for store in {store for stores in self.using.values() for store in stores}:
            found = root.find("loss", {"r": store})
            assert found is not None or not self.committed.get(store)
            if found is None:
                continue
            there = {int(name[1:]) for name in found.committed_fragments()}
            assert self.committed.get(store, set()) <= there
            for fragment in there:
                read = found.read(values(fragment).keys)
                np.testing.assert_array_equal(read.scalars["value"], values(fragment).scalars["value"])
        for each in root.stores():
            assert faults(each) == []
        self.committed = {
            store: fragments
            for store, fragments in self.committed.items()
            if any(store in stores for stores in self.using.values())
        }


def values(fragment: int) -> Values:
    keys = np.array([bytes([fragment, i]) + b"x" * 14 for i in range(3)], "S16").view(KEY_DTYPE)
    columns: dict[str, Any] = {"value": np.arange(3, dtype=np.int64) + 10 * fragment}
    return Values(keys, np.zeros(3, np.uint8), columns)


@pytest.mark.parametrize("seed", range(4))
def test_what_a_run_uses_outlives_every_removal(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    for episode in range(10):
        model = Collected(tmp_path / str(episode))
        for _ in range(15):
            dies = draw.choice([10**9, draw.randint(1, 60)])
            if draw.random() < 0.6:
                model.use(draw.randrange(3), draw.randrange(2), draw.randrange(4), dies, draw.random() < 0.5)
            else:
                named = draw.sample(range(3), draw.choice([0, 0, 1, 2]))
                model.collect(draw.choice([0, 1, 30]), named, draw.random() < 0.5, draw.random() < 0.5, dies)
            model.what_is_used_is_there()
        # Whatever happened, what is old can all be removed.
        model.pass_time(100)
        names = tuple(run.id for run in read_runs(model.files()))
        scope = Scope(names, unreferenced=True, leftovers=True, include_finished=bool(names))
        carry_out(model.files(), plan(model.files(), scope), scope)
        assert [path for path in model.folder.rglob("*") if path.is_file()] == []
