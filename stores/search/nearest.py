"""Exact nearest neighbours within some rows of a store, found by FAISS and scored again in float64.

FAISS computes in float32, and not alike for every number of queries. So it only proposes: more rows than are wanted,
which are read from the store and scored anew, until no row left out can belong to the answer. Equal vectors then have
equal scores, and the answer depends neither on the processes that share the queries nor on the FAISS at hand.

M queries, D numbers each, k neighbours, R rows to stay within; C proposals per query, P pairs of a query and a row.
Cost: FAISS's search, and the proposals read once.
"""

from __future__ import annotations

import numpy as np

from dataflex.rows import KEY_DTYPE
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.search.faiss_index import FaissIndex, Metric, load_faiss

_SORTABLE = "S16"
_PROPOSALS = 1 << 22  # (query, row) pairs held at a time
_NUMBERS = 1 << 17  # float64 numbers held at a time while scoring


def nearest(
    store: ParquetStore, index: FaissIndex, keys: np.ndarray, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest of some rows for each query, best first; ties go to the smaller row key.

    A `flat` index gives the exact answer, an `ivf` one the best of what it proposes. Under `cosine` a row of zeros is
    nobody's neighbour.

    Args:
        store: what the index was built for.
        index: its index.
        keys: (R,) distinct row keys to stay within, usable all.
        queries: (M, D) float32, finite; under `cosine` none of them zero.
        k: neighbours wanted, at most R.

    Returns:
        Scores (M, n) float64, squared distances under `l2`, and row keys (M, n). n is k, or the number of rows that
        can be neighbours where there are fewer.
    """
    within = np.isin(index.keys.view(_SORTABLE), keys.view(_SORTABLE))
    mask = None if within.all() else within  # without a mask a GPU may search
    width = queries.shape[1]
    # A float32 sum of D products is off by about D 2^-24 |a||b| at most, and by a least normal number for each product
    # that underflows; the factor 2 and the 8 are room for the rest, such as making vectors unit.
    slack = 2 * (width + 8) * 2.0**-24 * _reach(index, queries) + width * float(np.finfo(np.float32).tiny)
    merits = np.full((len(queries), k), -np.inf)
    found = np.zeros((len(queries), k), KEY_DTYPE)
    pending, proposals = np.arange(len(queries)), min(len(keys), k + k // 2 + 64)
    while len(pending):
        together = max(1, _PROPOSALS // proposals)
        uncertain = []
        for some in (pending[s : s + together] for s in range(0, len(pending), together)):
            values, proposed = index.search(queries[some], proposals, mask)
            merits[some], found[some] = _best(store, queries[some], proposed, k, index.metric)
            # No row left out has a float32 score above the last proposed one's; the answer is certain only if the k-th
            # merit beats that by more than rounding. Of rows that an approximate index left out nothing is known.
            bound = (-values if index.metric == "l2" else values)[:, -1] + slack[some]
            is_sure = np.isfinite(merits[some, -1]) if index.kind == "ivf" else merits[some, -1] > bound
            uncertain.append(some[~is_sure])
        pending = np.concatenate(uncertain) if proposals < len(keys) else pending[:0]  # all rows were scored: certain
        proposals = min(len(keys), 4 * proposals)
    count = int(np.isfinite(merits).sum(axis=1).min(initial=k))
    merits, found = merits[:, :count], found[:, :count]
    return (-merits if index.metric == "l2" else merits), found


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
    store: ParquetStore, queries: np.ndarray, proposed: np.ndarray, k: int, metric: Metric
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best of each query's proposed keys (M, C), as merits (M, k), larger is better, and keys (M, k)."""
    union, at = np.unique(proposed.view(_SORTABLE), return_inverse=True)
    order = np.argsort(at, axis=None, kind="stable")
    bounds = np.searchsorted(at.ravel()[order], np.arange(len(union) + 1))
    merits = np.full(proposed.size, -np.inf)
    lengths = _norms(queries)
    chunk = max(1, _NUMBERS // queries.shape[1])
    # By stored row, not by query: a row that many queries propose is read once.
    for block in store.scan(columns=[], keys=union.view(KEY_DTYPE)):
        assert block.vectors is not None
        which = np.searchsorted(union, block.keys.view(_SORTABLE))
        counts = bounds[which + 1] - bounds[which]
        rows = np.repeat(np.arange(len(which)), counts)
        pairs = order[np.repeat(bounds[which] - np.cumsum(counts) + counts, counts) + np.arange(len(rows))]
        for s in range(0, len(pairs), chunk):
            pair = pairs[s : s + chunk]
            merits[pair] = _merits(queries[pair // proposed.shape[1]], block.vectors[rows[s : s + chunk]], metric)
        if metric == "cosine":
            by = lengths[pairs // proposed.shape[1]] * _norms(block.vectors)[rows]
            merits[pairs] = np.divide(merits[pairs], by, out=np.full(len(by), -np.inf), where=by > 0)
    shaped = merits.reshape(proposed.shape)
    # `at` ranks keys as their bytes do.
    best = np.lexsort((at.reshape(proposed.shape), -shaped), axis=1)[:, :k]
    return np.take_along_axis(shaped, best, axis=1), np.take_along_axis(proposed, best, axis=1)


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
