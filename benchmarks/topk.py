"""Speed and memory of the exact top-k over a synthetic store, which is removed afterwards.

python benchmarks/topk.py --rows 1000000 --dim 1024 --storage int8
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from dataflex.rows import KEY_DTYPE
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import StoreRoot
from dataflex.stores.rounding import STORAGES
from dataflex.stores.search.topk import top_k
from dataflex.stores.values import Layout, Values

FRAGMENT_ROWS = 16_384


def opened(folder: str, dim: int, storage: str) -> ParquetStore:
    return StoreRoot(folder).open("gradient", {"synthetic": True}, Layout({"norm": "float32"}, dim, storage))


def build(folder: str, rows: int, dim: int, storage: str) -> None:
    store = opened(folder, dim, storage)
    for number, start in enumerate(range(0, rows, FRAGMENT_ROWS)):
        count = min(FRAGMENT_ROWS, rows - start)
        rng = np.random.default_rng(number)
        vectors = rng.standard_normal((count, dim), np.float32)
        keys = np.frombuffer(rng.bytes(count * KEY_DTYPE.itemsize), KEY_DTYPE)
        norms = np.linalg.norm(vectors, axis=1)
        name = hashlib.sha256(keys.tobytes()).hexdigest()[:32]
        store.append(name, Values(keys, np.zeros(count, np.uint8), {"norm": norms}, vectors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--storage", choices=STORAGES, default="int8")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--block-rows", type=int, default=4096)
    parser.add_argument("--root", help="where the store is built; by default the system's folder for temporary files")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="dataflex-topk-", dir=args.root) as folder:
        start = time.perf_counter()
        # In another process, so that the peak printed below is that of the search.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(build, folder, args.rows, args.dim, args.storage).result()
        store = opened(folder, args.dim, args.storage)
        seconds = time.perf_counter() - start
        print(f"built {args.rows} rows, {store.bytes / 1e9:.2f} GB, in {seconds:.1f} s (random numbers included)")
        queries = np.random.default_rng(0).standard_normal((args.queries, args.dim), np.float32)
        before = peak()
        for name in ("first pass (SHA-256 of every file)", "second pass"):
            start, cpu = time.perf_counter(), time.process_time()
            top_k(store, queries, args.k, block_rows=args.block_rows)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            print(
                f"{name}: {args.rows / seconds:,.0f} rows/s, {args.rows / cpu:,.0f} rows/CPU-s, {seconds:.1f} s, "
                f"peak {peak():.0f} MB ({before:.0f} MB before)"
            )


def peak() -> float:
    """Return the largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
