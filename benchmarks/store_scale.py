"""What one process pays for a store of many fragments: to open it, to ask it, and to score its rows.

Each look is a process of its own: CPU seconds, requests as an object store would count them, bytes read, and the peak
of memory above what the process had before it looked. Rows of 1,024 numbers as int8, 100 to a fragment.

python -m benchmarks.store_scale build STORE --fragments 1000
python -m benchmarks.store_scale gather STORE
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.files import Extent, LocalFiles, Stored
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import StoreRoot
from dataflex.stores.search.topk import top_k
from dataflex.stores.values import Layout, Values

LAYOUT = Layout({"norm": "float32"}, 1024, "int8")
SOME = 10_000
"""Rows of a gather, or all where there are fewer."""


class Unsynced(LocalFiles):
    """Does not wait for the disk: the store is only built, and thrown away."""

    def _sync(self, file: BinaryIO) -> None:
        file.flush()

    def _sync_folder(self, folder: Path) -> None:
        pass


class Counting(LocalFiles):
    """Counts what an object store would be asked: a listing per thousand names, a request per part, the bytes."""

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

    def read(self, path: str, limit: int | None = None) -> bytes:
        """Read, and count."""
        data = super().read(path, limit)
        self._count(1, len(data))
        return data

    def fetch(self, wanted: Sequence[Extent]) -> list[bytes | None]:
        """Read parts, and count them."""
        found = super().fetch(wanted)
        self._count(len(found), sum(len(part or b"") for part in found))
        return found

    def sha256(self, path: str) -> str:
        """Hash, and count."""
        self._count(1, (self.root / path).stat().st_size)
        return super().sha256(path)

    def _count(self, requests: int, size: int) -> None:
        self.requests += requests
        self.bytes += size


def opened(files: LocalFiles) -> ParquetStore:
    return StoreRoot(files).open("gradient", {"synthetic": True}, LAYOUT)


def keys_of(fragments: int, rows: int) -> np.ndarray:
    """Return the keys of the store's rows, fragment by fragment: ranges of the sorted ones, as the cells of a grid."""
    raw = np.frombuffer(np.random.default_rng(0).bytes(16 * fragments * rows), "S16")
    return np.sort(raw).view(KEY_DTYPE)


def build(root: str, fragments: int, rows: int = 100) -> None:
    """Fill a store."""
    keys = keys_of(fragments, rows)
    store, rng = opened(Unsynced(root)), np.random.default_rng(1)
    for number in range(fragments):
        part = keys[number * rows : (number + 1) * rows]
        vectors = rng.standard_normal((rows, LAYOUT.width), np.float32)
        norms = np.linalg.norm(vectors, axis=1)
        store.append(f"f{number:08d}", Values(part, np.zeros(rows, np.uint8), {"norm": norms}, vectors))
    np.save(Path(root, "keys.npy"), keys.view("u1"))


def compact(root: str) -> None:
    """Put the store's log into one file."""
    opened(Unsynced(root)).compact()


def near(store: ParquetStore, keys: np.ndarray) -> None:
    """Find the ten nearest rows of a thousand targets."""
    from dataflex.access.views import StoreView

    queries = np.random.default_rng(3).standard_normal((1000, LAYOUT.width), np.float32)
    StoreView.of(store, keys).nearest(queries, 10, "cosine")


def scored(store: ParquetStore, keys: np.ndarray) -> None:
    """Find the hundred rows that each of 64 targets is most aligned with."""
    top_k(store, np.random.default_rng(3).standard_normal((64, LAYOUT.width), np.float32), 100, keys=keys)


def status(store: ParquetStore, keys: np.ndarray) -> None:
    assert (store.read(keys, columns=[], vectors=False).status == Status.OK).all()


LOOKS: dict[str, tuple[str, Callable[[ParquetStore, np.ndarray], Any]]] = {
    "open": ("open", lambda store, keys: store.contains(keys[:1])),
    "membership": ("membership of all rows", lambda store, keys: store.contains(keys)),
    "status": ("status of all rows", status),
    "gather": (
        f"{SOME:,} rows at random",
        lambda store, keys: store.read(keys[np.random.default_rng(2).permutation(len(keys))[:SOME]], columns=[]),
    ),
    "cell": (f"{SOME:,} rows in a row", lambda store, keys: store.read(keys[:SOME], columns=[])),
    "score": ("scores of 64 targets, top 100", scored),
    "near": ("10 nearest of 1,000 targets", near),
}


class Peak:
    """The most memory that a process had while this was entered, looked at 200 times a second; beyond the start."""

    def __enter__(self) -> Peak:
        self.bytes, self._start = 0, _resident()
        self._done = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._watching.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, _resident() - self._start)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def looked(what: str, root: str) -> dict[str, Any]:
    """Look in this process; return what it took."""
    keys = np.load(Path(root, "keys.npy")).view(KEY_DTYPE).reshape(-1)
    files, call = Counting(root), LOOKS[what][1]
    store = opened(files)
    if what == "near":
        import dataflex.access.views  # noqa: F401  its libraries are not the store's memory
    if what != "open":
        store.contains(keys[:1])
    files.requests = files.bytes = 0
    with Peak() as peak:
        begun = time.process_time()
        call(store, keys)
        spent = time.process_time() - begun
    return {"seconds": spent, "requests": files.requests, "bytes": files.bytes, "peak": peak.bytes}


def look(what: str, root: str) -> None:
    """Look in a new process; print what it took."""
    command = [sys.executable, "-m", "benchmarks.store_scale", what, root]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(
        f"  {LOOKS[what][0]:34} {found['seconds']:8.2f} CPU-s {found['requests']:8,} requests "
        f"{found['bytes'] / 1e6:10.1f} MB read  {found['peak'] / 1e6:7.0f} MB more",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "compact", *LOOKS])
    parser.add_argument("root")
    parser.add_argument("--fragments", type=int, default=1000)
    args = parser.parse_args()
    if args.what == "build":
        build(args.root, args.fragments)
    elif args.what == "compact":
        compact(args.root)
    else:
        print(json.dumps(looked(args.what, args.root)))


if __name__ == "__main__":
    main()
