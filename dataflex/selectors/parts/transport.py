"""Mass that target rows send to their nearest candidates: KNN-Uniform and KNN-KDE of TSDS, in float64.

M target rows, N candidates, L neighbours of each target row, nearest first; U candidates that are anybody's neighbour,
D numbers per vector. Each target row has the mass 1 / M to send, and what a candidate receives is its probability.

Source: TSDS, arXiv 2410.11303, sections 3 and 4. With distances d, the plan g (M, N) has rows that sum to 1 / M and
minimises `alpha / C * sum(g * d) + (1 - alpha) * G(g)`, where G is M times the largest deviation of g from a plan that
ignores distances: 1 / (M N) each, or with densities r each in proportion to 1 / r. Both answers give the nearest
neighbours as much as a common cap allows, 1 / (M s r), and are exact while s <= sum(1 / r) / 2 over all candidates:
beyond, the deviation below the reference plan counts too, and the plan can be a little worse than the best.

Deviations: the L-th neighbour takes part in full, where the official code keeps the last one for the remainder; and
ties in distance keep the order given (`View.nearest`: by row key), so that the order of the pool does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dataflex.errors import ConfigError, CoverageError, MismatchError
from dataflex.selectors.parts.similarity import joined
from dataflex.selectors.parts.streamed import Streamed, share, streamed

_BLOCK = 1 << 22  # float64 numbers held at a time


@dataclass(frozen=True)
class Plan:
    """How much each target row sends to each neighbour.

    Attributes:
        weights: (M, L) float64, each row sums to 1 / M.
        spread: s, the number of candidates of density 1 that a row's mass is spread over.
    """

    weights: np.ndarray
    spread: float


@dataclass(frozen=True)
class Transport:
    """Probabilities of the candidates, and how widely the mass was spread.

    Attributes:
        p: (N,) float64 probability of each candidate, sums to 1; 0 for those that are nobody's neighbour.
        neighbourhood: mean number of neighbours that a target row sends mass to.
        support: candidates with p > 0.
    """

    p: np.ndarray
    neighbourhood: float
    support: int


def clipped(max_k: int, kde_k: int, size: int) -> tuple[int, int]:
    """Return both numbers of neighbours, at most a tenth of the `size` candidates, where the plan is exact.

    Raises:
        ConfigError: `max_k` is below 2, or `kde_k` below 1.
        CoverageError: there are fewer than 20 candidates.
    """
    if max_k < 2 or kde_k < 1:
        raise ConfigError(f"max_k is {max_k} and kde_k is {kde_k}, expected at least 2 and 1")
    if size < 20:
        raise CoverageError(f"{size} candidates for nearest neighbours by transport, expected 20 or more; add data")
    return min(max_k, size // 10), min(kde_k, size // 10)


def knn_uniform(neighbours: np.ndarray, distances: np.ndarray, size: int, alpha: float, scale: float) -> Transport:
    """Return what each candidate gets when every target row shares evenly among its K nearest.

    Args:
        neighbours: (M, L) int, positions of candidates, nearest first.
        distances: (M, L), Euclidean, not squared; ascending.
        size: N.
        alpha: 0 spreads over all L neighbours, 1 takes the nearest alone.
        scale: C, a length that distances are compared with: about 1 for unit vectors.

    Raises:
        ConfigError: alpha is outside 0 to 1, or scale is not positive.
        MismatchError: neighbours and distances are none, or none of each other.
    """
    _check(neighbours, size, distances)
    return _transport(uniform_plan(distances, alpha, scale), neighbours, size)


def knn_kde(
    neighbours: np.ndarray, distances: np.ndarray, density: np.ndarray, size: int, alpha: float, scale: float
) -> Transport:
    """Return what each candidate gets when near duplicates share one candidate's part.

    Args:
        neighbours: as for `knn_uniform`, which this is where every density is 1.
        distances: as for `knn_uniform`.
        density: (U,) of each candidate in `np.unique(neighbours)`, positive.
        size: N.
        alpha: as for `knn_uniform`.
        scale: as for `knn_uniform`.

    Raises:
        ConfigError: alpha is outside 0 to 1, or scale is not positive.
        MismatchError: the arrays do not fit each other.
    """
    _check(neighbours, size, distances)
    candidates, at = np.unique(neighbours, return_inverse=True)
    density = np.asarray(density, np.float64)
    if density.shape != candidates.shape or not (np.isfinite(density) & (density > 0)).all():
        raise MismatchError(f"densities are {list(density.shape)}, expected {len(candidates)} positive numbers")
    return _transport(kde_plan(distances, density[at].reshape(neighbours.shape), alpha, scale), neighbours, size)


def uniform_plan(distances: np.ndarray, alpha: float, scale: float) -> Plan:
    """Return the plan of KNN-Uniform; distances (M, L) as for `knn_uniform`."""
    distances = np.asarray(distances, np.float64)
    queries, most = distances.shape
    limit = _limit(queries, alpha, scale)
    # Widening K to K + 1 costs sum_i sum_{t <= K} (d_i(K + 1) - d_i(t)): it grows by K (d_i(K + 1) - d_i(K)) each.
    costs = np.cumsum(np.diff(distances, axis=1).sum(axis=0) * np.arange(1, most))
    k = int(np.argmax(np.append(costs, np.inf) >= limit)) + 1  # inf: there is no neighbour beyond the L-th
    weights = np.zeros((queries, most))
    weights[:, :k] = 1 / (queries * k)
    return Plan(weights, float(k))


def kde_plan(distances: np.ndarray, density: np.ndarray, alpha: float, scale: float) -> Plan:
    """Return the plan of KNN-KDE; density (M, L) of each neighbour.

    Raising s past S_i(k), the parts 1 / r of row i's k nearest, makes row i use neighbour k + 1. The breakpoints of all
    rows are passed in order; the first at which the cost reaches the limit is s. Running out of neighbours costs inf.
    """
    distances, parts = np.asarray(distances, np.float64), 1 / np.asarray(density, np.float64)
    queries, most = distances.shape
    limit = _limit(queries, alpha, scale)
    reach = np.cumsum(parts, axis=1)
    steps = np.diff(distances, axis=1, append=np.inf) * reach
    order = np.argsort(reach, axis=None, kind="stable")
    stop = int(np.argmax(np.cumsum(steps.ravel()[order]) >= limit))
    spread = float(reach.ravel()[order[stop]])
    full = np.bincount(order[:stop] // most, minlength=queries)  # neighbours of each row that get all their cap allows
    weights = np.where(np.arange(most) < full[:, None], parts / (queries * spread), 0.0)
    weights[np.arange(queries), full] = np.maximum(1 / queries - weights.sum(axis=1), 0)
    return Plan(weights, spread)


def kernel_density(vectors: np.ndarray | Streamed, sigma: float, kde_k: int) -> np.ndarray:
    """Return the density of each of U vectors among all of them, (U,) float64, 1 or more. Collective.

    It is the sum of max(0, 1 - d^2 / sigma^2) over the `kde_k` nearest of the U, the vector itself among them. Cost:
    2 U^2 D operations, which the ranks share, and a pass over the U for every two thousand of them (two where some have
    more than `kde_k` near ones); memory: a few blocks of 32 MB.

    Args:
        vectors: (U, D), of every candidate that is a neighbour, each once.
        sigma: distance from which on candidates do not count as near duplicates; 0: every density is 1.
        kde_k: most neighbours that count.

    Raises:
        ConfigError: sigma is negative or kde_k below 1.
    """
    if not sigma >= 0 or kde_k < 1:
        raise ConfigError(f"sigma is {sigma} and kde_k is {kde_k}, expected at least 0 and 1")
    pool = streamed(vectors)
    if sigma == 0 or not len(pool):
        return np.ones(len(pool))
    found = []
    for rows, some in _tiles(share(pool)):
        densities, counts = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
        for closeness in _closeness(pool, rows, some, sigma):
            densities += closeness.sum(axis=1)
            counts += np.count_nonzero(closeness, axis=1)
        crowded = np.flatnonzero(counts > kde_k)
        together = max(1, _BLOCK // kde_k)
        for few in (crowded[start : start + together] for start in range(0, len(crowded), together)):
            nearest = np.zeros((len(few), kde_k))
            for closeness in _closeness(pool, rows[few], some[few], sigma):
                size = kde_k + closeness.shape[1]
                both = np.concatenate([nearest, closeness], axis=1)
                nearest = np.partition(both, size - kde_k, axis=1)[:, -kde_k:]
            densities[few] = nearest.sum(axis=1)
        found.append((rows, densities[:, None]))
    return joined(found, len(pool), 1)[:, 0]


def _closeness(pool: Streamed, rows: np.ndarray, some: np.ndarray, sigma: float) -> Iterator[np.ndarray]:
    """Yield max(0, 1 - d^2 / sigma^2) between some vectors (Q, D), those at `rows` (Q,), and all, (Q, b) at a time."""
    order = np.argsort(rows)
    squares = (some**2).sum(axis=1)
    for others, vectors in _tiles(pool.blocks()):
        squared = some @ vectors.T
        squared *= -2
        squared += squares[:, None]
        squared += (vectors**2).sum(axis=1)
        slot = np.minimum(np.searchsorted(rows, others, sorter=order), len(rows) - 1)
        own = np.flatnonzero(rows[order[slot]] == others)
        squared[order[slot[own]], own] = 0  # rounding would put a row a little away from itself
        np.maximum(squared, 0, out=squared)
        squared /= -(sigma**2)
        squared += 1
        yield np.maximum(squared, 0, out=squared)


def _tiles(blocks: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield blocks in parts, vectors as float64, of which any two have `_BLOCK` products."""
    size = max(1, math.isqrt(_BLOCK))
    for rows, vectors in blocks:
        for start in range(0, len(rows), size):
            yield rows[start : start + size], vectors[start : start + size].astype(np.float64)


def _transport(plan: Plan, neighbours: np.ndarray, size: int) -> Transport:
    got = np.bincount(neighbours.ravel(), weights=plan.weights.ravel(), minlength=size)
    p = got / got.sum()  # 1 but for rounding; what draws by it wants exactly 1
    neighbourhood = float((plan.weights > 0).sum(axis=1).mean())
    return Transport(p, neighbourhood, int((p > 0).sum()))


def _limit(queries: int, alpha: float, scale: float) -> float:
    """Return the cost of widening, summed over target rows, at which it no longer pays."""
    if not 0 <= alpha <= 1 or not 0 < scale < np.inf:
        raise ConfigError(f"alpha is {alpha} and scale is {scale}, expected 0 to 1 and a positive length")
    return (1 - alpha) * queries * scale / alpha if alpha > 0 else np.inf


def _check(neighbours: np.ndarray, size: int, distances: np.ndarray) -> None:
    if neighbours.shape != distances.shape or neighbours.ndim != 2 or not len(neighbours) or neighbours.shape[1] < 2:
        raise MismatchError(
            f"neighbours are {list(neighbours.shape)} and distances {list(distances.shape)}, expected (M > 0, L > 1)"
        )
    if neighbours.min() < 0 or neighbours.max() >= size:
        raise MismatchError(f"neighbours are {neighbours.min()} to {neighbours.max()}, expected 0 to {size - 1}")
    if not np.isfinite(distances).all() or distances.min() < 0 or (np.diff(distances, axis=1) < 0).any():
        raise MismatchError("distances are not finite, non-negative and ascending along each row")
