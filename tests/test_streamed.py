"""What is computed in passes over a store is what plain arrays give, whatever the blocks, the ranks and the order."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from dataflex import distributed
from dataflex.access.views import StoreView
from dataflex.launch import free_port
from dataflex.rows import KEY_DTYPE, Status, beginnings, by_key, spread
from dataflex.selectors.cluster_less import ClusterLess
from dataflex.selectors.embedding import RdsPlus
from dataflex.selectors.less import Less
from dataflex.selectors.near import Near
from dataflex.selectors.parts import clustering, transport
from dataflex.selectors.parts.clustering import chosen, clusters, distances
from dataflex.selectors.parts.regression import kernel_ridge
from dataflex.selectors.parts.similarity import unit
from dataflex.selectors.parts.streamed import OfArray, OfView
from dataflex.selectors.parts.transport import kernel_density
from dataflex.selectors.parts.turns import Comparison, rows_in_turn
from dataflex.selectors.propagated import InfluenceDistillation
from dataflex.selectors.tsds import Tsds
from dataflex.stores.root import StoreRoot
from dataflex.stores.search import faiss_index
from dataflex.stores.values import Layout, Values
from tests.held import context, pool


def grouped(rows: int, width: int, groups: int, seed: int = 0) -> np.ndarray:
    """Unit vectors in loose groups, some of them more than once."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((groups, width))
    vectors = 0.6 * centres[rng.integers(0, groups, rows)] + rng.standard_normal((rows, width))
    vectors[rows // 2 : rows // 2 + 5] = vectors[0]
    return unit(vectors.astype(np.float32))[0]


def kept(folder: Path, vectors: np.ndarray, parts: int = 3) -> StoreView:
    """The vectors in a store of several fragments, whose order is not theirs."""
    store = StoreRoot(folder).open("embedding", {}, Layout({}, vectors.shape[1], "float32"))
    keys = np.frombuffer(np.random.default_rng(3).bytes(16 * len(vectors)), KEY_DTYPE)
    for number, part in enumerate(np.array_split(np.random.default_rng(4).permutation(len(vectors)), parts)):
        store.append(f"f{number}", Values(keys[part], np.zeros(len(part), np.uint8), {}, vectors[part]))
    return StoreView.of(store, keys)


@pytest.mark.parametrize("method", ["kmeans", "spherical_kmeans"])
@pytest.mark.parametrize(("rows", "width", "count"), [(400, 8, 9), (1500, 33, 24)])
def test_kmeans_is_that_of_faiss(method: Any, rows: int, width: int, count: int) -> None:
    vectors = grouped(rows, width, count)
    ours = clusters(vectors, count, method, 20, 5)
    theirs = faiss.Kmeans(
        width, count, niter=20, seed=5, spherical=method != "kmeans",
        min_points_per_centroid=1, max_points_per_centroid=rows,
    )  # fmt: skip
    theirs.train(vectors)
    assert len(np.unique(ours)) == count  # none was empty, which is filled in another way
    assert (ours == theirs.index.search(vectors, 1)[1][:, 0]).all()


@pytest.mark.parametrize("method", ["kmeans", "spherical_kmeans", "farthest_first"])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_clusters_do_not_depend_on_blocks(method: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = grouped(300, 12, 10)
    expected = clusters(vectors, 17, method, 8, 1)
    monkeypatch.setattr(clustering, "_FAR", 5)
    monkeypatch.setattr(clustering, "_NUMBERS", 40)
    assert (clusters(OfArray(vectors, size), 17, method, 8, 1) == expected).all()


def test_farthest_first_is_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each next centre is the row farthest from those before; a loop over all rows tells which."""
    monkeypatch.setattr(clustering, "_FAR", 6)
    vectors = grouped(200, 5, 8).astype(np.float64)
    centres = [int(np.random.default_rng(2).integers(200))]
    while len(centres) < 30:
        left = np.min([((vectors - vectors[c]) ** 2).sum(axis=1) for c in centres], axis=0)
        centres.append(int(left.argmax()))
    expected = np.argmin([((vectors - vectors[c]) ** 2).sum(axis=1) for c in centres], axis=0)
    assert (clusters(vectors, 30, "farthest_first", 1, 2) == expected).all()


@pytest.mark.parametrize("is_inner", [True, False])
@pytest.mark.parametrize("spread", [0.3, 0.03, 0.003])
def test_the_nearest_centroid_is_found_where_all_point_much_the_same_way(is_inner: bool, spread: float) -> None:
    """Embeddings of language models do; float32 then tells few distances apart."""
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal(64) / 8 + spread * rng.standard_normal((500, 64)) / 8).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    centroids, pool = vectors[:300], vectors[300:]
    products = pool.astype(np.float64) @ centroids.T.astype(np.float64)
    merits = products if is_inner else products - (centroids.astype(np.float64) ** 2).sum(axis=1) / 2
    assert (clustering._nearest(centroids.copy(), is_inner)(pool) == merits.argmax(axis=1)).all()


def test_a_row_of_zeros_is_one_centre_and_no_more() -> None:
    vectors = grouped(500, 12, 10)
    vectors[100] = 0
    assert len(np.unique(clusters(vectors, 20, "farthest_first", 1, 0))) == 20


def test_equal_rows_share_a_cluster() -> None:
    """Fewer distinct vectors than clusters: the equal ones cannot be told apart, and still every row has one."""
    vectors = np.repeat(grouped(6, 4, 6), 20, axis=0)
    ids = clusters(vectors, 30, "kmeans", 5, 0)
    assert ids.shape == (120,)
    assert all(len(set(ids[start : start + 20].tolist())) == 1 for start in range(0, 120, 20))


def test_a_tie_goes_to_the_first_centroid() -> None:
    centroids = unit(np.array([[1, 1], [1, 0], [0, 1], [1, 0], [-1, 0]], np.float32))[0]
    nearest = clustering._nearest(centroids, is_inner=True)
    assert nearest(np.array([[1, 0], [0, 1], [-1, 0]], np.float32)).tolist() == [1, 2, 4]
    many = np.repeat(centroids[1:2], 70, axis=0)
    assert clustering._nearest(many, is_inner=False)(centroids[:3]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("strategy", ["nearest", "farthest", "mixed"])
def test_distances_give_the_same_representatives(tmp_path: Path, strategy: Any) -> None:
    vectors = grouped(240, 9, 6)
    ids = clusters(vectors, 11, "kmeans", 5, 0)
    far = distances(OfView(kept(tmp_path, vectors)), ids)
    rng = np.random.default_rng(0)
    for group in (np.flatnonzero(ids == cluster) for cluster in np.unique(ids)):
        if len(group) < 3 or {*group} & {0, *range(120, 125)}:
            continue  # of two rows, or equal ones, both are as far, but for rounding
        own = ((vectors[group] - vectors[group].mean(axis=0)) ** 2).sum(axis=1)
        expected = chosen(group, own, 3, strategy, rng)
        assert chosen(group, far[group], 3, strategy, rng).tolist() == expected.tolist()


@pytest.mark.parametrize("block", [16, 600, 1 << 22])
@pytest.mark.parametrize("kde_k", [2, 9, 500])
def test_density_of_a_store_is_that_of_the_array(
    tmp_path: Path, block: int, kde_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = grouped(150, 7, 4)
    squared = ((vectors[:, None].astype(np.float64) - vectors[None]) ** 2).sum(axis=2)
    expected = np.sort(np.maximum(0, 1 - squared / 0.9**2), axis=1)[:, -kde_k:].sum(axis=1)
    monkeypatch.setattr(transport, "_BLOCK", block)
    held = OfView(kept(tmp_path, vectors), is_unit=False)
    np.testing.assert_allclose(kernel_density(held, 0.9, kde_k), expected, rtol=1e-12)


def test_the_regression_predicts_alike_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    known, values, new = rng.standard_normal((20, 5)), rng.standard_normal((20, 2)), rng.standard_normal((33, 5))
    whole = kernel_ridge(known, values, 0.1)(new)
    monkeypatch.setattr("dataflex.selectors.parts.regression._NUMBERS", 60)  # three rows at a time
    np.testing.assert_allclose(kernel_ridge(known, values, 0.1)(new), whole, rtol=1e-10)
    assert kernel_ridge(known, values, 0.1)(new[:0]).shape == (0, 2)


RANK = """
import sys
import numpy as np, torch.distributed as dist
from dataflex import distributed
from dataflex.access.views import StoreView
from dataflex.selectors.parts.clustering import clusters, distances
from dataflex.selectors.parts.streamed import OfView
from dataflex.selectors.parts.transport import kernel_density
from dataflex.selectors.parts.turns import Comparison, rows_in_turn
from dataflex.stores.root import StoreRoot

distributed._PIECE = 10
dist.init_process_group("gloo")
(store,) = StoreRoot(sys.argv[1]).stores()
keys = np.concatenate([block.keys for block in store.scan()])
view = StoreView.of(store, np.sort(keys))
vectors = OfView(view)
found = {method: clusters(vectors, 13, method, 10, 1) for method in ("kmeans", "spherical_kmeans", "farthest_first")}
far = distances(vectors, found["kmeans"])
sets = {"x": view.take(np.arange(20)), "y": view.take(np.arange(100, 107))}
found["turns"], found["best"] = rows_in_turn([Comparison(view, sets, 1.0)], view.keys, 40, "cosine", 1.0)
np.savez(sys.argv[2] + str(dist.get_rank()), **found, distances=far, density=kernel_density(vectors, 0.9, 5))
dist.destroy_process_group()
"""


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    view = kept(tmp_path / "root", grouped(260, 8, 9))
    world = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    world["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    arguments = [str(tmp_path / "root"), str(tmp_path / "rank")]
    started = [
        subprocess.Popen([sys.executable, "-c", RANK, *arguments], env={**world, "RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [process.wait(100) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    view = StoreView.of(view.store, np.sort(view.keys))
    vectors = OfView(view)
    sets = {"x": view.take(np.arange(20)), "y": view.take(np.arange(100, 107))}
    turns, best = rows_in_turn([Comparison(view, sets, 1.0)], view.keys, 40, "cosine", 1.0)
    for rank in range(2):
        found = np.load(tmp_path / f"rank{rank}.npz")
        for method in ("kmeans", "spherical_kmeans", "farthest_first"):
            assert (found[method] == clusters(vectors, 13, method, 10, 1)).all()
        np.testing.assert_array_equal(found["distances"], distances(vectors, found["kmeans"]))
        np.testing.assert_allclose(found["density"], kernel_density(vectors, 0.9, 5), rtol=1e-12)
        assert found["turns"].tolist() == turns.tolist()
        np.testing.assert_allclose(found["best"], best, rtol=1e-12)


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "less": (Less, {}),
    "less, rows in turn": (Less, {"aggregation": "round_robin", "over": "rows"}),
    "rds_plus": (RdsPlus, {}),
    "near": (Near, {}),
    "tsds": (Tsds, {"max_K": 200, "kde_K": 5, "replacement": True}),
    "influence_distillation": (InfluenceDistillation, {"landmarks": 100}),
    "cluster_less": (ClusterLess, {"num_clusters": 40, "representative_strategy": "nearest", "clustering_max_iter": 2}),
    "cluster_less, farthest_first": (ClusterLess, {"num_clusters": 40, "clustering_method": "farthest_first"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_no_method_holds_the_pools_vectors(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row more takes keys, scores and positions, but nowhere near the bytes of its vector, int8 or float32."""
    monkeypatch.setattr(faiss_index, "HELD_BYTES", 0)  # as for a pool that is too large for an index
    cls, params = METHODS[method]
    peaks, sizes, width = [], (9_000, 27_000), 512
    for size in sizes:
        view = kept(tmp_path / str(size), grouped(size, width, 50), parts=size // 1000)
        rows = pool(size)
        rows = replace(rows, keys=view.keys)

        def features(spec: Any, target: str | None = None, state: Any = None, rows: Any = None, view=view) -> Any:
            some = np.arange(40) if target is not None else rows
            return view if some is None else view.take(some)

        given = replace(context(rows, ["x"], features), features=features)
        selector = cls(cls.Params.model_validate(params))
        features(None).status.sum()
        tracemalloc.start()
        try:
            assert len(selector.select(None, 0, 50, context=given).rows) == 50
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]) < width / 2


def test_keys_are_sorted_and_laid_out() -> None:
    rng = np.random.default_rng(0)
    texts = [rng.bytes(16) for _ in range(50)]
    texts += [texts[3], texts[3], texts[0], texts[1][:8] + bytes(8), texts[1][:8] + b"x" * 8]
    keys = np.frombuffer(b"".join(texts), KEY_DTYPE)
    order = by_key(keys)
    assert order.tolist() == sorted(range(len(texts)), key=lambda i: (texts[i], i))
    assert by_key(keys[:50]).tolist() == sorted(range(50), key=lambda i: (texts[i], i))
    bounds = beginnings(keys[order])
    assert bounds.tolist() == [i for i, at in enumerate(order) if not i or texts[at] != texts[order[i - 1]]] + [55]
    assert beginnings(keys[:0]).tolist() == [0]
    of, positions = spread(np.array([4, 0, 9]), np.array([2, 0, 3]))
    assert (of.tolist(), positions.tolist()) == ([0, 0, 2, 2, 2], [4, 5, 9, 10, 11])


@pytest.mark.parametrize("size", [1, 5, 4096])
def test_blocks_hold_identical_rows_together(tmp_path: Path, size: int) -> None:
    vectors = grouped(60, 4, 3)
    view = kept(tmp_path, vectors)
    rows = np.random.default_rng(1).integers(0, 60, 150)
    status = np.where(rows % 11 == 0, Status.NO_LABELS, Status.OK).astype(np.uint8)
    taken = StoreView(view.store, view.keys[rows], status, np.zeros(150, np.int32))
    for world in (1, 2, 3):
        seen = []
        for rank in range(world):
            for at, block in taken.blocks(size, (rank, world)):
                np.testing.assert_array_equal(block, vectors[rows[at]])
                seen += at.tolist()
        assert sorted(seen) == np.flatnonzero(status == Status.OK).tolist()


def test_sums_over_ranks_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(35).reshape(5, 7)
    monkeypatch.setattr(distributed, "_PIECE", 4)
    monkeypatch.setattr(distributed, "world", lambda: 3)
    pieces: Callable[[Any], list[Any]] = lambda piece: [piece, 10 * piece, 100 * piece]  # noqa: E731
    monkeypatch.setattr(distributed, "gather", pieces)
    assert (distributed.summed(values.copy()) == 111 * values).all()
