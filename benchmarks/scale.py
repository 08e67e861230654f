"""What a store of many fragments costs to open and to ask, how much launches compute twice, what a slow rank costs.

CPU seconds, requests and bytes read of the first look of a process (opening, membership and status of every row) with
and without the compacted log, and of a gather of rows. Vectors are small: it is fragments that are counted.

python -m benchmarks.scale --fragments 1000 10000 --rows 100
python -m benchmarks.scale --launches
python -m benchmarks.scale --slow-rank
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from benchmarks.launches import job, launched, synthetic
from dataflex.access.grid import SMALLEST
from dataflex.stores.files import LocalFiles, Stored
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout, Values

LAYOUT = Layout({"norm": "float32"}, 16, "int8")


class Unsynced(LocalFiles):
    """Does not wait for the disk: the store is only built, and thrown away."""

    def _sync(self, file: BinaryIO) -> None:
        file.flush()

    def _sync_folder(self, folder: Path) -> None:
        pass


class Counting(LocalFiles):
    """Counts what an object store would be asked: a listing per thousand names, a request per file, the bytes."""

    def __init__(self, root: str):
        super().__init__(root)
        self.requests = self.bytes = 0

    def names(self, folder: str) -> list[str]:
        """List, and count."""
        found = super().names(folder)
        self.requests += 1 + len(found) // 1000
        return found

    def stored(self, folder: str) -> list[Stored]:
        """List, and count."""
        found = super().stored(folder)
        self.requests += 1 + len(found) // 1000
        return found

    def open(self, path: str) -> pa.NativeFile:
        """Open, and count all of the file."""
        self.requests += 1
        self.bytes += (self.root / path).stat().st_size
        return super().open(path)


def opened(files: LocalFiles) -> ParquetStore:
    return StoreRoot(files).open("gradient", {"synthetic": True}, LAYOUT)


def build(root: str, fragments: int, rows: int) -> np.ndarray:
    """Fill a store; return the keys."""
    keys = synthetic(fragments * rows).keys
    store, rng = opened(Unsynced(root)), np.random.default_rng(0)
    for number in range(fragments):
        part = keys[number * rows : (number + 1) * rows]
        vectors = rng.standard_normal((rows, LAYOUT.width), np.float32)
        norms = np.linalg.norm(vectors, axis=1)
        store.append(f"f{number:08d}", Values(part, np.zeros(rows, np.uint8), {"norm": norms}, vectors))
    return keys


def measured(what: str, files: Counting, call: Callable[[], Any]) -> None:
    """Call, and print what it took."""
    files.requests = files.bytes = 0
    begun = time.process_time()
    call()
    spent = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"  {what:44} {spent:8.2f} CPU-s {files.requests:8} requests {files.bytes / 1e6:10.1f} MB  peak {peak:.0f} MB"
    )


def look(files: Counting, keys: np.ndarray) -> None:
    store = opened(files)
    assert store.contains(keys).all()
    assert not store.read(keys, columns=[], vectors=False).status.any()


def looked_at(root: str, keys: np.ndarray) -> None:
    """Print what a store costs to open and to ask, before and after its log is compacted."""
    files = Counting(root)
    measured("first look, log and data files one by one", files, lambda: look(files, keys))
    measured("compacting (that look again, and the file)", files, lambda: opened(files).compact())
    measured("first look, compacted", files, lambda: look(files, keys))
    store = opened(files)
    store.contains(keys[:1])
    measured("another look of the same process", files, lambda: store.contains(keys))
    some = keys[np.random.default_rng(1).permutation(len(keys))[:1000]]
    measured("1,000 rows at random", files, lambda: store.read(some))


def share_work(seconds: float, slow: float) -> None:
    """Print what a job takes of which one rank is slower than the others, and the ideal: the work by all its speeds."""
    for ranks in (2, 4):
        for cells in (40, 41, 100):
            with tempfile.TemporaryDirectory() as root:
                found = job(root, ranks, cells, seconds, slow)
            assert sum(line["computed"] for line in found) == cells * SMALLEST
            ideal = cells * seconds / (ranks - 1 + 1 / slow)
            wall = max(line["seconds"] for line in found)
            done = [line["computed"] // SMALLEST for line in found]
            print(f"{ranks} ranks, {cells} cells: {wall:.2f} s, {wall / ideal:.3f} of the ideal; cells of each: {done}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fragments", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--rows", type=int, default=100, help="of a fragment")
    parser.add_argument("--launches", action="store_true", help="what launches compute twice, alone")
    parser.add_argument("--slow-rank", action="store_true", help="what one rank of a job costs that is slow, alone")
    parser.add_argument("--slower", type=float, default=3.0, help="times as long on the slow rank")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a cell on the others")
    args = parser.parse_args()
    if args.slow_rank:
        share_work(args.seconds, args.slower)
        return
    if args.launches:
        for launches, apart, cells, leases in ((2, 0.0, 100, True), (4, 0.3, 100, True), (2, 0.0, 500, False)):
            with tempfile.TemporaryDirectory() as root:
                rows = launched(root, launches, cells, 0.05, leases, apart)
            kind = "with leases" if leases else "without leases"
            share = sum(rows) / (cells * SMALLEST)
            print(f"{launches} launches {apart} s apart, {cells} cells, {kind}: {share:.1%} of the rows, {rows}")
        return
    for fragments in args.fragments:
        root = tempfile.mkdtemp()
        try:
            print(f"{fragments} fragments of {args.rows} rows")
            looked_at(root, build(root, fragments, args.rows))
        finally:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
