"""Features that a test holds in arrays, in place of stores, and the context of an update made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dataflex.features.spec import FeatureSpec
from dataflex.rows import KEY_DTYPE, Rows, Status, Text
from dataflex.schedule import Round
from dataflex.selectors.base import Context


class Held:
    """A view over arrays, its blocks small and in a scrambled order."""

    def __init__(
        self,
        vectors: np.ndarray | None = None,
        status: np.ndarray | None = None,
        scalars: Mapping[str, np.ndarray] | None = None,
    ):
        self.scalars = dict(scalars or {})
        size = len(vectors) if vectors is not None else len(next(iter(self.scalars.values())))
        self.vectors = np.zeros((size, 0), np.float32) if vectors is None else np.asarray(vectors, dtype=np.float32)
        self.status = np.zeros(size, np.uint8) if status is None else status
        self.ages = np.zeros(size, np.int32)

    def scalar(self, name: str) -> np.ndarray:
        return self.scalars[name]

    def take(self, rows: np.ndarray) -> Held:
        return Held(self.vectors[rows], self.status[rows], {k: v[rows] for k, v in self.scalars.items()})

    def blocks(self, size: int = 4096, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        usable = np.flatnonzero(self.status == Status.OK)[::-1]
        usable = usable[part[0] :: part[1]]
        for start in range(0, len(usable), 3):
            yield usable[start : start + 3], self.vectors[usable[start : start + 3]]

    def nearest(
        self, queries: np.ndarray, k: int, metric: str, approximate_above: int = 1_000_000
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return neighbours by loops; ties by position."""
        scores, rows = [], []
        for query in queries.astype(np.float64):
            found = []
            for row, vector in enumerate(self.vectors.astype(np.float64)):
                if self.status[row] != Status.OK or (metric == "cosine" and not vector.any()):
                    continue
                product = float(query @ vector)
                cosine = product / (np.linalg.norm(query) * np.linalg.norm(vector) or 1)
                value = {"cosine": -cosine, "ip": -product, "l2": float(((query - vector) ** 2).sum())}[metric]
                found.append((value, row))
            best = sorted(found)[:k]
            scores.append([value if metric == "l2" else -value for value, _ in best])
            rows.append([row for _, row in best])
        return np.array(scores), np.array(rows, np.int64)


def pool(count: int, supervised: np.ndarray | None = None) -> Rows:
    keys = np.frombuffer(np.random.default_rng(5).bytes(16 * count), dtype=KEY_DTYPE)
    ones = np.ones(count, np.int32)
    seen = ones if supervised is None else supervised
    return Rows([], keys, ones * 0, np.arange(count), ones, seen, ones == 0, ("pool",), (), lambda row: Text("", ""))


def context(
    rows: Rows,
    targets: Sequence[str],
    features: Callable[[FeatureSpec, str | None, str | None], Held],
    update: int = 0,
    updates: int = 1,
    history: Sequence[np.ndarray] = (),
    seed: int = 1,
) -> Context:
    """Return an update; `features` gives a view for (spec, target, state)."""

    def get(
        spec: FeatureSpec, target: str | None = None, state: str | None = None, rows: np.ndarray | None = None
    ) -> Any:
        view = features(spec, target, state)
        return view if rows is None else view.take(rows)

    round = Round(1 + update, "update", 4, 2, 0, 1 + update)
    return Context(rows, dict.fromkeys(targets, rows), get, round, update, updates, list(history), seed)
