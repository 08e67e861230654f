"""A root with stores, kept states and runs."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.memory import MemoryFileSystem

from dataflex.rows import KEY_DTYPE
from dataflex.stores.files import Files
from dataflex.stores.leases import Lease
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import StoreRoot, open_files
from dataflex.stores.runs import RunRecord
from dataflex.stores.upkeep.inspection import inspect
from dataflex.stores.values import Layout, Values

LAYOUT = Layout({"norm": "float32"}, 8, "float16")


LINEAGE = "ab" * 16


def values(number: int) -> Values:
    rng = np.random.default_rng(number)
    keys = np.array([bytes([number, i]) + b"x" * 14 for i in range(5)], "S16").view(KEY_DTYPE)
    vectors = rng.standard_normal((5, 8), np.float32)
    return Values(keys, np.zeros(5, np.uint8), {"norm": rng.random(5, np.float32)}, vectors)


def empty_root(kind: str, folder: Path) -> Files:
    """Return a root without anything in it: `local` on disk, `memory` on an object store."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]  # which would be listed as folders
    return open_files({"local": f"{folder}/root", "memory": "memory://tested/root"}[kind])


def make_store(files: Files, number: int, fragments: int = 2) -> ParquetStore:
    store = StoreRoot(files).open("gradient", {"r": number}, LAYOUT)
    for each in range(fragments):
        store.append(f"f{each}", values(each))
    return store


def make_state(files: Files, folder: Path, lineage: str = LINEAGE) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "adapter.safetensors").write_bytes(b"w" * 1000)
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "rng.json").write_bytes(b"{}")
    StoreRoot(files).states.put(lineage, folder, {})
    return lineage


def record(files: Files, output_dir: str, *uses: tuple[str, str], finished: bool = True) -> RunRecord:
    run = RunRecord(files, output_dir, "train", "identity", "less")
    for kind, name in uses:
        run.uses(kind, name)  # type: ignore[arg-type]
    if finished:
        run.finish()
    return run


def age(folder: Path, hours: float = 48) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - 3600 * hours,) * 2)


def stored(folder: Path) -> dict[tuple[str, bytes], bytes]:
    """Return every value under a root, the sum of a loss or a vector, by store and key; none may be there twice."""
    found: dict[tuple[str, bytes], bytes] = {}
    for store in StoreRoot(folder).stores():
        for block in store.scan():
            numbers = block.scalars["loss_sum"] if block.vectors is None else block.vectors
            some = {(store.folder, k.tobytes()): v.tobytes() for k, v in zip(block.keys, numbers, strict=True)}
            assert len(some) == len(block.keys)
            assert not some.keys() & found.keys()
            found |= some
    return found


def life(url: str) -> None:
    """Open a store, append under a lease, read, compact, and read again as another process would."""
    store = StoreRoot(url).open("gradient", {"r": 1}, LAYOUT)
    lease = Lease(store.files, [f"{store.folder}/tmp/f0.lease"])
    assert lease.take()
    with lease.held():
        assert store.append("f0", values(0))
    assert store.compact()
    read = StoreRoot(url).open("gradient", {"r": 1}, LAYOUT).read(values(0).keys)
    assert (read.scalars["norm"] == values(0).scalars["norm"]).all()


def check(files: Files) -> None:
    """Everything is there once and whole, and nothing else is there."""
    (store,) = StoreRoot(files).stores()
    assert store.committed_fragments() == ["f0"]
    assert store.rows == 5
    assert [file.path.split("/")[1] for file in files.stored("")] == ["data", "derived", "log", "recipe.json"]


def lived_through(root: str, server: Any, faults: Iterable[str], often: int = 1, step: int = 1) -> int:
    """Live a store's life anew for each `step`-th request that fails, `often` in a row; return how many there were."""
    for number, fault in zip(itertools.count(0, step), faults, strict=False):
        url = f"{root}/{number}"
        server.begin(fault, lambda found, *_: number <= found < number + often)  # noqa: B023
        life(url)
        struck = server.struck
        server.begin()
        check(open_files(url))
        if not struck:
            break
    assert [part for part in inspect(open_files(url)) if part.problems] == []
    return number
