"""Values of one feature, read from stores in bounded memory (`dataflex.features.need.View`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from dataflex.access.neighbours import Piece, nearest
from dataflex.rows import Status, beginnings, by_key, spread
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.search.faiss_index import Metric


@dataclass(frozen=True)
class StoreView:
    """A feature of R rows that one store has.

    Attributes:
        store: has every row.
        keys: (R,) the key of each row in this store.
        status: (R,) uint8.
        ages: (R,) int32.
        shift: (D,) float32 that `blocks` and `dense` add to each vector, or None; `nearest` searches what is stored.
    """

    store: ParquetStore
    keys: np.ndarray
    status: np.ndarray
    ages: np.ndarray
    shift: np.ndarray | None = None

    @classmethod
    def of(cls, store: ParquetStore, keys: np.ndarray, age: int = 0, supervised: np.ndarray | None = None) -> StoreView:
        """Return a view of rows that were computed `age` updates ago.

        Args:
            store: has every row.
            keys: (R,) their keys.
            age: in updates.
            supervised: (R,) supervised tokens of rows that may be trained on: one without any is not usable, whatever
                is known of it.

        Raises:
            CoverageError: some are missing.
        """
        status = store.read(keys, columns=[], vectors=False).status
        if supervised is not None:
            status = np.where((status == Status.OK) & (supervised == 0), Status.NO_LABELS, status).astype(np.uint8)
        return cls(store, keys, status, np.full(len(keys), age, dtype=np.int32))

    def scalar(self, name: str) -> np.ndarray:
        """Return a scalar column, (R,)."""
        return self.store.read(self.keys, columns=[name], vectors=False).scalars[name]

    def blocks(self, size: int = 4096, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (rows, vectors) of usable rows in one pass over the store; identical rows come together.

        A share is a range of the sorted keys, as fragments are, so that it is read from few of them.
        """
        usable = np.flatnonzero(self.status == Status.OK)
        order = usable[by_key(self.keys[usable])]
        wanted = self.keys[order]
        bounds = beginnings(wanted)
        begin, end = ((len(bounds) - 1) * i // part[1] for i in (part[0], part[0] + 1))
        distinct, bounds = wanted[bounds[begin:end]], bounds[begin : end + 1]
        words = distinct.view("S16")
        for values in self.store.scan(size, columns=[], vectors=True, keys=distinct):
            assert values.vectors is not None
            at = np.searchsorted(words, values.keys.view("S16"))
            source, target = spread(bounds[at], bounds[at + 1] - bounds[at])
            vectors = values.vectors if len(source) == len(values.keys) else values.vectors[source]
            if self.shift is not None:  # a vector of zeros says that there is no gradient, not where it points
                vectors = np.where(vectors.any(axis=1, keepdims=True), vectors + self.shift, vectors)
            yield order[target], vectors

    def dense(self) -> np.ndarray:
        """Return all vectors at once, (R, D) float32; NaN where a row is not usable."""
        found = np.full((len(self.keys), self.store.layout.width), np.nan, dtype=np.float32)
        for rows, vectors in self.blocks():
            found[rows] = vectors
        return found

    def take(self, rows: np.ndarray) -> StoreView:
        """Return the view of some of the rows, in the order given."""
        return replace(self, keys=self.keys[rows], status=self.status[rows], ages=self.ages[rows])

    def nearest(
        self, queries: np.ndarray, k: int, metric: Metric, approximate_above: int = sys.maxsize
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the k nearest usable rows of each query: scores and rows, (M, k) each. Collective."""
        return nearest([self.usable(np.arange(len(self.keys)))], queries, k, metric, approximate_above)

    def usable(self, rows: np.ndarray) -> Piece:
        """Return the store, and the keys and positions of usable rows, given the position (R,) of each row."""
        ok = self.status == Status.OK
        return self.store, self.keys[ok], rows[ok]


@dataclass(frozen=True)
class Mixed:
    """A feature whose rows come from several stores, each part with its own age."""

    parts: list[tuple[np.ndarray, StoreView]]
    status: np.ndarray
    ages: np.ndarray

    @classmethod
    def of(cls, parts: list[tuple[np.ndarray, StoreView]], size: int) -> Mixed:
        """Join views of disjoint rows that together are all `size` rows."""
        status, ages = np.zeros(size, dtype=np.uint8), np.zeros(size, dtype=np.int32)
        for rows, view in parts:
            status[rows], ages[rows] = view.status, view.ages
        return cls(parts, status, ages)

    def take(self, rows: np.ndarray) -> Mixed:
        """Return the view of some of the rows, in the order given."""
        parts = []
        for at, view in self.parts:
            place = np.full(len(self.status), -1)
            place[at] = np.arange(len(at))
            mine = np.flatnonzero(place[rows] >= 0)
            if len(mine):
                parts.append((mine, view.take(place[rows[mine]])))
        return Mixed(parts, self.status[rows], self.ages[rows])

    def scalar(self, name: str) -> np.ndarray:
        """Return a scalar column, (R,)."""
        columns = [(rows, view.scalar(name)) for rows, view in self.parts]
        out = np.zeros(len(self.status), dtype=columns[0][1].dtype)
        for rows, values in columns:
            out[rows] = values
        return out

    def blocks(self, size: int = 4096, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (rows, vectors) of usable rows, store by store."""
        for rows, view in self.parts:
            for inner, vectors in view.blocks(size, part):
                yield rows[inner], vectors

    def nearest(
        self, queries: np.ndarray, k: int, metric: Metric, approximate_above: int = sys.maxsize
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the k nearest usable rows of each query over all stores: scores and rows, (M, k) each. Collective."""
        return nearest([view.usable(rows) for rows, view in self.parts], queries, k, metric, approximate_above)
