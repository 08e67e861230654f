"""The nearest rows of a view for each query, over the stores that it reads and the processes of a run.

M queries, D numbers each, k neighbours; r rows of a part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataflex import distributed
from dataflex.errors import ConfigError, CoverageError, DataflexError, MismatchError
from dataflex.rows import beginnings, by_key, spread
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.search import nearest as in_store
from dataflex.stores.search.faiss_cache import load_or_build
from dataflex.stores.search.faiss_index import FaissIndex, Kind, Metric, kind_for

Piece = tuple[ParquetStore, np.ndarray, np.ndarray]
"""A store, the keys there (r,) of usable rows, and the positions (r,) of these rows in the view."""
_Found = tuple[np.ndarray, np.ndarray]  # scores and places in the part, (M, n) each, best first


def nearest(
    parts: Sequence[Piece], queries: np.ndarray, k: int, metric: Metric, approximate_above: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `dataflex.features.need.View.nearest` says. Collective: every rank searches for its share.

    What ranks exchange is the answer, M k pairs of a score and a position.
    """
    parts = [part for part in parts if len(part[1])]
    _check(parts, queries, k, metric)
    share = np.ascontiguousarray(queries[distributed.rank() :: distributed.world()], np.float32)
    # Rank 0's word counts: a store that another launch writes to may be larger for a rank that looks later.
    kinds = distributed.broadcast([kind_for(store, len(keys), approximate_above) for store, keys, _ in parts])
    found = []
    for part, kind in zip(parts, kinds, strict=True):
        index = None if kind is None else _index(part[0], metric, kind)
        found.append(_of_part(part, index, share, k, metric))
    shares = distributed.gather(_merged(parts, found, k, metric))
    scores, rows = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    for rank, (some_scores, some_rows) in enumerate(shares):
        if len(some_rows) and some_rows.shape[1] < k:
            raise CoverageError(
                f"{k} neighbours wanted, {some_rows.shape[1]} usable rows have a direction, the others are zero; "
                "ask for fewer"
            )
        if len(some_rows):
            scores[rank :: len(shares)], rows[rank :: len(shares)] = some_scores, some_rows
    return scores, rows


def _check(parts: Sequence[Piece], queries: np.ndarray, k: int, metric: Metric) -> None:
    total = sum(len(rows) for _, _, rows in parts)
    if metric not in ("cosine", "ip", "l2"):
        raise ConfigError(f"no neighbours by {metric!r}: cosine, ip or l2")
    if not 1 <= k <= total:
        raise CoverageError(f"{k} neighbours wanted, {total} rows are usable")
    width = parts[0][0].layout.width
    if not width:
        raise MismatchError(f"{parts[0][0].path} has no vectors to search")
    if queries.ndim != 2 or queries.shape[1] != width or not len(queries):
        raise MismatchError(f"queries are {list(queries.shape)}, {parts[0][0].path} takes (M > 0, {width})")
    if not np.isfinite(queries).all():
        raise DataflexError("a query holds NaN or infinity; leave out target rows whose status is not OK")
    if metric == "cosine" and not queries.any(axis=1).all():
        raise DataflexError("a query is zero and has no direction; leave it out")


def _index(store: ParquetStore, metric: Metric, kind: Kind) -> FaissIndex:
    """Return a store's index; where none is kept yet, rank 0 builds it and the others read it."""
    index = load_or_build(store, metric, kind) if distributed.is_main() else None
    distributed.barrier()
    return index or load_or_build(store, metric, kind)


def _of_part(part: Piece, index: FaissIndex | None, queries: np.ndarray, k: int, metric: Metric) -> _Found:
    """Return the nearest rows of one part: k, or all that can be neighbours where there are fewer."""
    store, keys, rows = part
    order = np.argsort(rows, kind="stable")
    order = order[by_key(keys[order])]
    ordered = keys[order]
    bounds = beginnings(ordered)
    scores, found = in_store.nearest(store, ordered[bounds[:-1]], queries, min(k, len(bounds) - 1), metric, index)
    # Identical rows share a key and its score: each takes a place of its own, in the order of their positions.
    counts = bounds[found + 1] - bounds[found]
    before = np.cumsum(counts, axis=1) - counts
    counts = np.clip(k - before, 0, counts)  # what lies beyond k is not laid out at all
    width = int(counts.sum(axis=1).min(initial=k))
    slots, places = spread(bounds[found].ravel(), counts.ravel())
    starts = np.cumsum(counts.sum(axis=1)) - counts.sum(axis=1)
    first = starts[:, None] + np.arange(width)
    return scores.ravel()[slots[first]], order[places[first]]


def _merged(parts: Sequence[Piece], found: Sequence[_Found], k: int, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and positions (M, n) of the k best of all parts, by (score, row key, position)."""
    rows = np.concatenate([part[2][places] for part, (_, places) in zip(parts, found, strict=True)], axis=1)
    if len(parts) == 1:
        return found[0][0], rows
    scores = np.concatenate([scores for scores, _ in found], axis=1)
    keys = np.concatenate([part[1][places] for part, (_, places) in zip(parts, found, strict=True)], axis=1)
    ranks = np.unique(keys.view("S16"), return_inverse=True)[1].reshape(keys.shape)
    order = np.lexsort((rows, ranks, scores if metric == "l2" else -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
