"""What many fragments, many launches and one slow rank cost.

A store of 1,024 numbers a row as int8, 100 rows to a fragment, and what one process pays to open it, to ask it, and to
score its rows (`benchmarks.store_scale`); the share of the rows that launches compute twice, and what they ask an
object store; what a job takes of which one rank is slow.

python -m benchmarks.scale --fragments 1000 10000      # and what launches share
python -m benchmarks.scale --launches                  # that alone
python -m benchmarks.scale --launches --s3
python -m benchmarks.scale --slow-rank
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.launches import job, launched, synthetic
from benchmarks.object_store import Proxy, serving
from benchmarks.store_scale import LOOKS, build, compact, look
from dataflex.access.grid import SMALLEST
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout, Values

LAUNCHES = ((2, 0.0, 100, True), (4, 0.3, 100, True), (2, 0.0, 500, False))
"""Launches, seconds between them, cells, and whether with leases."""


def looks(fragments: int) -> None:
    """Print what a store costs to open and to ask, before and after its log is compacted."""
    with tempfile.TemporaryDirectory() as root:
        build(root, fragments)
        print(f"{fragments:,} fragments of 100 rows, not compacted")
        look("open", root)
        compact(root)
        print(f"{fragments:,} fragments of 100 rows, compacted")
        for what in LOOKS:
            look(what, root)


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
    norms, vectors = np.ones(100, np.float32), np.ones((100, 16), np.float32)

    def anew() -> ParquetStore:
        return StoreRoot(url).open("gradient", {"synthetic": True}, Layout({"norm": "float32"}, 16, "int8"))

    def counted(what: str, call: Callable[[], Any], by: int = 1) -> None:
        proxy.begin()
        call()
        print(f"  {what:60} {len(proxy.seen) / by:6.2f} requests")

    store = anew()

    def append() -> None:
        for number, part in enumerate(parts):
            store.append(f"f{number:08d}", Values(part, np.zeros(100, np.uint8), {"norm": norms}, vectors))

    counted("a fragment appended", append, fragments)
    counted("first look, log and data files, for each fragment", lambda: anew().contains(keys), fragments)
    store.compact()
    counted("first look, compacted, for the whole store", lambda: anew().contains(keys))
    store.contains(keys)
    counted("all rows read, for each fragment", lambda: store.read(keys), fragments)
    counted("all rows read again, for each fragment", lambda: store.read(keys), fragments)


def slow_rank(seconds: float, slow: float) -> None:
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
    parser.add_argument("--launches", action="store_true", help="what launches compute twice, alone")
    parser.add_argument("--s3", action="store_true", help="on an S3 server of this machine's (moto), and its requests")
    parser.add_argument("--slow-rank", action="store_true", help="what one rank of a job costs that is slow, alone")
    parser.add_argument("--slower", type=float, default=3.0, help="times as long on the slow rank")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a cell on the others")
    args = parser.parse_args()
    if args.slow_rank:
        slow_rank(args.seconds, args.slower)
    elif args.launches and args.s3:
        with serving(os.environ) as proxy, tempfile.TemporaryDirectory() as cache:
            os.environ["DATAFLEX_CACHE"] = cache
            proxy.make_bucket("bucket")
            share_work(lambda number: f"s3://bucket/{number}", proxy)
            requests(f"s3://bucket/{len(LAUNCHES)}", proxy)
    else:
        for fragments in () if args.launches else args.fragments:
            looks(fragments)
        with tempfile.TemporaryDirectory() as root:
            share_work(lambda number: f"{root}/{number}", None)


if __name__ == "__main__":
    main()
