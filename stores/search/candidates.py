"""Rows that may be among the k nearest of a query, found in one pass over a store in float32.

A float32 score is off by no more than a bound. So whatever is among the k best by exact scores is within twice that
bound of the k-th best float32 score, and a pass keeps just that: a little more than k rows of each query.

M queries, b rows of a block, D numbers each, R rows to stay within, k neighbours, C places for candidates of a query,
P pairs of a query and a row. Cost: 2 M R D operations, and the rows read once. Memory: a block and M C pairs.
"""

from __future__ import annotations

import numpy as np

from dataflex.rows import spread
from dataflex.stores.encoded import Encoded
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.rounding import factor, unpacked
from dataflex.stores.search.faiss_index import Metric
from dataflex.stores.values import Layout

BLOCK = 4096
"""Rows scored at a time."""
_TILE = 1024  # queries scored at a time: 16 MB of scores


def candidates(
    store: ParquetStore, keys: np.ndarray, queries: np.ndarray, k: int, metric: Metric, room: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return every row that the exact scores can have among the k best of a query.

    Args:
        store: has the vectors.
        keys: (R,) distinct row keys to stay within, sorted, usable all.
        queries: (M, D) float32, finite; under `cosine` none of them zero.
        k: neighbours wanted, at most R.
        metric: as `dataflex.stores.search.nearest.nearest`, rows of zeros left out under `cosine`.
        room: C, at least k and a block's rows; R and a block's are enough for any query.

    Returns:
        Of each pair the query (P,) and the place of the row in `keys` (P,), by query; and which queries had more
        candidates than room, (M,) bool: what is returned of these is of no use.
    """
    words = keys.view("S16")
    lengths = np.linalg.norm(queries.astype(np.float64), axis=1)
    # Unit queries where their length does not matter, so that no product underflows; 2 a b - |b|^2 under `l2`.
    scale = np.full(len(queries), 2.0) if metric == "l2" else 1 / np.where(lengths > 0, lengths, 1)
    sides = (queries * scale[:, None]).astype(np.float32)
    held = [_Held(len(sides[s : s + _TILE]), k, room) for s in range(0, len(sides), _TILE)]
    longest, slack = 0.0, np.zeros(len(queries))
    for block in store.encoded(BLOCK, columns=[], keys=keys):
        codes, by, norms = _scaled(block, store.layout)
        places = np.searchsorted(words, block.keys.view("S16"))
        if metric == "cosine":
            is_long = norms * by > 0
            if not is_long.all():
                codes, norms, places = codes[is_long], norms[is_long], places[is_long]
            by = 1 / norms
        longest = max(longest, float((norms * by).max(initial=0)))
        slack = _slack(lengths, longest, queries.shape[1], metric)
        for number, part in enumerate(held):
            some = slice(number * _TILE, (number + 1) * _TILE)
            # What overflows is inf or NaN here, which `_Held` takes for good enough.
            with np.errstate(over="ignore", invalid="ignore"):
                scores = sides[some] @ codes.T
                scores *= by.astype(np.float32)
                if metric == "l2":
                    scores -= ((norms * by) ** 2).astype(np.float32)
            part.add(scores, places, slack[some])
    found = [part.found(slack[n * _TILE : (n + 1) * _TILE]) for n, part in enumerate(held)]
    query = np.concatenate([n * _TILE + query for n, (query, _, _) in enumerate(found)])
    return query, np.concatenate([places for _, places, _ in found]), np.concatenate([full for _, _, full in found])


def _scaled(block: Encoded, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes (b, D) float32 of no more than 127, what each row is to be multiplied by, and their norms, (b,)."""
    assert block.codes is not None
    codes = unpacked(block.codes, layout.storage, layout.width).astype(np.float32, copy=False)
    by = factor(block.scale, layout.storage)
    if by is None:  # of tiny and huge rows the squares would be 0 and infinite
        by = np.maximum(codes.max(axis=1), -codes.min(axis=1))
        codes = np.divide(codes, by[:, None], out=np.zeros_like(codes), where=by[:, None] > 0)
    return codes, by.astype(np.float64), np.sqrt(np.einsum("rd,rd->r", codes, codes).astype(np.float64))


def _slack(lengths: np.ndarray, longest: float, width: int, metric: Metric) -> np.ndarray:
    """Bound how far the float32 scores of any row seen are from the exact ones, (M,) float64."""
    # A float32 sum of D products is off by about D 2^-24 |a||b| at most, and by a least normal number for each product
    # that underflows; the factor 2 and the 8 are room for the rest, such as making vectors unit.
    reach = (lengths + longest) ** 2 if metric == "l2" else np.full(len(lengths), longest)
    bound: np.ndarray = 2 * (width + 8) * 2.0**-24 * reach + width * float(np.finfo(np.float32).tiny)
    return bound


class _Held:
    """The candidates of M queries so far, C places for each."""

    def __init__(self, queries: int, k: int, room: int):
        self.k = k
        self.scores = np.full((queries, room), -np.inf, np.float32)
        self.places = np.zeros((queries, room), np.int32)
        self.counts = np.zeros(queries, np.int64)
        self.floor = np.full(queries, -np.inf)  # the k-th best exact score is no less
        self.is_full = np.zeros(queries, bool)

    def add(self, scores: np.ndarray, places: np.ndarray, slack: np.ndarray) -> None:
        """Take in the scores (M, b) of rows at places (b,)."""
        room = self.scores.shape[1]
        passing = self._passing(scores, slack)
        counts = passing.sum(axis=1)
        if (self.counts + counts > room).any():
            self._compact(slack)
            passing = self._passing(scores, slack)
            counts = passing.sum(axis=1)
            self.is_full |= self.counts + counts > room
            passing[self.is_full], counts[self.is_full] = False, 0
        flat = np.flatnonzero(passing)
        query, row = np.divmod(flat, max(1, len(places)))
        slot = spread(self.counts, counts)[1]
        self.scores[query, slot], self.places[query, slot] = scores.ravel()[flat], places[row]
        self.counts += counts

    def found(self, slack: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the query and the place of each candidate, and which queries had too many."""
        self._compact(slack)
        query, slot = np.nonzero(np.arange(self.scores.shape[1]) < self.counts[:, None])
        return query, self.places[query, slot].astype(np.int64), self.is_full

    def _passing(self, scores: np.ndarray, slack: np.ndarray) -> np.ndarray:
        """Say which rows can be as good as the k-th. Their slack, not that of the rows that made the floor, counts."""
        with np.errstate(over="ignore", invalid="ignore"):
            least = np.nextafter((self.floor - slack).astype(np.float32), np.float32(-np.inf))
        passing: np.ndarray = ~(scores < least[:, None])  # NaN passes, as nothing is known of it
        return passing

    def _compact(self, slack: np.ndarray) -> None:
        """Drop what is too far below the k-th best to be one of them."""
        room = self.scores.shape[1]
        kth = np.partition(self.scores, room - self.k, axis=1)[:, room - self.k].astype(np.float64)
        self.floor = np.fmax(self.floor, kth - slack)
        keep = self._passing(self.scores, slack) & (np.arange(room) < self.counts[:, None])
        query, slot = np.nonzero(keep)
        self.counts = keep.sum(axis=1)
        there = spread(np.zeros(len(keep), np.int64), self.counts)[1]
        scores, places = self.scores[query, slot], self.places[query, slot]
        self.scores.fill(-np.inf)
        self.scores[query, there], self.places[query, there] = scores, places
