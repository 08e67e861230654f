"""The grid of a dataset: fixed cells of its sorted row keys, which do not depend on who computes or on what is missing.

A cell's batches follow from the rows that are asked for in it, so a feature has the same bits whether one process or
64 computed it, at once or after a kill. N distinct keys of the dataset, R asked for, C cells.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

SMALLEST = 64
"""Rows of a cell, at least: below, its files and batches cost more than what a crash would lose."""
_CELLS = 128
"""Cells that a larger dataset has at least: as many processes find work to take, and none waits long at the end."""


@dataclass(frozen=True)
class Grid:
    """Cells of a dataset.

    Attributes:
        keys: (N,) distinct keys of the dataset, sorted.
        most: rows of a cell, at most.
    """

    keys: np.ndarray
    most: int

    @property
    def rows(self) -> int:
        """Rows of a cell; the last one may have fewer."""
        return max(1, min(self.most, max(SMALLEST, -(-len(self.keys) // _CELLS))))

    @property
    def name(self) -> str:
        """Stands in the name of what is committed by the cell: the same rows in cells of another size are others."""
        return f"g{self.rows}"

    def cells(self, asked: np.ndarray) -> list[slice]:
        """Return the cells that hold any of the keys asked for, each as a part of them.

        Args:
            asked: (R,) keys of the dataset, distinct and sorted.
        """
        number = np.searchsorted(self.keys.view("S16"), asked.view("S16")) // self.rows
        bounds = [*np.flatnonzero(np.diff(number, prepend=-1)).tolist(), len(asked)]
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
