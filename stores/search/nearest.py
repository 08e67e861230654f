"""Exact nearest neighbours within some rows of a store, proposed in float32 and scored again in float64.

FAISS, and a pass over the store, compute in float32, and not alike for every number of queries. So they only propose:
more rows than are wanted, which are read from the store and scored anew, until no row left out can belong to the
answer. Equal vectors then have equal scores, and the answer depends neither on the processes that share the queries nor
on who proposed.

M queries, D numbers each, k neighbours, R rows to stay within; C proposals per query, P pairs of a query and a row.
Cost: the proposals, which are read once more. Memory: some hundred MB, and the answer.
"""

from __future__ import annotations

import numpy as np

from dataflex.rows import spread
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.search.candidates import BLOCK, candidates
from dataflex.stores.search.faiss_index import FaissIndex, Metric, load_faiss

_SORTABLE = "S16"
_PROPOSALS = 1 << 22  # (query, row) pairs that an index proposes at a time
_HELD = 1 << 23  # pairs that a pass over the store has places for
_NUMBERS = 1 << 17  # float64 numbers held at a time while scoring


def nearest(
    store: ParquetStore, keys: np.ndarray, queries: np.ndarray, k: int, metric: Metric, index: FaissIndex | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest of some rows for each query, best first; ties go to the smaller row key.

    Without an index, and with a `flat` one, that is the exact answer; with an `ivf` one the best of what it proposes.
    Under `cosine` a row of zeros is nobody's neighbour.

    Args:
        store: has the vectors.
        keys: (R,) distinct row keys to stay within, sorted, usable all.
        queries: (M, D) float32, finite; under `cosine` none of them zero.
        k: neighbours wanted, at most R.
        metric: cosine or inner product, or squared Euclidean distance.
        index: of the store and for the metric, if one is at hand; without, the store is streamed.

    Returns:
        Scores (M, n) float64, squared distances under `l2`, and places in `keys` (M, n) int64. n is k, or the number of
        rows that can be neighbours where there are fewer.
    """
    merits, places = np.full((len(queries), k), -np.inf), np.zeros((len(queries), k), np.int64)
    if index is None:
        _by_pass(store, keys, queries, metric, merits, places)
    else:
        _by_index(store, index, keys, queries, merits, places)
    count = int(np.isfinite(merits).sum(axis=1).min(initial=k))
    merits, places = merits[:, :count], places[:, :count]
    return (-merits if metric == "l2" else merits), places


def _by_pass(
    store: ParquetStore, keys: np.ndarray, queries: np.ndarray, metric: Metric, merits: np.ndarray, places: np.ndarray
) -> None:
    """Fill merits and places (M, k), best first, from candidates that passes over the store find."""
    k = merits.shape[1]
    pending, room = np.arange(len(queries)), 2 * k + BLOCK
    while len(pending):
        together = max(1, _HELD // room)
        crowded = []
        for some in (pending[s : s + together] for s in range(0, len(pending), together)):
            query, place, is_full = candidates(store, keys, queries[some], k, metric, room)
            merits[some], places[some] = _best(store, keys, queries[some], query, place, k, metric)
            crowded.append(some[is_full])
        # More rows than fit are as good as the k-th in float32: fewer queries at a time then, each with more room.
        pending, room = np.concatenate(crowded), min(4 * room, len(keys) + BLOCK)


def _by_index(
    store: ParquetStore,
    index: FaissIndex,
    keys: np.ndarray,
    queries: np.ndarray,
    merits: np.ndarray,
    places: np.ndarray,
) -> None:
    """Fill merits and places (M, k), best first, from proposals of an index."""
    k, width = merits.shape[1], queries.shape[1]
    words = keys.view(_SORTABLE)
    within = np.isin(index.keys.view(_SORTABLE), words)
    mask = None if within.all() else within  # without a mask a GPU may search
    # A float32 sum of D products is off by about D 2^-24 |a||b| at most, and by a least normal number for each product
    # that underflows; the factor 2 and the 8 are room for the rest, such as making vectors unit.
    slack = 2 * (width + 8) * 2.0**-24 * _reach(index, queries) + width * float(np.finfo(np.float32).tiny)
    pending, proposals = np.arange(len(queries)), min(len(keys), k + k // 2 + 64)
    while len(pending):
        together = max(1, _PROPOSALS // proposals)
        uncertain = []
        for some in (pending[s : s + together] for s in range(0, len(pending), together)):
            values, proposed = index.search(queries[some], proposals, mask)
            query = np.repeat(np.arange(len(some)), proposals)
            place = np.searchsorted(words, proposed.view(_SORTABLE).ravel())
            merits[some], places[some] = _best(store, keys, queries[some], query, place, k, index.metric)
            # No row left out has a float32 score above the last proposed one's; the answer is certain only if the k-th
            # merit beats that by more than rounding. Of rows that an approximate index left out nothing is known.
            bound = (-values if index.metric == "l2" else values)[:, -1] + slack[some]
            is_sure = np.isfinite(merits[some, -1]) if index.kind == "ivf" else merits[some, -1] > bound
            uncertain.append(some[~is_sure])
        pending = np.concatenate(uncertain) if proposals < len(keys) else pending[:0]  # all rows were scored: certain
        proposals = min(len(keys), 4 * proposals)


def _reach(index: FaissIndex, queries: np.ndarray) -> np.ndarray:
    """Bound |a||b| of each query with any stored row, to which float32 rounding is proportional, (M,) float64."""
    if index.metric == "cosine" or index.kind == "ivf":
        return np.ones(len(queries))
    stored = load_faiss().rev_swig_ptr(index.index.get_xb(), index.index.ntotal * index.index.d)
    vectors = stored.reshape(-1, index.index.d)
    size = max(1, _NUMBERS // vectors.shape[1])
    longest = max(float(_norms(vectors[s : s + size]).max()) for s in range(0, len(vectors), size))
    lengths = _norms(queries)
    reach: np.ndarray = lengths * longest if index.metric == "ip" else (lengths + longest) ** 2
    return reach


def _best(
    store: ParquetStore,
    keys: np.ndarray,
    queries: np.ndarray,
    query: np.ndarray,
    place: np.ndarray,
    k: int,
    metric: Metric,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best of the pairs of each query as merits (M, k), larger is better, and places (M, k).

    Where a query has fewer pairs, the rest are -inf.

    Args:
        store: has the vectors.
        keys: (R,) row keys.
        queries: (M, D).
        query: (P,) of each pair.
        place: (P,) in `keys`, of each pair.
        k: rows wanted per query.
        metric: what merits are.
    """
    order = np.argsort(place, kind="stable")
    query, place = query[order], place[order]
    bounds = np.append(np.flatnonzero(np.diff(place, prepend=-1)), len(place))
    union = keys[place[bounds[:-1]]]
    merits = np.full(len(place), -np.inf)
    lengths = _norms(queries)
    chunk = max(1, _NUMBERS // queries.shape[1])
    # By stored row, not by query: a row that many queries propose is read once.
    for block in store.scan(columns=[], keys=union):
        assert block.vectors is not None
        which = np.searchsorted(union.view(_SORTABLE), block.keys.view(_SORTABLE))
        rows, pairs = spread(bounds[which], bounds[which + 1] - bounds[which])
        for s in range(0, len(pairs), chunk):
            pair = pairs[s : s + chunk]
            merits[pair] = _merits(queries[query[pair]], block.vectors[rows[s : s + chunk]], metric)
        if metric == "cosine":
            by = lengths[query[pairs]] * _norms(block.vectors)[rows]
            merits[pairs] = np.divide(merits[pairs], by, out=np.full(len(by), -np.inf), where=by > 0)
    best = np.lexsort((place, -merits, query))  # places are in the order of the keys
    counts = np.bincount(query, minlength=len(queries))
    slots = np.arange(k) < counts[:, None]
    which, there = np.nonzero(slots)
    first = best[(np.cumsum(counts) - counts)[which] + there]
    found, places = np.full(slots.shape, -np.inf), np.zeros(slots.shape, np.int64)
    found[which, there], places[which, there] = merits[first], place[first]
    return found, places


def _merits(queries: np.ndarray, vectors: np.ndarray, metric: Metric) -> np.ndarray:
    """Return inner products or negative squared distances, (P,) float64; whatever pairs come together, the same."""
    a, b = queries.astype(np.float64), vectors.astype(np.float64)
    return -_sums((a - b) ** 2) if metric == "l2" else _sums(a * b)


def _norms(vectors: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.sqrt(_sums(vectors.astype(np.float64) ** 2))
    return lengths


def _sums(terms: np.ndarray) -> np.ndarray:
    """Sum over the last axis by NumPy's pairwise rule; a matrix product's order of summation depends on its shape."""
    sums: np.ndarray = terms.sum(axis=1)
    return sums
