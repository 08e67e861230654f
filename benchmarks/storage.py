"""What each storage type takes, how fast it is, and whether LESS chooses the same rows.

The vectors are gradients of a model (`benchmarks.gradients`), of 8,192 numbers. A score is the mean cosine of a row
with the rows of a target set. Agreement is the share of the best 5 and 10 % of the pool that float32 chooses too: the
mean over the target sets, and the least. Targets are rounded too, as they are in a run, or left exact. `factor` is what
all cosines have in common that the pool's rounding does to them; their error is what is left beside it, which no common
factor mends, over the standard deviation of the exact ones. Speed is MB of decoded float32 per CPU-second.

Fewer numbers come from folding: the sum of the parts of an SJLT of 8,192 is one of 1,024.

python -m benchmarks.storage --model MODEL_DIR --data DATA_DIR --vectors real.npz
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.gradients import DIM, gradients
from dataflex.rows import KEY_DTYPE
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import StoreRoot
from dataflex.stores.rounding import decode, encode
from dataflex.stores.search.topk import top_k
from dataflex.stores.values import Layout, Values

KINDS = [(storage, DIM) for storage in ("float32", "float16", "int8", "int4", "int1")]
KINDS += [("int8", DIM // 2), ("int8", DIM // 8), ("int4", DIM // 4)]  # of the bytes of int4 and int1 at DIM
SHARES = (0.05, 0.1)
TIMED_ROWS, REPEATS = 4096, 7


def folded(vectors: np.ndarray, width: int) -> np.ndarray:
    """Return sketches (R, D) as those of fewer numbers, (R, width)."""
    found: np.ndarray = vectors.reshape(len(vectors), -1, width).sum(axis=1)
    return found


def rounded(vectors: np.ndarray, storage: str) -> np.ndarray:
    """Return vectors as a store gives them back."""
    return decode(*encode(vectors, storage), storage, vectors.shape[1])


def cosines(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return cosines (N, M) float64; a row of zeros has 0."""
    sides = []
    for vectors in (rows.astype(np.float64), targets.astype(np.float64)):
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        sides.append(np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0))
    found: np.ndarray = sides[0] @ sides[1].T
    return found


def agreement(scores: np.ndarray, exact: np.ndarray, share: float) -> float:
    """Return the share of the best rows by scores (N,) that are the best by the exact ones too."""
    count = max(1, round(share * len(exact)))
    best = [set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (scores, exact)]
    return len(best[0] & best[1]) / count


def errors(found: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Return the common factor of cosines, and what they are off by without it, over the spread of the exact ones."""
    a, b = (np.concatenate([part.ravel() for part in side.values()]) for side in (found, exact))
    factor = float(a @ b / (b @ b))
    return factor, float(np.sqrt(np.mean((a / factor - b) ** 2)) / b.std())


def chosen(vectors: Mapping[str, np.ndarray], storage: str, width: int) -> list[str]:
    """Return the cells on what is chosen: agreement of each share, targets rounded and not; factor; errors of both."""
    exact = {name: cosines(vectors["pool"], part) for name, part in vectors.items() if name != "pool"}
    narrow = {name: folded(part, width) for name, part in vectors.items()}
    pool = rounded(narrow.pop("pool"), storage)
    shares, off, factor = [], [], 1.0
    for of_targets in (storage, "float32"):
        found = {name: cosines(pool, rounded(part, of_targets)) for name, part in narrow.items()}
        factor, error = errors(found, exact)
        off.append(f"{error:.3f}")
        for share in SHARES:
            each = [agreement(found[name].mean(axis=1), exact[name].mean(axis=1), share) for name in exact]
            shares.append(f"{statistics.mean(each):.2f} ({min(each):.2f})")
    return [*shares, f"{factor:.2f}", *off]


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU-seconds of the fastest of some repeats: what others do on the machine only ever adds."""
    found = []
    for _ in range(REPEATS):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


def stored(folder: Path, vectors: np.ndarray, storage: str) -> ParquetStore:
    """Return a store of these vectors."""
    store = StoreRoot(folder).open("gradient", {"of": storage}, Layout({}, vectors.shape[1], storage))
    keys = np.frombuffer(np.random.default_rng(0).bytes(16 * len(vectors)), KEY_DTYPE)
    store.append("f0", Values(keys, np.zeros(len(vectors), np.uint8), {}, vectors))
    return store


def speed(vectors: Mapping[str, np.ndarray], storage: str, width: int) -> list[float]:
    """Return bytes of a row on disk, and MB of float32 per CPU-second: encoded, decoded, searched for 32 targets."""
    pool = folded(vectors["pool"], width)
    many = np.resize(pool, (TIMED_ROWS, width))
    queries = np.concatenate([folded(part, width) for name, part in vectors.items() if name != "pool"])
    queries = np.resize(queries, (32, width))
    megabytes = many.nbytes / 1e6
    codes, scale = encode(many, storage)
    with tempfile.TemporaryDirectory(prefix="dataflex-storage-") as folder:
        store = stored(Path(folder), many, storage)
        found = [store.bytes / len(many)]
        works: list[Callable[[], object]] = [
            lambda: encode(many, storage),
            lambda: decode(codes, scale, storage, width),
            lambda: top_k(store, queries, 100, block_rows=512, unit_rows=True),
        ]
        return found + [megabytes / max(seconds(work), 1e-9) for work in works]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder, template smollm2; default: the quickstart's model")
    parser.add_argument("--data", type=Path, help="with --model: folder as benchmarks.selection_quality takes it")
    parser.add_argument("--rows", type=int, default=320, help="of the pool")
    parser.add_argument("--target-rows", type=int, default=4, help="of each target set")
    parser.add_argument("--vectors", type=Path, help="NPZ file of the gradients: written, or read if it is there")
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    with tempfile.TemporaryDirectory(prefix="dataflex-vectors-") as folder:
        file = args.vectors or Path(folder) / "vectors.npz"
        vectors = gradients(file, args.data, args.model, args.rows, args.target_rows)
    targets = [len(part) for name, part in vectors.items() if name != "pool"]
    print(f"\n{len(vectors['pool'])} rows, {len(targets)} target sets of {min(targets)} to {max(targets)} rows\n")
    columns = ["storage", "numbers", "bytes", "search"]
    columns += [f"best {share:.0%}{of}" for of in ("", ", exact targets") for share in SHARES]
    columns += ["factor", "error", "error, exact targets", "bytes / row", "encode MB/s", "decode MB/s", "search MB/s"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    first: list[float] = []
    for storage, width in KINDS:
        timed = speed(vectors, storage, width)
        first = first or timed
        size, *rates = timed
        ratios = [f"1/{first[0] / size:.1f}", f"{rates[-1] / first[-1] * DIM / width:.1f} x"]
        cells = [storage, f"{width:,}", *ratios, *chosen(vectors, storage, width), f"{size:,.0f}"]
        shown = ["" if storage == "float32" and rate is rates[0] else f"{rate:,.0f}" for rate in rates]
        print(f"| {' | '.join(cells + shown)} |", flush=True)


if __name__ == "__main__":
    main()
