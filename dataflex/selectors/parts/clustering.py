"""Groups of similar rows. N rows, D numbers each, K clusters."""

from __future__ import annotations

from typing import Literal

import numpy as np

from dataflex.stores.search.faiss_index import load_faiss

Method = Literal["kmeans", "spherical_kmeans", "farthest_first"]


def clusters(vectors: np.ndarray, count: int, method: Method, iterations: int, seed: int) -> np.ndarray:
    """Return the cluster of each row, (N,) int64 in 0..K-1; a cluster may be empty.

    Args:
        vectors: (N, D) float32, of unit length.
        count: K; with as many clusters as rows, every row is one.
        method: kmeans and spherical_kmeans (centroids of unit length) by `faiss.Kmeans`; farthest_first: greedy
            k-centre (Gonzalez 1985), each next centre the row farthest from all before it.
        iterations: of k-means.
        seed: of its first centroids, or of the first centre.
    """
    if count >= len(vectors):
        return np.arange(len(vectors))
    if method == "farthest_first":
        return _farthest_first(vectors, count, seed)
    faiss = load_faiss()
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=iterations,
        seed=seed,
        spherical=method == "spherical_kmeans",
        # FAISS warns of few rows to a centroid and leaves rows beyond 256 out of its training; here all take part.
        min_points_per_centroid=1,
        max_points_per_centroid=max(256, -(-len(vectors) // count)),
        gpu=getattr(faiss, "get_num_gpus", lambda: 0)() > 0,
    )
    kmeans.train(np.ascontiguousarray(vectors, np.float32))
    return np.asarray(kmeans.index.search(vectors, 1)[1][:, 0], dtype=np.int64)


def _farthest_first(vectors: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the nearest of K centres that are far from each other. Cost: K passes over the rows."""
    nearest = np.zeros(len(vectors), dtype=np.int64)
    distance = np.full(len(vectors), np.inf)
    centre = int(np.random.default_rng(seed).integers(len(vectors)))
    for number in range(count):
        squared = 2 - 2 * vectors @ vectors[centre]  # of unit vectors
        closer = squared < distance
        nearest[closer], distance[closer] = number, squared[closer]
        centre = int(distance.argmax())
    return nearest


def representatives(
    members: np.ndarray,
    vectors: np.ndarray,
    count: int,
    strategy: Literal["random", "nearest", "farthest", "mixed"],
    rng: np.random.Generator,
) -> np.ndarray:
    """Return up to `count` rows that stand for a cluster.

    Args:
        members: (m,) rows of the cluster.
        vectors: (m, D) their vectors.
        count: representatives.
        strategy: random; nearest to or farthest from the centroid; mixed: nearest, farthest, second nearest, ...
        rng: source of the random ones.
    """
    if strategy == "random":
        return rng.permutation(members)[:count]
    order = np.argsort(((vectors - vectors.mean(axis=0)) ** 2).sum(axis=1), kind="stable")
    if strategy == "farthest":
        order = order[::-1]
    if strategy == "mixed":
        order = np.stack([order, order[::-1]], axis=1).ravel()
        order = order[np.sort(np.unique(order, return_index=True)[1])]
    return members[order[:count]]
