"""Cells of missing rows are taken by whoever comes next; each is committed whole, as soon as it is done.

Within a job the ranks draw tickets (`dataflex.access.tickets`), so a slow one takes fewer. Separate
launches that share a store go through the cells in orders of their own, look again before each, and leave alone what
another holds a lease of (`dataflex.stores.leases`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dataflex import distributed, stop
from dataflex.access.grid import Grid
from dataflex.access.progress import Progress
from dataflex.access.sources import Source
from dataflex.access.tickets import tickets
from dataflex.draws import generator
from dataflex.errors import DataflexError, Interrupted
from dataflex.features.batching import count_batches
from dataflex.features.spec import FeatureSpec
from dataflex.fingerprint import keys_digest
from dataflex.rows import Rows, Status
from dataflex.stores.leases import Lease
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.rounding import STORAGES
from dataflex.stores.values import Layout, Values

_PAUSE = 1.0
"""Seconds until what other launches are at is looked at again."""
_PATIENCE = 600.0
"""Seconds for which a launch waits for others, in the end: one that hangs renews its lease all the same."""
_LAUNCH_SEED = int.from_bytes(os.urandom(4))
"""Of the order in which this launch goes through the cells: another launch should be elsewhere."""


@dataclass
class Tally:
    """What one rank did in a stage. Rows are distinct rows, summed over features; `gradients` are backward passes."""

    computed: int = 0
    gradients: int = 0
    reused: int = 0
    tokens: int = 0
    batches: int = 0
    bytes: int = 0
    seconds: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class NonfiniteLimit:
    """How many rows may be NaN or infinite; the same whether they are computed now or were before.

    Attributes:
        share: of the dataset's distinct rows.
        total: distinct rows of the dataset, of which only some may be asked about.
    """

    share: float
    total: int

    def hold(self, bad: int) -> None:
        """Raise DataflexError if so many rows are too many."""
        if bad > self.share * self.total:
            raise DataflexError(
                f"{bad} of {self.total} rows gave NaN or infinity; dataflex.nonfinite_limit allows a share of "
                f"{self.share}. Check the learning rate, the dtype (bf16 rather than fp16) and the data."
            )


@dataclass(frozen=True)
class Cell:
    """Rows of one cell of the grid that are missing from the same stores.

    Attributes:
        specs: the features that they lack.
        stores: the store of each.
        name: what is committed is called so, in every store; a function of the keys and the grid.
        keys: (R,) distinct keys, sorted.
        at: (R,) the row of each.
    """

    specs: Sequence[FeatureSpec]
    stores: Sequence[ParquetStore]
    name: str
    keys: np.ndarray
    at: np.ndarray

    @property
    def is_committed(self) -> bool:
        """Whether another writer has committed it meanwhile, in all of its stores."""
        return all(store.is_committed(self.name) for store in self.stores)

    @property
    def lease(self) -> Lease:
        """The right to compute it."""
        files = self.stores[0].files
        return Lease(files, [f"{store.folder}/tmp/{self.name}.lease" for store in self.stores])


@dataclass(frozen=True)
class Work:
    """Features of one source that rows lack.

    Attributes:
        source: computes them.
        rows: the dataset.
        cells: in the order of the grid, the same on every rank.
        token_budget: tokens of a batch.
        limit: on rows that are NaN or infinite.
        leases: whether cells that another launch is at are left to it.
    """

    source: Source
    rows: Rows
    cells: Sequence[Cell]
    token_budget: int
    limit: NonfiniteLimit
    leases: bool = True

    def run(self, tally: Tally, progress: Progress) -> None:
        """Do cells until there are no more, or as many as a signal leaves time for. Collective if the source is.

        Raises:
            DataflexError: more rows than the limit allows are not finite.
        """
        if self.source.is_collective:
            self._run_in_waves(tally, progress)
        else:
            self._run_as_taken(tally, progress)

    def _run_as_taken(self, tally: Tally, progress: Progress) -> None:
        """Take cell after cell; those that another launch is at come last."""
        order = generator(distributed.broadcast(_LAUNCH_SEED), "cells").permutation(len(self.cells))
        others: list[Cell] = []
        for number in tickets(len(self.cells), stop.is_asked):
            cell = self.cells[order[number]]
            if not self._take(cell, tally, progress):
                others.append(cell)
        until = time.monotonic() + _PATIENCE
        while others and not stop.is_asked():
            heeds = time.monotonic() < until
            others = [cell for cell in others if not stop.is_asked() and not self._take(cell, tally, progress, heeds)]
            if others:
                time.sleep(_PAUSE)

    def _take(self, cell: Cell, tally: Tally, progress: Progress, heeds: bool = True) -> bool:
        """Do a cell, or find it done; say whether that is so. It is not where another launch, or a signal, is at it.

        Args:
            cell: the cell.
            tally: what is counted.
            progress: what is shown.
            heeds: whether another launch's lease is respected.
        """
        with contextlib.ExitStack() as stack:
            if self.leases and heeds and not cell.is_committed:
                if not cell.lease.take():
                    return False
                stack.enter_context(cell.lease.held())
            # After the lease was got: the one before may have been given back because the cell was committed.
            if cell.is_committed:
                tally.reused += len(cell.at) * len(cell.specs)
            elif not self._is_done(cell, tally):
                return False
        progress.advance(len(cell.at), int(self.rows.length[cell.at].sum()))
        return True

    def _run_in_waves(self, tally: Tally, progress: Progress) -> None:
        """Do one cell on every rank at a time: ranks that share every layer meet in each of them."""
        world, rank = distributed.world(), distributed.rank()
        for wave in waves(self.cells, world):
            if stop.is_asked_anywhere():
                return
            # Each runs as many batches as the busiest of them.
            least = max(count_batches(self.rows.length[cell.at], self.token_budget) for cell in wave)
            if rank < len(wave):
                self.compute(wave[rank], least, tally)
                lengths = self.rows.length[wave[rank].at]
                progress.advance(len(lengths), int(lengths.sum()))
            else:
                self.source.compute(self.rows, wave[0].at[:0], wave[0].specs, least)

    def _is_done(self, cell: Cell, tally: Tally) -> bool:
        """Do a cell; say whether it came to its end, and was not dropped because a signal is too long ago."""
        with contextlib.suppress(Interrupted), stop.droppable():
            self.compute(cell, 0, tally)
            return True
        return False

    def compute(self, cell: Cell, least: int, tally: Tally) -> None:
        """Compute a cell, in `least` batches or more, and commit it.

        Raises:
            DataflexError: more of its rows than the limit allows are not finite.
        """
        found = self.source.compute(self.rows, cell.at, cell.specs, least)
        for store, values in zip(cell.stores, found, strict=True):
            store.append(cell.name, Values(cell.keys, values.status, values.scalars, values.vectors))
            tally.bytes += len(cell.keys) * row_bytes(store.layout)
            for status in (Status.NO_LABELS, Status.NONFINITE):
                if count := int((values.status == status).sum()):
                    tally.skipped[status.name.lower()] = tally.skipped.get(status.name.lower(), 0) + count
        lengths = self.rows.length[cell.at]
        tally.computed += len(cell.at) * len(cell.specs)
        tally.gradients += len(cell.at) * any(spec.gradient is not None for spec in cell.specs)
        tally.tokens += int(lengths.sum())
        tally.batches += max(least, count_batches(lengths, self.token_budget))
        bad = max(int((values.status == Status.NONFINITE).sum()) for values in found)
        # Those of one cell alone: what is too much here is too much in the end, when all are counted.
        self.limit.hold(bad)


def waves(cells: Sequence[Cell], world: int) -> Iterator[Sequence[Cell]]:
    """Yield up to `world` cells at a time, of the same features: a pass for others has other collectives."""
    for specs in dict.fromkeys(tuple(cell.specs) for cell in cells):
        alike = [cell for cell in cells if tuple(cell.specs) == specs]
        yield from (alike[start : start + world] for start in range(0, len(alike), world))


def cells_of(
    grid: Grid, keys: np.ndarray, at: np.ndarray, stores: Mapping[FeatureSpec, ParquetStore], absent: np.ndarray
) -> list[Cell]:
    """Return what has to be computed, in the order of the grid.

    A cell of which a store has no row is done whole. One of which it has some, by an earlier request for other rows,
    is completed by the rest alone, whose batches are others than those of the whole would have been.

    Args:
        grid: of the dataset.
        keys: (R,) keys asked for, distinct and sorted.
        at: (R,) the row of each.
        stores: of S features.
        absent: (S, R) bool, what each store lacks.
    """
    found = []
    for part in grid.cells(keys):
        lacking = absent[:, part]
        for pattern in np.unique(lacking[lacking.any(axis=1)], axis=0):  # features that lack the same rows: one pass
            alike = [spec for spec, row in zip(stores, lacking, strict=True) if (row == pattern).all()]
            mine = keys[part][pattern]
            name = f"{grid.name}-{keys_digest(mine)}"
            found.append(Cell(alike, [stores[spec] for spec in alike], name, mine, at[part][pattern]))
    return found


def row_bytes(layout: Layout) -> int:
    """Return the bytes of one stored row: key, status, scalars, vector."""
    scalars = sum(np.dtype(kind).itemsize for kind in layout.scalars.values())
    return 17 + scalars + STORAGES[layout.storage].bytes(layout.width)
