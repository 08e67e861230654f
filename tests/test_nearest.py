"""Nearest neighbours of a view are those of brute force: duplicates, unusable rows, ties, several stores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataflex import distributed
from dataflex.access.views import Mixed, StoreView
from dataflex.errors import ConfigError, CoverageError, DataflexError, MismatchError
from dataflex.launch import free_port
from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import StoreRoot
from dataflex.stores.rounding import STORAGES
from dataflex.stores.search import candidates, faiss_index
from dataflex.stores.search import nearest as search
from dataflex.stores.values import Layout, Values

WIDTH = 6
METRICS = ("cosine", "ip", "l2")


@pytest.fixture(autouse=True)
def _own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, params=["index", "streamed"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every answer is asked for twice: of an index, as for a small store, and streamed, as for a large one."""
    if request.param == "streamed":
        monkeypatch.setattr(faiss_index, "HELD_BYTES", 0)
    return request.param


def made(folder: Path, vectors: np.ndarray, seed: int = 0, storage: str = "float32") -> tuple[ParquetStore, np.ndarray]:
    """A store of three fragments, every seventh row not usable, and its keys."""
    rng = np.random.default_rng(seed)
    store = StoreRoot(folder).open("embedding", {"s": seed}, Layout({}, vectors.shape[1], storage))
    keys = np.frombuffer(rng.bytes(16 * len(vectors)), KEY_DTYPE)
    status = np.where(np.arange(len(vectors)) % 7 == 3, Status.NONFINITE, Status.OK).astype(np.uint8)
    for i, part in enumerate(np.array_split(np.arange(len(vectors)), 3)):
        store.append(f"f{i}", Values(keys[part], status[part], {}, vectors[part].astype(np.float32)))
    return store, keys


def brute(
    vectors: np.ndarray, keys: np.ndarray, status: np.ndarray, queries: np.ndarray, k: int, metric: str
) -> tuple[list[list[float]], list[list[int]]]:
    """Return the nearest rows in plain Python."""
    scores, rows = [], []
    for query in queries.astype(np.float64):
        ranked = []
        for row, vector in enumerate(vectors.astype(np.float64)):
            if status[row] != Status.OK or (metric == "cosine" and not vector.any()):
                continue
            score = float((query * vector).sum())
            if metric == "cosine":
                score /= float(np.sqrt((query**2).sum()) * np.sqrt((vector**2).sum()))
            if metric == "l2":
                score = float(((query - vector) ** 2).sum())
            ranked.append((score if metric == "l2" else -score, keys[row].tobytes(), row, score))
        ranked.sort()
        scores.append([score for *_, score in ranked[:k]])
        rows.append([row for _, _, row, _ in ranked[:k]])
    return scores, rows


def agree(view: StoreView | Mixed, keys: np.ndarray, vectors: np.ndarray, queries: np.ndarray, k: int, metric: str):
    scores, rows = view.nearest(queries, k, metric)  # type: ignore[arg-type]
    expected, expected_rows = brute(vectors, keys, view.status, queries, k, metric)
    assert (scores.dtype, rows.dtype, scores.shape, rows.shape) == (np.float64, np.int64, *[(len(queries), k)] * 2)
    assert rows.tolist() == expected_rows
    np.testing.assert_allclose(scores, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", ["smooth", "ties"])
def test_a_view_with_duplicates_in_a_store_with_foreign_rows(
    tmp_path: Path, metric: str, storage: str, kind: str
) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((300, WIDTH)) if kind == "smooth" else rng.integers(-1, 2, (300, WIDTH))
    store, keys = made(tmp_path / "root", vectors, storage=storage)
    rows = np.concatenate([rng.permutation(300)[:180], [5, 5, 9, 3, 0, 5]])  # 3 is not usable
    view = StoreView.of(store, keys[rows])
    stored = store.read(keys[rows]).vectors
    assert stored is not None
    queries = rng.standard_normal((7, WIDTH)) if kind == "smooth" else rng.integers(1, 3, (7, WIDTH))
    for k in (1, 20, 120):
        agree(view, keys[rows], stored, queries.astype(np.float32), k, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_what_float32_cannot_tell_apart_is_ranked_exactly(tmp_path: Path, metric: str) -> None:
    """A far cluster of near-equal vectors: every float32 score is rounded to a few values."""
    rng = np.random.default_rng(2)
    vectors = (1000 + 1e-3 * rng.standard_normal((400, WIDTH))).astype(np.float32)
    store, keys = made(tmp_path / "root", vectors)
    queries = (1000 + 1e-3 * rng.standard_normal((25, WIDTH))).astype(np.float32)
    agree(StoreView.of(store, keys), keys, store.read(keys).vectors, queries, 3, metric)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_tiny_and_huge_norm(tmp_path: Path, metric: str) -> None:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((200, WIDTH)) * 10.0 ** rng.integers(-9, 3, (200, 1))
    store, keys = made(tmp_path / "root", vectors)
    queries = (rng.standard_normal((4, WIDTH)) * 1e-6).astype(np.float32)
    agree(StoreView.of(store, keys), keys, store.read(keys).vectors, queries, 30, metric)  # type: ignore[arg-type]


def joined(tmp_path: Path) -> tuple[Mixed, np.ndarray, np.ndarray]:
    """Three stores of one feature at several states, the rows shared out; one row comes in two parts, one has few."""
    rng = np.random.default_rng(4)
    size, parts = 150, []
    owner = rng.choice(3, size, p=[0.5, 0.47, 0.03])
    keys, vectors = np.zeros(size, KEY_DTYPE), np.zeros((size, WIDTH), np.float32)
    common = rng.integers(-1, 2, (200, WIDTH))  # so that scores tie across stores
    for part in range(3):
        store, there = made(tmp_path / "root", common, seed=part)
        at = np.flatnonzero(owner == part)
        keys[at] = there[rng.integers(0, 200, len(at))]
        found = store.read(keys[at]).vectors
        assert found is not None
        vectors[at] = found
        parts.append((at, StoreView.of(store, keys[at], part)))
    return Mixed.of(parts, size), keys, vectors


@pytest.mark.parametrize("metric", METRICS)
def test_a_view_of_several_stores(tmp_path: Path, metric: str) -> None:
    view, keys, vectors = joined(tmp_path)
    queries = np.random.default_rng(5).integers(1, 4, (5, WIDTH)).astype(np.float32)
    for k in (1, 17, 100):
        agree(view, keys, vectors, queries, k, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_an_inverted_file_finds_most_and_never_nothing(tmp_path: Path, metric: str) -> None:
    rng = np.random.default_rng(6)
    vectors = rng.standard_normal((4000, WIDTH))
    store, keys = made(tmp_path / "root", vectors)
    rows = np.concatenate([np.arange(0, 4000, 3), [0, 0]])
    view = StoreView.of(store, keys[rows])
    queries = rng.standard_normal((9, WIDTH)).astype(np.float32)
    exact = view.nearest(queries, 20, metric)[1]  # type: ignore[arg-type]
    scores, found = view.nearest(queries, 20, metric, approximate_above=1000)  # type: ignore[arg-type]
    assert Path(store.path, "derived", "faiss", f"{metric}-ivf.faiss").exists()
    recall = np.mean([len(set(a.tolist()) & set(b.tolist())) / 20 for a, b in zip(exact, found, strict=True)])
    assert 0.5 < recall <= 1
    assert (np.diff(scores if metric == "l2" else -scores, axis=1) >= 0).all()
    usable = int((view.status == Status.OK).sum())
    for k in (500, usable):  # more than the lists probed hold
        everything = view.nearest(queries, k, metric, approximate_above=1000)[1]  # type: ignore[arg-type]
        assert [len(set(row.tolist())) for row in everything] == [k] * 9
        assert (view.status[everything] == Status.OK).all()
    assert everything.tolist() == view.nearest(queries, usable, metric)[1].tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize("_way", ["index"], indirect=True)
def test_the_index_is_kept_and_shared(tmp_path: Path) -> None:
    store, keys = made(tmp_path / "root", np.random.default_rng(7).standard_normal((50, WIDTH)))
    queries = np.ones((2, WIDTH), np.float32)
    StoreView.of(store, keys).nearest(queries, 3, "ip")
    kept = Path(store.path, "derived", "faiss", "ip-flat.faiss")
    written = kept.stat().st_mtime_ns
    StoreView.of(store, keys[:30]).nearest(queries, 3, "ip")
    assert kept.stat().st_mtime_ns == written


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """What the ranks send, one after the other, is put together to the answer of one process."""
    view, _, _ = joined(tmp_path)
    queries = np.random.default_rng(8).standard_normal((3, WIDTH)).astype(np.float32)
    alone = view.nearest(queries, 12, "cosine")
    sent: list[tuple[np.ndarray, np.ndarray]] = []

    def record(value: tuple[np.ndarray, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        sent.append(value)
        return []

    monkeypatch.setattr(distributed, "world", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "gather", record)
        view.nearest(queries, 12, "cosine")
    monkeypatch.setattr(distributed, "gather", lambda value: sent)
    found = view.nearest(queries, 12, "cosine")
    assert [a.tobytes() for a in found] == [a.tobytes() for a in alone]


RANK = """
import sys
import numpy as np, torch.distributed as dist
from dataflex.access.views import StoreView
from dataflex.stores.root import StoreRoot
from dataflex.stores.search import faiss_index

faiss_index.HELD_BYTES = int(sys.argv[4])
dist.init_process_group("gloo")
(store,) = StoreRoot(sys.argv[1]).stores()
keys = np.concatenate([block.keys for block in store.scan()])
scores, rows = StoreView.of(store, np.sort(keys)).nearest(np.load(sys.argv[2]), 5, "l2")
np.savez(sys.argv[3] + str(dist.get_rank()), scores=scores, rows=rows)
dist.destroy_process_group()
"""


def test_two_processes_answer_as_one(tmp_path: Path) -> None:
    store, keys = made(tmp_path / "root", np.random.default_rng(11).standard_normal((60, WIDTH)))
    queries = np.random.default_rng(12).standard_normal((3, WIDTH)).astype(np.float32)
    np.save(tmp_path / "queries.npy", queries)
    arguments = [str(tmp_path / name) for name in ("root", "queries.npy", "rank")] + [str(faiss_index.HELD_BYTES)]
    world = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    world["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen([sys.executable, "-c", RANK, *arguments], env={**world, "RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [process.wait(60) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    alone = StoreView.of(store, np.sort(keys)).nearest(queries, 5, "l2")
    for rank in range(2):
        found = np.load(tmp_path / f"rank{rank}.npz")
        assert (found["scores"].tobytes(), found["rows"].tobytes()) == tuple(a.tobytes() for a in alone)


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (candidates, search):
        monkeypatch.setattr(module, "BLOCK", 7)
    monkeypatch.setattr(candidates, "_TILE", 2)
    monkeypatch.setattr(search, "_HELD", 60)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("_way", ["streamed"], indirect=True)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", ["float32", "float16", "int8", "int1"])
@pytest.mark.parametrize("kind", ["smooth", "ascending", "ties", "all equal", "near"])
def test_many_small_blocks_and_little_room(tmp_path: Path, metric: str, storage: str, kind: str) -> None:
    """Blocks that each beat the ones before, and more rows as good as the k-th than there are places for."""
    rng = np.random.default_rng(13)
    vectors = {
        "smooth": lambda: rng.standard_normal((250, WIDTH)),
        "ascending": lambda: np.eye(WIDTH)[0] * np.linspace(-1, 1, 250)[:, None] + 0.1 * rng.standard_normal(WIDTH),
        "ties": lambda: rng.integers(-1, 2, (250, WIDTH)),
        "all equal": lambda: np.ones((250, WIDTH)),
        "near": lambda: 1 + 1e-6 * rng.standard_normal((250, WIDTH)),
    }[kind]()
    vectors[:4] = 0
    store, keys = made(tmp_path / "root", vectors, storage=storage)
    rows = np.concatenate([rng.permutation(250), [8, 8, 9]])
    stored = store.read(keys[rows]).vectors
    assert stored is not None
    queries = np.concatenate([rng.standard_normal((4, WIDTH)), np.eye(WIDTH)[:1]]).astype(np.float32)
    for k in (1, 5, 60):
        agree(StoreView.of(store, keys[rows]), keys[rows], stored, queries, k, metric)


@pytest.mark.parametrize("_way", ["streamed"], indirect=True)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_numbers_whose_squares_float32_does_not_hold(tmp_path: Path, metric: str, size: float) -> None:
    rng = np.random.default_rng(14)
    vectors = (size * rng.standard_normal((90, WIDTH))).astype(np.float32)
    store, keys = made(tmp_path / "root", vectors)
    queries = (size * rng.standard_normal((3, WIDTH))).astype(np.float32)
    agree(StoreView.of(store, keys), keys, vectors, queries, 4, metric)


@pytest.mark.parametrize("_way", ["streamed"], indirect=True)
@pytest.mark.parametrize("metric", METRICS)
def test_long_rows_that_come_last_are_ranked_exactly(
    tmp_path: Path, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their float32 scores are off by more than the spread of all that came before."""
    for module in (candidates, search):
        monkeypatch.setattr(module, "BLOCK", 16)
    rng = np.random.default_rng(15)
    for seed in range(15):
        query = unit(rng.standard_normal((1, 64)))
        short, across = unit(rng.standard_normal((300, 64))), rng.standard_normal((30, 64))
        long = 1e8 * unit(across - (across @ query.T) * query) + 0.33 * query
        vectors = np.concatenate([short, long]).astype(np.float32)
        store, keys = made(tmp_path / str(seed), vectors)
        agree(StoreView.of(store, keys), keys, vectors, query.astype(np.float32), 5, metric)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("_way", ["streamed"], indirect=True)
def test_a_large_store_is_searched_without_an_index(tmp_path: Path) -> None:
    store, keys = made(tmp_path / "root", np.random.default_rng(7).standard_normal((50, WIDTH)))
    StoreView.of(store, keys).nearest(np.ones((2, WIDTH), np.float32), 3, "ip")
    assert not Path(store.path, "derived", "faiss").exists()


def test_the_order_of_the_pool_does_not_matter(tmp_path: Path) -> None:
    store, keys = made(tmp_path / "root", np.random.default_rng(9).integers(-1, 2, (200, WIDTH)))
    shuffled = np.random.default_rng(0).permutation(200)
    queries = np.ones((1, WIDTH), np.float32)
    rows = StoreView.of(store, keys).nearest(queries, 40, "l2")[1]
    again = StoreView.of(store, keys[shuffled]).nearest(queries, 40, "l2")[1]
    assert shuffled[again].tolist() == rows.tolist()


def test_what_cannot_be_answered_is_refused(tmp_path: Path) -> None:
    vectors = np.random.default_rng(10).standard_normal((40, WIDTH))
    vectors[::2] = 0
    store, keys = made(tmp_path / "root", vectors)
    view, queries = StoreView.of(store, keys), np.ones((2, WIDTH), np.float32)
    usable = int((view.status == Status.OK).sum())
    view.nearest(queries, usable, "l2")
    with pytest.raises(CoverageError, match=f"{usable + 1} neighbours wanted, {usable} rows are usable"):
        view.nearest(queries, usable + 1, "l2")
    with pytest.raises(CoverageError, match="usable rows have a direction, the others are zero"):
        view.nearest(queries, usable, "cosine")
    with pytest.raises(MismatchError, match=r"takes \(M > 0, 6\)"):
        view.nearest(queries[:, :3], 1, "ip")
    with pytest.raises(MismatchError, match=r"queries are \[0, 6\]"):
        view.nearest(queries[:0], 1, "ip")
    with pytest.raises(DataflexError, match="NaN or infinity"):
        view.nearest(queries * np.float32(np.nan), 1, "ip")
    with pytest.raises(DataflexError, match="no direction"):
        view.nearest(queries * 0, 1, "cosine")
    with pytest.raises(ConfigError, match="cosine, ip or l2"):
        view.nearest(queries, 1, "dot")  # type: ignore[arg-type]
    losses = StoreRoot(tmp_path / "losses").open("loss", {}, Layout({"loss_sum": "float64"}))
    losses.append("f", Values(keys[:3], np.zeros(3, np.uint8), {"loss_sum": np.ones(3)}))
    with pytest.raises(MismatchError, match="no vectors"):
        StoreView.of(losses, keys[:3]).nearest(queries, 1, "ip")
