"""Vectors of some rows, read from their store whenever they are wanted and never held at once.

R rows, b of them in a block, r some of them, D numbers per vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dataflex import distributed
from dataflex.selectors.base import View
from dataflex.selectors.parts.similarity import unit, vectors_of


class Streamed(Protocol):
    """Vectors of R rows."""

    def __len__(self) -> int: ...

    def blocks(self, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (rows (b,), vectors (b, D) float32) until every row came once; with `part` (i, n) the i-th share."""
        ...

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of some rows, (r, D) float32, in the order given."""
        ...


@dataclass(frozen=True)
class OfView:
    """The vectors of a view whose rows are usable all.

    Attributes:
        view: gives them.
        is_unit: whether they are made unit; a vector of zeros stays zero.
    """

    view: View
    is_unit: bool = True

    def __len__(self) -> int:
        return len(self.view.status)

    def blocks(self, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Read a pass."""
        for rows, vectors in self.view.blocks(part=part):
            yield rows, unit(vectors)[0] if self.is_unit else vectors

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Read some rows."""
        vectors = vectors_of(self.view, rows)
        return unit(vectors)[0] if self.is_unit else vectors


@dataclass(frozen=True)
class OfArray:
    """The vectors of an array (R, D)."""

    vectors: np.ndarray
    size: int = 4096

    def __len__(self) -> int:
        return len(self.vectors)

    def blocks(self, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Go through the array."""
        begin, end = (len(self.vectors) * i // part[1] for i in (part[0], part[0] + 1))
        for start in range(begin, end, self.size):
            rows = np.arange(start, min(start + self.size, end))
            yield rows, self.vectors[rows]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Take some rows."""
        return self.vectors[rows]


def streamed(vectors: np.ndarray | Streamed) -> Streamed:
    """Return vectors as they are streamed."""
    return OfArray(vectors) if isinstance(vectors, np.ndarray) else vectors


def share(vectors: Streamed) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield this rank's share of the blocks."""
    yield from vectors.blocks((distributed.rank(), distributed.world()))
