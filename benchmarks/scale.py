"""What a store of many fragments costs to open and to ask, and how much launches that share one compute twice.

CPU seconds, requests and bytes read of the first look of a process (opening, membership and status of every row) with
and without the compacted log, and of a gather of rows. Vectors are small: it is fragments that are counted.

python -m benchmarks.scale --fragments 1000 10000 --rows 100
python -m benchmarks.scale --launches
python -m benchmarks.scale --launches --s3
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from benchmarks.launches import launched, synthetic
from benchmarks.object_store import Proxy, serving
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


LAUNCHES = ((2, 0.0, 100, True), (4, 0.3, 100, True), (2, 0.0, 500, False))
"""Launches, seconds between them, cells, and whether with leases."""


def share_work(root: Callable[[int], str], proxy: Proxy | None) -> None:
    """Print how many rows launches that share a store compute, and what they ask an object store."""
    for number, (launches, apart, cells, leases) in enumerate(LAUNCHES):
        if proxy is not None:
            proxy.begin()
        begun = time.process_time()
        rows = launched(root(number), launches, cells, 0.05, leases, apart)
        kind = "with leases" if leases else "without leases"
        share = sum(rows) / (cells * SMALLEST)
        print(f"{launches} launches {apart} s apart, {cells} cells, {kind}: {share:.1%} of the rows, {rows}")
        if proxy is not None:
            spent = time.process_time() - begun
            print(
                f"  {len(proxy.seen) / cells:.1f} requests a cell; the server and the proxy were busy for {spent:.0f} s"
            )


def requests(url: str, proxy: Proxy, fragments: int = 40) -> None:
    """Print what a store of so many fragments asks an object store, by what is done."""
    keys = synthetic(fragments * 100).keys
    parts = [keys[start : start + 100] for start in range(0, len(keys), 100)]
    norms, vectors = np.ones(100, np.float32), np.ones((100, LAYOUT.width), np.float32)
    store = StoreRoot(url).open("gradient", {"synthetic": True}, LAYOUT)

    def counted(what: str, call: Callable[[], Any], by: int = 1) -> None:
        proxy.begin()
        call()
        print(f"  {what:60} {len(proxy.seen) / by:6.2f} requests")

    def append() -> None:
        for number, part in enumerate(parts):
            store.append(f"f{number:08d}", Values(part, np.zeros(100, np.uint8), {"norm": norms}, vectors))

    def anew() -> ParquetStore:
        return StoreRoot(url).open("gradient", {"synthetic": True}, LAYOUT)

    counted("a fragment appended", append, fragments)
    counted("first look, log and data files, for each fragment", lambda: anew().contains(keys), fragments)
    store.compact()
    counted("first look, compacted, for the whole store", lambda: anew().contains(keys))
    store.contains(keys)
    counted("all rows read, for each fragment", lambda: store.read(keys), fragments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fragments", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--rows", type=int, default=100, help="of a fragment")
    parser.add_argument("--launches", action="store_true", help="what launches compute twice, alone")
    parser.add_argument("--s3", action="store_true", help="on an S3 server of this machine's (moto), and its requests")
    args = parser.parse_args()
    if args.launches and args.s3:
        with serving(os.environ) as proxy:
            proxy.make_bucket("bucket")
            share_work(lambda number: f"s3://bucket/{number}", proxy)
            requests(f"s3://bucket/{len(LAUNCHES)}", proxy)
        return
    if args.launches:
        with tempfile.TemporaryDirectory() as root:
            share_work(lambda number: f"{root}/{number}", None)
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
