"""What a method asks for, and what it is given: features of many rows, read in bounded memory.

R rows of a view, b rows of a block, D numbers per vector, M queries, k neighbours.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from dataflex.features.spec import FeatureSpec

StateName = str | None
"""Which state of the model: None, as it is when asked; `BASE`, before any training; or the folder of a checkpoint."""


@dataclass(frozen=True)
class Need:
    """A feature that a method will ask for.

    Attributes:
        spec: the feature.
        of: whose feature: the training rows', or that of every target set's rows.
        state: of the model; None is the model as it is at the update.
    """

    spec: FeatureSpec
    of: Literal["train", "targets"]
    state: StateName = None


class View(Protocol):
    """Values of one feature for R rows, read from stores in bounded memory."""

    @property
    def status(self) -> np.ndarray:
        """(R,) uint8 of `dataflex.rows.Status`."""
        ...

    @property
    def ages(self) -> np.ndarray:
        """(R,) int32, updates since each row's value was computed; 0 is fresh."""
        ...

    def take(self, rows: np.ndarray) -> View:
        """Return the view of some of the rows, in the order given."""
        ...

    def scalar(self, name: str) -> np.ndarray:
        """Return a scalar column, (R,)."""
        ...

    def blocks(self, size: int = 4096, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (rows (b,), vectors (b, D) float32) until every usable row came once, in the order of the storage.

        With `part` (i, n), only the i-th of n shares of the rows; the shares of all i are a partition.
        """
        ...

    def nearest(
        self, queries: np.ndarray, k: int, metric: Literal["cosine", "ip", "l2"], approximate_above: int = sys.maxsize
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the k nearest usable rows of each query, best first. Collective: ask alike on every rank.

        Ties go by (row key, position): identical rows all appear, next to each other. A row of zeros has no cosine and
        is no neighbour under `cosine`.

        Args:
            queries: (M, D) float32.
            k: rows wanted per query.
            metric: cosine or inner product, larger is better; or squared Euclidean distance, smaller is better.
            approximate_above: usable rows of one store from which an inverted file is searched, which can miss some
                neighbours, and which every rank holds whole (4 D bytes a row); with fewer the answer is exact.

        Returns:
            Scores (M, k) float64 and positions in the view (M, k) int64.

        Raises:
            ConfigError: FAISS is not installed.
            CoverageError: fewer than k rows can be neighbours.
            DataflexError: a query is not finite, or is zero under `cosine`.
            MismatchError: the queries do not fit the feature.
        """
        ...


class Features(Protocol):
    """Gives features: from the stores, computed first where they are missing. Collective: ask alike on every rank."""

    def __call__(
        self, spec: FeatureSpec, target: str | None = None, state: StateName = None, rows: np.ndarray | None = None
    ) -> View:
        """Return a feature of the training rows, or of the target set named; `rows` (R,) takes some of them.

        Args:
            spec: the feature.
            target: name of a target set.
            state: as `Need.state`.
            rows: positions; the view is of them, in their order.
        """
        ...
