"""A store and a dictionary that Hypothesis drives side by side agree: append, crash, damage, repair, read."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dataflex.rows import KEY_DTYPE
from dataflex.stores.files import LocalFiles
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.record import unseal
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout, Values
from tests.looked_at import faults, repaired
from tests.mortal import Killed, Mortal

LAYOUT = Layout({"value": "int64"}, 4, "int8")
UNIVERSE = 12


def row_keys(numbers: list[int]) -> np.ndarray:
    return np.array([bytes(7) + bytes([n]) + bytes(8) for n in numbers], "S16").view(KEY_DTYPE)


def values_of(numbers: list[int], value: int) -> Values:
    vectors = np.repeat(np.array([[value, -value, 0, 1]], np.float32), len(numbers), axis=0)
    status = np.array([2 if n == UNIVERSE - 1 else 0 for n in numbers], np.uint8)
    return Values(row_keys(numbers), status, {"value": np.full(len(numbers), value, np.int64)}, vectors)


class Model(RuleBasedStateMachine):
    """A dictionary of fragments that the store must agree with at any time."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.fragments: dict[str, tuple[list[int], int]] = {}
        self.clock = 0
        self.store = self.opened(LocalFiles(self.folder))

    def opened(self, files: LocalFiles) -> ParquetStore:
        return StoreRoot(files).open("loss", {"r": 1}, LAYOUT)

    def expected(self) -> dict[int, int]:
        out: dict[int, int] = {}
        for _, (numbers, value) in sorted(self.fragments.items()):
            for n in numbers:
                out.setdefault(n, 0 if n == UNIVERSE - 1 else value)
        return out

    numbers = st.lists(st.integers(0, UNIVERSE - 1), min_size=1, max_size=6)
    names = st.sampled_from("abcdefgh")

    @rule(name=names, numbers=numbers)
    def append(self, name: str, numbers: list[int]) -> None:
        if name in self.fragments:
            numbers = self.fragments[name][0]
        self.clock += 1
        kept = self.store.append(name, values_of(numbers, self.clock))
        # Rows that are not usable are zeros whatever their value: then the same bytes are committed already.
        assert kept == (name not in self.fragments or set(numbers) == {UNIVERSE - 1})
        self.fragments.setdefault(name, (numbers, self.clock))

    @rule(name=names, numbers=numbers, n=st.integers(1, 14))
    def die_while_appending(self, name: str, numbers: list[int], n: int) -> None:
        if name in self.fragments:
            return
        self.clock += 1
        files = Mortal(self.folder)
        store = self.opened(files)
        files.left = n
        try:
            store.append(name, values_of(numbers, self.clock))
        except Killed:
            pass
        files.left = 10**9
        if name in self.opened(LocalFiles(self.folder)).committed_fragments():
            self.fragments[name] = (numbers, self.clock)

    @rule()
    def reopen(self) -> None:
        self.store = self.opened(LocalFiles(self.folder))

    @precondition(lambda self: self.fragments)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.fragments)))
        log = Path(self.store.path, "log", f"{name}.json")
        path = log
        if data.draw(st.booleans()):
            path = Path(self.store.path, "data", unseal(log.read_bytes(), "it")["data"] + ".parquet")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x55
        path.write_bytes(bytes(content))
        found = faults(self.store)
        assert len(found) == 1
        repaired(self.store)
        self.fragments.pop(name)

    @rule(numbers=numbers)
    def read(self, numbers: list[int]) -> None:
        expected = self.expected()
        numbers = [n for n in numbers if n in expected]
        found = self.store.read(row_keys(numbers))
        assert found.scalars["value"].tolist() == [expected[n] for n in numbers]
        assert found.status.tolist() == [2 if n == UNIVERSE - 1 else 0 for n in numbers]
        assert found.vectors is not None
        np.testing.assert_allclose(found.vectors[:, 0], [expected[n] for n in numbers], rtol=1e-6)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        expected = self.expected()
        found = self.store.contains(row_keys(list(range(UNIVERSE))))
        assert found.tolist() == [n in expected for n in range(UNIVERSE)]
        scanned: dict[bytes, Any] = {}
        for block in self.store.scan(3, vectors=False):
            for key, value in zip(block.keys, block.scalars["value"], strict=True):
                assert key.tobytes() not in scanned
                scanned[key.tobytes()] = value
        assert scanned == {row_keys([n])[0].tobytes(): value for n, value in expected.items()}
        assert faults(self.store) == []

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)
