"""Groups of similar rows. N rows, b of them in a block, D numbers each, K clusters.

Vectors are read in passes, each rank its share of the rows, and centroids are sums of whole numbers: so the clusters
depend neither on the number of ranks nor on the order of the storage. Memory: K D numbers of 16 bytes, and a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np

from dataflex import distributed
from dataflex.selectors.parts.similarity import joined
from dataflex.selectors.parts.streamed import Streamed, share, streamed
from dataflex.stores.search.faiss_index import load_faiss

Method = Literal["kmeans", "spherical_kmeans", "farthest_first"]
Strategy = Literal["random", "nearest", "farthest", "mixed"]
_UNIT = 2.0**32
"""What 1 is as a whole number: of a billion unit vectors the sum fits into 64 bits."""
_SPLIT = 1 / 1024
"""By which the two halves of a split cluster's centroid are moved apart, as FAISS does."""
_FAR = 4096
"""Rows among which the next centres are looked for."""
_NUMBERS = 1 << 20  # float64 numbers held at a time


def clusters(vectors: np.ndarray | Streamed, count: int, method: Method, iterations: int, seed: int) -> np.ndarray:
    """Return the cluster of each row, (N,) int64 in 0..K-1; a cluster may be empty. Collective.

    Args:
        vectors: (N, D) float32, of unit length.
        count: K; with as many clusters as rows, every row is one.
        method: kmeans and spherical_kmeans (centroids of unit length): Lloyd's iteration from the rows that
            `faiss.Kmeans` begins with; farthest_first: greedy k-centre (Gonzalez 1985), each next centre the row
            farthest from all before it.
        iterations: of k-means, at most: it ends where no row changes its cluster.
        seed: of its first centroids, or of the first centre.
    """
    pool = streamed(vectors)
    if count >= len(pool):
        return np.arange(len(pool))
    if method == "farthest_first":
        return _farthest_first(pool, count, seed)
    return _kmeans(pool, count, iterations, seed, is_spherical=method == "spherical_kmeans")


def _kmeans(pool: Streamed, count: int, iterations: int, seed: int, is_spherical: bool) -> np.ndarray:
    """Return the nearest of K means.

    As `faiss.Kmeans` but for rounding, and for empty clusters: each takes half of the largest, where FAISS draws lots.
    """
    faiss = load_faiss()
    first = np.empty(len(pool), np.int32)
    faiss.rand_perm(faiss.swig_ptr(first), len(pool), seed + 1)
    centroids = distributed.from_main(lambda: pool.take(first[:count]))
    ids = np.full(len(pool), -1, np.int64)  # of this rank's share
    for iteration in range(iterations + 1):
        nearest = _nearest(centroids, is_spherical)
        is_last, changed = iteration == iterations, 0
        sums, counts = np.zeros(centroids.shape, np.int64), np.zeros(count, np.int64)
        for rows, vectors in share(pool):
            now = nearest(vectors)
            changed += int((now != ids[rows]).sum())
            ids[rows] = now
            if not is_last:
                _add(sums, counts, now, vectors)
        if is_last or not sum(distributed.gather(changed)):
            break
        counts = distributed.summed(counts)
        _take_means(centroids, distributed.summed(sums), counts)
        _fill_empty(centroids, counts)
        if is_spherical:
            norms = np.linalg.norm(centroids, axis=1, keepdims=True)
            np.divide(centroids, norms, out=centroids, where=norms > 0)
    mine = np.flatnonzero(ids >= 0)
    return joined([(mine, ids[mine, None].astype(np.float64))], len(pool), 1)[:, 0].astype(np.int64)


def _nearest(centroids: np.ndarray, is_inner: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that gives the nearest centroid of each unit vector (b, D), the first of equal ones.

    FAISS finds it in float32, on a GPU where it sees one; where a second one is as near within rounding, as is the rule
    where all vectors point much the same way, all are compared in float64. So the answer does not depend on which
    vectors come together.
    """
    faiss = load_faiss()
    count, width = centroids.shape
    index: Any = faiss.IndexFlat(width, faiss.METRIC_INNER_PRODUCT if is_inner else faiss.METRIC_L2)
    resources: Any = None
    if (gpus := getattr(faiss, "get_num_gpus", lambda: 0)()) > 0:  # each rank on its own
        resources = faiss.StandardGpuResources()
        index = faiss.index_cpu_to_gpu(resources, distributed.local_rank() % gpus, index)
    index.add(centroids)
    # As in `dataflex.stores.search.candidates`, of vectors of length 1 at most, for both of two scores.
    slack = 4 * (width + 8) * 2.0**-24 * (1 if is_inner else 4)

    def search(vectors: np.ndarray, _resources: Any = resources) -> np.ndarray:  # which must live as long as the index
        merits, found = index.search(np.ascontiguousarray(vectors, np.float32), min(2, count))
        ids = np.asarray(found[:, 0], np.int64)
        unsure = np.flatnonzero(np.abs(merits[:, 0] - merits[:, -1]) <= slack) if count > 1 else ids[:0]
        together = max(1, 4 * _NUMBERS // count)
        for some in (unsure[start : start + together] for start in range(0, len(unsure), together)):
            ids[some] = _exact(vectors[some], centroids, is_inner)
        return ids

    return search


def _exact(vectors: np.ndarray, centroids: np.ndarray, is_inner: bool) -> np.ndarray:
    """Return the centroid nearest to each vector (b, D) by float64, the first of those that are as near."""
    merits = np.empty((len(vectors), len(centroids)))
    together = max(1, _NUMBERS // centroids.shape[1])
    for start in range(0, len(centroids), together):
        some = centroids[start : start + together].astype(np.float64)
        merits[:, start : start + together] = vectors.astype(np.float64) @ some.T
        if not is_inner:
            merits[:, start : start + together] -= (some**2).sum(axis=1) / 2
    return np.round(merits, 12, out=merits).argmax(axis=1)


def _add(sums: np.ndarray, counts: np.ndarray, ids: np.ndarray, vectors: np.ndarray) -> None:
    """Add vectors (b, D) to the sums (K, D) int64 and counts (K,) of their clusters."""
    order = np.argsort(ids, kind="stable")
    of, starts, many = np.unique(ids[order], return_index=True, return_counts=True)
    whole = np.rint(vectors[order] * _UNIT).astype(np.int64)
    sums[of] += np.add.reduceat(whole, starts, axis=0)
    counts[of] += many


def _take_means(centroids: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> None:
    """Put the means of sums (K, D) and counts (K,) into the centroids (K, D) float32."""
    together = max(1, _NUMBERS // centroids.shape[1])
    for start in range(0, len(counts), together):
        some = slice(start, start + together)
        centroids[some] = sums[some] / _UNIT / np.maximum(1, counts[some, None])


def _fill_empty(centroids: np.ndarray, counts: np.ndarray) -> None:
    """Give each empty cluster a half of the one that is then largest."""
    half = np.where(np.arange(centroids.shape[1]) % 2, 1 - _SPLIT, 1 + _SPLIT).astype(np.float32)
    for empty in np.flatnonzero(counts == 0):
        largest = int(counts.argmax())
        centroids[empty] = centroids[largest] * half
        centroids[largest] *= 2 - half
        counts[empty] = counts[largest] // 2
        counts[largest] -= counts[empty]


def _farthest_first(pool: Streamed, count: int, seed: int) -> np.ndarray:
    """Return the nearest of K centres that are far from each other.

    Distances to the centres so far only shrink as centres are added. So the farthest of a few thousand rows that were
    far is the farthest of all, as long as none that was left out can have been farther: a pass over the rows then gives
    the next few thousand, and measures them all from the centres chosen meanwhile.
    """
    nearest = np.full(len(pool), -1, np.int64)  # of this rank's share, as distances
    distance = np.full(len(pool), -np.inf)
    fresh, known = [int(np.random.default_rng(seed).integers(len(pool)))], 0
    while True:
        centres = distributed.from_main(partial(pool.take, np.asarray(fresh))).astype(np.float64)
        for rows, vectors in share(pool):
            for start in range(0, len(rows), together := max(1, _NUMBERS // len(fresh))):
                at = rows[start : start + together]
                squared = _squared(vectors[start : start + together], centres)
                which = squared.argmin(axis=1)
                least = squared[np.arange(len(at)), which]
                is_closer = (least < distance[at]) | (nearest[at] < 0)
                nearest[at[is_closer]], distance[at[is_closer]] = known + which[is_closer], least[is_closer]
        known += len(fresh)
        if known == count:
            mine = np.flatnonzero(nearest >= 0)
            return joined([(mine, nearest[mine, None].astype(np.float64))], len(pool), 1)[:, 0].astype(np.int64)
        fresh = _next_centres(pool, distance, count - known)


def _next_centres(pool: Streamed, distance: np.ndarray, most: int) -> list[int]:
    """Return the next centres, up to `most`, given the distances (N,) of this rank's rows, -inf of the others'."""
    size = min(_FAR + 1, len(distance))
    far = np.argpartition(-distance, size - 1)[:size]
    far = far[np.isfinite(distance[far])]
    shares = distributed.gather((far, distance[far]))
    far, left = (np.concatenate(column) for column in zip(*shares, strict=True))
    order = np.lexsort((far, -left))
    beyond = float(left[order[_FAR]]) if len(order) > _FAR else -np.inf
    rows = np.sort(far[order[:_FAR]])  # so that `argmax` takes the first of equals
    left = left[order[:_FAR]][np.argsort(far[order[:_FAR]])]
    return distributed.from_main(lambda: _farthest(pool, rows, left, beyond, most))


def _farthest(pool: Streamed, rows: np.ndarray, left: np.ndarray, beyond: float, most: int) -> list[int]:
    """Return up to `most` of some rows (r,), each the farthest from all centres before it.

    Args:
        pool: has the vectors.
        rows: (r,) sorted.
        left: (r,) their distances from the centres there are.
        beyond: no row that is not among these is farther.
        most: how many.
    """
    vectors, centres = pool.take(rows), list[int]()
    while len(centres) < most:
        farthest = int(left.argmax())
        if centres and left[farthest] <= beyond:
            break
        centres.append(int(rows[farthest]))
        left = np.minimum(left, _squared(vectors, vectors[farthest : farthest + 1].astype(np.float64))[:, 0])
    return centres


def _squared(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return squared distances of unit vectors and zeros, (b, K), equal where only rounding tells them apart."""
    own = vectors.astype(np.float64)
    squares = (own**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)
    return np.maximum(np.round(squares - 2 * own @ centres.T, 12), 0)


def distances(vectors: Streamed, ids: np.ndarray) -> np.ndarray:
    """Return the squared distance of each row from the mean of its cluster, (N,) float32. Collective.

    Args:
        vectors: (N, D), of unit length.
        ids: (N,) the cluster of each row.
    """
    count, width = int(ids.max()) + 1, vectors.take(np.zeros(1, np.int64)).shape[1]
    sums, counts = np.zeros((count, width), np.int64), np.zeros(count, np.int64)
    for rows, block in share(vectors):
        _add(sums, counts, ids[rows], block)
    means = np.zeros(sums.shape, np.float32)
    _take_means(means, distributed.summed(sums), distributed.summed(counts))
    found = [(rows, ((block - means[ids[rows]]) ** 2).sum(axis=1)[:, None]) for rows, block in share(vectors)]
    return joined(found, len(vectors), 1)[:, 0].astype(np.float32)


def chosen(
    members: np.ndarray, far: np.ndarray | None, count: int, strategy: Strategy, rng: np.random.Generator
) -> np.ndarray:
    """Return up to `count` rows that stand for a cluster.

    Args:
        members: (m,) rows of the cluster.
        far: (m,) their distances from the centroid; None will do for random ones.
        count: representatives.
        strategy: random; nearest to or farthest from the centroid; mixed: nearest, farthest, second nearest, ...
        rng: source of the random ones.
    """
    if far is None or strategy == "random":
        return rng.permutation(members)[:count]
    order = np.argsort(far, kind="stable")
    if strategy == "farthest":
        order = order[::-1]
    if strategy == "mixed":
        order = np.stack([order, order[::-1]], axis=1).ravel()
        order = order[np.sort(np.unique(order, return_index=True)[1])]
    return members[order[:count]]
