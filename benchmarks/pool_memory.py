"""What choosing from a pool of many rows takes: memory of a rank, and CPU-seconds, of every method that reads vectors.

The pool is a store of R rows of 1,024 numbers, kept as int8, the targets are 1,000 rows in four sets; where a method
wants embeddings and gradients, both are read from there. Each method runs in a process of its own. Memory is the peak
of its resident size above what it had with the keys of all rows read and nothing chosen; the model is not there.

python -m benchmarks.pool_memory --rows 100000 1000000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.access.views import StoreView
from dataflex.components.registry import SELECTORS
from dataflex.rows import KEY_DTYPE, Rows, Text
from dataflex.schedule import Round
from dataflex.selectors.base import Context
from dataflex.stores.files import LocalFiles
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout, Values

DIM, TARGETS, SETS, CHOSEN, FRAGMENT = 1024, 1000, 4, 10_000, 16_384
WIDE = {"kind": "gradient", "proj_dim": DIM}
ONCE = {"clustering_max_iter": 1, "representative_strategy": "nearest"}  # more iterations take time alone
EXACT = {"type": "exact_match"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "less": ("less", {}),
    "nice": ("nice", {"reward": EXACT}),
    "embedding, within: max": ("composed", {"representation": {"kind": "embedding"}, "within": "max"}),
    "embedding": ("embedding", {}),
    "rds_plus": ("rds_plus", {}),
    "near": ("near", {}),
    "tsds, uniform, max_K 5000": ("tsds", {"density": "uniform", "replacement": True}),
    "tsds, max_K 50": ("tsds", {"max_K": 50, "replacement": True}),
    "composed, whitened": ("composed", {"representation": WIDE, "similarity": "whitened_cosine"}),
    "influence_distillation": ("influence_distillation", {}),
    "cluster_less, 1,563 clusters": ("cluster_less", {**ONCE, "num_clusters": 1_563}),
    "cluster_less, 15,625 clusters": ("cluster_less", {**ONCE, "num_clusters": 15_625}),
}


def opened(root: str | LocalFiles, kind: str) -> ParquetStore:
    return StoreRoot(root).open("embedding", {"synthetic": kind}, Layout({}, DIM, "int8"))


def build(root: str, rows: int) -> None:
    """Fill the stores of the pool, in a thousand loose groups, and of the targets, near some of them."""
    from benchmarks.store_scale import Unsynced  # what it imports is no part of what is measured

    centres = np.random.default_rng(0).standard_normal((1000, DIM), np.float32)
    for kind, size, near in (("pool", rows, 1000), ("targets", TARGETS, 50)):
        store = opened(Unsynced(root), kind)
        for start in range(0, size, FRAGMENT):
            count = min(FRAGMENT, size - start)
            rng = np.random.default_rng([start, size])
            vectors = rng.standard_normal((count, DIM), np.float32) + 0.5 * centres[rng.integers(0, near, count)]
            keys = np.sort(np.frombuffer(rng.bytes(16 * count), "S16")).view(KEY_DTYPE)
            name = hashlib.sha256(keys.tobytes()).hexdigest()[:32]
            store.append(name, Values(keys, np.zeros(count, np.uint8), {}, vectors))
        store.compact()


def rows_of(store: ParquetStore) -> Rows:
    keys = np.concatenate([block.keys for block in store.scan(1 << 16, columns=[], vectors=False)])
    keys = keys[np.random.default_rng(0).permutation(len(keys))]
    ones = np.ones(len(keys), np.int32)
    return Rows([], keys, ones * 0, np.arange(len(keys)), ones, ones, None, ("pool",), None, lambda row: Text("", ""))


def choose(root: str, method: str) -> dict[str, float]:
    """Choose once; return MB above the beginning, and CPU-seconds."""
    name, params = METHODS[method]
    pool, targets = opened(root, "pool"), opened(root, "targets")
    rows, of_targets = rows_of(pool), rows_of(targets)
    sets = {f"set{n}": of_targets.take(np.arange(n, TARGETS, SETS)) for n in range(SETS)}

    def features(spec: Any, target: str | None = None, state: str | None = None, rows: Any = None) -> StoreView:
        if target is not None:
            return StoreView.of(targets, sets[target].keys)
        view = StoreView.of(pool, everything.keys)
        return view if rows is None else view.take(rows)

    everything = rows
    selector: Any = SELECTORS.load(name)
    made = selector(selector.Params.model_validate_json(json.dumps(params)))
    context = Context(rows, sets, features, Round(1, "update", CHOSEN, 1, 0, 1), 0, 1, [], 1)
    features(None)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begun = resident("VmRSS"), time.process_time()
    made.select(None, 0, CHOSEN, context=context)
    return {"MB": resident("VmHWM") - before, "seconds": time.process_time() - begun, "before": before}


def resident(field: str) -> float:
    """Return a size of this process in MB."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--root", help="where stores are built, and kept; by default a folder that is removed")
    parser.add_argument("--one", nargs=2, metavar=("ROOT", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(choose(*args.one)))
        return
    for rows in args.rows:
        root = str(Path(args.root or tempfile.mkdtemp(prefix="dataflex-pool-")) / f"{rows}")
        try:
            if not Path(root).exists():
                build(root, rows)
            for method in args.methods:
                command = [sys.executable, "-m", "benchmarks.pool_memory", "--one", root, method]
                threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
                ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads, check=False)
                if ran.returncode:
                    print(f"{rows:9,d} rows  {method:28} failed: {ran.stderr.strip().splitlines()[-1][:200]}")
                    continue
                found = json.loads(ran.stdout)
                print(
                    f"{rows:9,d} rows  {method:28} {found['MB']:7.0f} MB above {found['before']:.0f}, "
                    f"{found['seconds']:8.1f} CPU-s",
                    flush=True,
                )
        finally:
            if not args.root:
                shutil.rmtree(Path(root).parent)


if __name__ == "__main__":
    main()
