"""Missing rows are dealt to the ranks in fragments; each fragment is committed as soon as it is done.

Fragments are ranges of the sorted keys that are missing, so any number of processes, together or not, may do any of
them: a fragment that another writer has committed meanwhile is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dataflex import distributed, stop
from dataflex.access.progress import Progress
from dataflex.access.sources import Source
from dataflex.errors import DataflexError, Interrupted
from dataflex.features.batching import count_batches
from dataflex.features.spec import FeatureSpec
from dataflex.fingerprint import keys_digest
from dataflex.rows import Rows, Status
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.values import Layout, Values

_SMALLEST = 64  # rows; below, a fragment's files and batches cost more than what a crash would lose


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
class Work:
    """Features that are missing for the same rows.

    Attributes:
        source: computes them.
        specs: the features.
        stores: the store of each.
        rows: the dataset.
        keys: (R,) distinct keys, sorted.
        at: (R,) the row of each.
        token_budget: tokens of a batch.
        fragment_rows: rows of a fragment, at most.
        limit: on rows that are NaN or infinite.
    """

    source: Source
    specs: Sequence[FeatureSpec]
    stores: Sequence[ParquetStore]
    rows: Rows
    keys: np.ndarray
    at: np.ndarray
    token_budget: int
    fragment_rows: int
    limit: NonfiniteLimit

    def run(self, tally: Tally, progress: Progress) -> None:
        """Do this rank's share, or as much of it as a signal leaves time for. Collective if the source is.

        Raises:
            DataflexError: more rows than the limit allows are not finite.
        """
        world, rank = distributed.world(), distributed.rank()
        size = min(self.fragment_rows, max(_SMALLEST, -(-len(self.at) // (4 * world))))
        pieces = [slice(start, start + size) for start in range(0, len(self.at), size)]
        lengths = self.rows.length[self.at]
        for wave in range(0, len(pieces), world):
            if stop.is_asked_anywhere() if self.source.is_collective else stop.is_asked():
                return
            dealt = pieces[wave : wave + world]
            # Ranks that share every layer must run as many batches as the busiest of them.
            least = max(count_batches(lengths[p], self.token_budget) for p in dealt) if self.source.is_collective else 0
            if rank < len(dealt):
                if not self._is_done(dealt[rank], least, tally):
                    return
                progress.advance(len(lengths[dealt[rank]]), int(lengths[dealt[rank]].sum()))
            elif least:
                self.source.compute(self.rows, self.at[:0], self.specs, least)

    def _is_done(self, piece: slice, least: int, tally: Tally) -> bool:
        """Do a fragment; say whether it came to its end, and was not dropped because a signal is too long ago."""
        if self.source.is_collective:  # the others could not go on without this rank
            self._fragment(piece, least, tally)
            return True
        with contextlib.suppress(Interrupted), stop.droppable():
            self._fragment(piece, least, tally)
            return True
        return False

    def _fragment(self, piece: slice, least: int, tally: Tally) -> None:
        keys, at = self.keys[piece], self.at[piece]
        name = keys_digest(keys)
        if not self.source.is_collective and all(name in store.committed_fragments() for store in self.stores):
            tally.reused += len(at) * len(self.specs)
            return
        found = self.source.compute(self.rows, at, self.specs, least)
        for store, values in zip(self.stores, found, strict=True):
            store.append(name, Values(keys, values.status, values.scalars, values.vectors))
            tally.bytes += len(keys) * _row_bytes(store.layout)
            for status in (Status.NO_LABELS, Status.NONFINITE):
                if count := int((values.status == status).sum()):
                    tally.skipped[status.name.lower()] = tally.skipped.get(status.name.lower(), 0) + count
        lengths = self.rows.length[at]
        tally.computed += len(at) * len(self.specs)
        tally.gradients += len(at) * any(spec.gradient is not None for spec in self.specs)
        tally.tokens += int(lengths.sum())
        tally.batches += max(least, count_batches(lengths, self.token_budget))
        bad = max(int((values.status == Status.NONFINITE).sum()) for values in found)
        # Those of one fragment alone: what is too much here is too much in the end, when all are counted.
        self.limit.hold(bad)


def _row_bytes(layout: Layout) -> int:
    """Return the bytes of one stored row: key, status, scalars, vector."""
    scalars = sum(np.dtype(kind).itemsize for kind in layout.scalars.values())
    return 17 + scalars + layout.width * np.dtype(layout.storage).itemsize
