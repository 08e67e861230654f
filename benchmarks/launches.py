"""How much is computed twice where several launches, or the ranks of one job, fill one store together.

A source that sleeps stands for the model; the stores, the commits and the leases are real.

python -m benchmarks.launches STORE --launches 4 --apart 0.3
python -m benchmarks.launches s3://bucket/store --launches 2 --no-leases --cells 500
torchrun --nproc-per-node 2 -m benchmarks.launches STORE --worker --slow-rank 3
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dataflex import distributed
from dataflex.access.fragments import NonfiniteLimit, Tally, Work, cells_of
from dataflex.access.grid import SMALLEST, Grid
from dataflex.access.progress import Progress
from dataflex.features.spec import FeatureSpec, FeatureValues, LossSpec
from dataflex.launch import free_port
from dataflex.rows import Rows, Status, Text
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout


class Sleeping:
    """Takes a while for every row; its values are a function of the row's key."""

    is_collective = False

    def __init__(self, seconds: float):
        self.seconds = seconds

    def keys(self, rows: Rows) -> np.ndarray:
        """Return the rows' own."""
        return rows.keys

    def recipe(self, spec: FeatureSpec) -> dict[str, Any]:
        """Return what names the values."""
        return {"synthetic": True}

    def width(self, spec: FeatureSpec) -> int:
        """Return 0: there are no vectors."""
        return 0

    def require(self, wanted: object) -> None:
        """Refuse nothing."""

    def compute(
        self, rows: Rows, at: np.ndarray, specs: Sequence[FeatureSpec], min_batches: int
    ) -> list[FeatureValues]:
        """Sleep, and return numbers between 0 and 1."""
        time.sleep(self.seconds * len(at))
        sums = rows.keys[at].view(np.uint64).reshape(-1, 2)[:, 0] / 2**64
        scalars = {"loss_sum": sums, "tokens": np.ones(len(at), np.int32)}
        return [FeatureValues(np.full(len(at), Status.OK, np.uint8), scalars, None) for _ in specs]


def synthetic(count: int) -> Rows:
    """Return rows that have keys and lengths, and no tokens."""
    keys = np.frombuffer(hashlib.shake_256(b"rows").digest(16 * count), "V16")
    ones = np.ones(count, np.int32)
    return Rows(
        examples=[],
        keys=keys,
        dataset=np.zeros(count, np.int32),
        index=np.arange(count),
        length=ones,
        supervised=ones,
        truncated=None,
        names=["synthetic"],
        dropped=None,
        text=lambda row: Text("", ""),
    )


def fill(url: str, cells: int, seconds: float, leases: bool) -> Tally:
    """Fill the store with what it lacks; return what this process did of it."""
    rows, spec = synthetic(cells * SMALLEST), LossSpec()
    store = StoreRoot(url).open(spec.kind, {"synthetic": True}, Layout(dict(spec.scalars)))
    keys, at = np.unique(rows.keys, return_index=True)
    absent = distributed.broadcast(~store.contains(keys)[None])
    found = cells_of(Grid(keys, SMALLEST), keys, at, {spec: store}, absent)
    tally = Tally()
    limit = NonfiniteLimit(0.0, len(rows))
    Work(Sleeping(seconds / SMALLEST), rows, found, 8192, limit, leases).run(tally, Progress())
    return tally


def launched(url: str, launches: int, cells: int, seconds: float, leases: bool, apart: float = 0.0) -> list[int]:
    """Start launches that share a store; return the rows that each computed.

    Args:
        url: of the root.
        launches: how many.
        cells: of the dataset, 64 rows each.
        seconds: that a cell takes.
        leases: whether they tell each other where they are.
        apart: seconds between their starts.
    """
    command = [sys.executable, "-m", "benchmarks.launches", url, "--worker", "--cells", str(cells)]
    command += ["--seconds", str(seconds), *([] if leases else ["--no-leases"])]
    begun = []
    for _ in range(launches):
        begun.append(subprocess.Popen([*command, "--wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for process in begun:  # they start together, whatever importing takes
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in begun:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        time.sleep(apart)
    return [int(json.loads(process.communicate()[0])["computed"]) for process in begun]


def job(url: str, ranks: int, cells: int, seconds: float, slow: float) -> list[dict[str, Any]]:
    """Start one job of several ranks; return what each computed, and how long it took, in the order of the ranks.

    Args:
        url: of the root.
        ranks: how many; the second is slower than the others.
        cells: of the dataset, 64 rows each.
        seconds: that a cell takes.
        slow: times as long on the slow rank.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port"]
    command += [str(free_port()), "-m", "benchmarks.launches", url, "--worker", "--cells", str(cells)]
    command += ["--seconds", str(seconds), "--slow-rank", str(slow)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return sorted(map(json.loads, ran.stdout.splitlines()), key=lambda line: line["rank"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--launches", type=int, default=2)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.05, help="of a cell")
    parser.add_argument("--apart", type=float, default=0.0, help="seconds between the starts")
    parser.add_argument("--no-leases", action="store_true")
    parser.add_argument("--worker", action="store_true", help="be one of the launches")
    parser.add_argument("--wait", action="store_true", help="a worker begins when it is told")
    parser.add_argument("--slow-rank", type=float, default=1.0, help="how much slower rank 1 of a job is")
    args = parser.parse_args()
    if not args.worker:
        rows = launched(args.url, args.launches, args.cells, args.seconds, not args.no_leases, args.apart)
        print(f"{rows} rows computed, {sum(rows) / (args.cells * SMALLEST):.1%} of {args.cells * SMALLEST}")
        return
    if distributed.world() > 1:
        import torch.distributed as dist

        dist.init_process_group("gloo")
    if args.wait:
        print("ready", flush=True)
        sys.stdin.readline()
    distributed.barrier()
    begun = time.monotonic()
    seconds = args.seconds * (args.slow_rank if distributed.rank() == 1 else 1)
    tally = fill(args.url, args.cells, seconds, not args.no_leases)
    print(json.dumps({"rank": distributed.rank(), "computed": tally.computed, "seconds": time.monotonic() - begun}))
    distributed.barrier()
    distributed.leave()


if __name__ == "__main__":
    main()
