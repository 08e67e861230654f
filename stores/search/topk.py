"""Exact top-k inner products, streamed over a store of any size. M queries, b rows per block, D numbers, k kept.

Cost: 2 M R D operations and one pass over R rows. Memory: a row group, a block and M (b + k) scores.
"""

from __future__ import annotations

import logging

import numpy as np

from dataflex.errors import CoverageError, DataflexError, MismatchError
from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.encoded import Encoded
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.rounding import factor, unpacked
from dataflex.stores.values import Layout

_log = logging.getLogger(__name__)


def top_k(
    store: ParquetStore,
    queries: np.ndarray,
    k: int,
    *,
    block_rows: int = 4096,
    unit_rows: bool = False,
    weight: str | None = None,
    keys: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k rows with the highest scores for each query, best first; ties go to the smaller row key.

    Only rows whose status is OK take part; a row whose score overflows float32 is left out, and logged. The score is a
    float32 matrix product of the stored codes, so equal vectors may differ in its last bit.

    Args:
        store: a store with vectors.
        queries: (M, D) float32.
        k: rows wanted per query.
        block_rows: rows scored at a time.
        unit_rows: divide each score by the row's L2 norm (of zero rows it is 0); with unit queries that is the cosine.
        weight: scalar column that each score is multiplied by.
        keys: (R,) row keys to stay within; all by default.

    Returns:
        Scores (M, k) float32 and row keys (M, k).

    Raises:
        CoverageError: fewer than k rows are usable.
        MismatchError: the queries do not fit the store.
    """
    _check(store, queries, k)
    queries = np.ascontiguousarray(queries, np.float32)
    best = _Best(len(queries), k)
    dropped = 0
    columns = [] if weight is None else [weight]
    for block in store.encoded(block_rows, columns, keys=keys):
        if (block.status != Status.OK).any():
            block = block.take(block.status == Status.OK)
        scores = _scores(queries, block, store.layout, unit_rows, weight)
        finite = np.asarray(np.isfinite(scores).all(axis=0))
        if not finite.all():
            dropped += int((~finite).sum())
            scores, block = scores[:, finite], block.take(finite)
        best.add(scores, block.keys)
    if dropped:
        _log.warning("%d rows of %s left out: their scores overflow float32", dropped, store.path)
    if best.seen < k:
        raise CoverageError(f"{k} rows wanted of {store.path}, {best.seen} are usable; ask for fewer")
    return best.scores, best.keys


def _check(store: ParquetStore, queries: np.ndarray, k: int) -> None:
    if not store.layout.width:
        raise MismatchError(f"{store.path} has no vectors to search")
    if queries.ndim != 2 or queries.shape[1] != store.layout.width or not len(queries):
        raise MismatchError(f"queries are {list(queries.shape)}, {store.path} takes (M > 0, {store.layout.width})")
    if not np.isfinite(queries).all():
        raise DataflexError("a query holds NaN or infinity; leave out target rows whose status is not OK")
    if k < 1:
        raise MismatchError(f"k is {k}, expected 1 or more")


def _scores(queries: np.ndarray, block: Encoded, layout: Layout, unit_rows: bool, weight: str | None) -> np.ndarray:
    """Return (M, b) scores. A row's factor is applied to its scores, not to its D codes."""
    assert block.codes is not None
    codes = unpacked(block.codes, layout.storage, layout.width).astype(np.float32, copy=False)
    by = factor(block.scale, layout.storage)
    if unit_rows:  # a row's scale is in its norm too and cancels, so that of the codes is enough
        norms = np.sqrt(np.einsum("rd,rd->r", codes, codes))
        is_long = norms > 0 if by is None else (norms > 0) & (by > 0)  # int1 has signs of a row of zeros too
        by = np.divide(1, norms, out=np.zeros_like(norms), where=is_long)
    if weight is not None:
        column = block.scalars[weight].astype(np.float32)
        by = column if by is None else by * column
    with np.errstate(over="ignore", invalid="ignore"):  # `top_k` counts these rows and says so
        scores = queries @ codes.T
        return scores if by is None else np.multiply(scores, by, out=scores)


class _Best:
    """The best k of all scores seen so far, for each of M queries."""

    def __init__(self, queries: int, k: int):
        self.k = k
        self.seen = 0
        self.scores = np.empty((queries, 0), np.float32)
        self.keys = np.empty((queries, 0), KEY_DTYPE)

    def add(self, scores: np.ndarray, keys: np.ndarray) -> None:
        """Take in (M, b) scores of (b,) rows."""
        if not len(keys):
            return
        self.seen += len(keys)
        # What can still enter: as good as the block's own k-th, and as the k-th so far. Ties stay in for their keys.
        floor = np.full(len(scores), -np.inf, np.float32)
        if scores.shape[1] > self.k:
            floor = np.partition(scores, -self.k, axis=1)[:, -self.k]
        if self.scores.shape[1] == self.k:
            floor = np.maximum(floor, self.scores[:, -1])
        query, row = np.nonzero(scores >= floor[:, None])
        old = self.scores.shape[1]
        queries = np.concatenate([np.repeat(np.arange(len(scores)), old), query])
        values = np.concatenate([self.scores.ravel(), scores[query, row]])
        found = np.concatenate([self.keys.ravel(), keys[row]])
        words = np.ascontiguousarray(found).view(">u8").reshape(-1, 2)  # two big-endian words sort as their bytes do
        order = np.lexsort((words[:, 1], words[:, 0], -values, queries))
        starts = np.searchsorted(queries[order], np.arange(len(scores)))
        kept = order[starts[:, None] + np.arange(min(self.k, self.seen))]
        self.scores, self.keys = values[kept], found[kept]
