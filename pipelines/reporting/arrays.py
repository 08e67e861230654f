"""What pictures are drawn from, gathered from a run's files. U updates, N training rows, S sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataflex.results.folder import RecordedRound, RunFolder, judged

MOST_SOURCES = 8
OTHERS = "all others"
_MOST_COMPARED = 24
"""Updates whose choices are compared with each other; of more, so many, evenly spaced."""
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Scores:
    """The scores of an update.

    Attributes:
        update: name of the update.
        pool: (N,) of every training row, as the method judges it, NaN where there is none.
        norm: (N,) norms of gradients, NaN where there is none.
        chosen: (N,) times that a row was chosen.
    """

    update: str
    pool: np.ndarray
    norm: np.ndarray
    chosen: np.ndarray


class Arrays:
    """The numbers of one run, each gathered when it is asked for.

    Args:
        run: its folder.
    """

    def __init__(self, run: RunFolder):
        self.run = run

    @cached_property
    def size(self) -> int:
        """N; of a run that kept no map, the rows it is known to have."""
        if self.run.training_rows is not None:
            return len(self.run.training_rows)
        largest = [int(pc.max(each.rows["index"]).as_py() or 0) + 1 for each in self.run.recorded]
        return max([int(self.run.summary.get("rows", 0)), *largest])

    @cached_property
    def tokens(self) -> np.ndarray:
        """(N,) tokens of each row, NaN where that is not known."""
        return self._by_row("tokens")

    @cached_property
    def sources(self) -> tuple[list[str], np.ndarray]:
        """Names of the S largest sources and `OTHERS`, and (N,) which of them each row is from; -1: not known."""
        codes = np.full(self.size, -1)
        names: list[str] = []
        for index, dataset in self._places():
            for name in pc.unique(dataset).to_pylist():
                if name not in names:
                    names.append(name)
                codes[index[pc.equal(dataset, name).to_numpy(zero_copy_only=False)]] = names.index(name)
        counts = np.bincount(codes[codes >= 0], minlength=len(names))
        order = np.argsort(-counts, kind="stable")
        place = np.empty(len(names), np.int64)
        place[order] = np.minimum(np.arange(len(names)), MOST_SOURCES)
        shown = [names[i] for i in order[:MOST_SOURCES]] + ([OTHERS] if len(names) > MOST_SOURCES else [])
        return shown, np.where(codes < 0, -1, place[codes] if len(names) else -1)

    @cached_property
    def updates(self) -> list[RecordedRound]:
        """The rounds that a method chose."""
        return [each for each in self.run.recorded if each.kind == "update"]

    @cached_property
    def by_source(self) -> tuple[list[str], np.ndarray]:
        """Names of rounds, and (rounds, S) rows trained on in each, by source."""
        names, codes = self.sources
        found = np.zeros((len(self.run.recorded), len(names)), np.int64)
        for number, each in enumerate(self.run.recorded):
            some = codes[each.rows["index"].to_numpy()]
            found[number] = np.bincount(some[some >= 0], minlength=len(names))
        return [each.name for each in self.run.recorded], found

    @cached_property
    def times(self) -> np.ndarray:
        """(N,) updates that chose each row."""
        found = np.zeros(self.size, np.int64)
        for each in self.updates:
            found[np.unique(each.rows["index"].to_numpy())] += 1
        return found

    @cached_property
    def overlap(self) -> tuple[list[str], np.ndarray]:
        """Names of updates, and (u, u) of the rows that two chose, the share that both did (Jaccard)."""
        some = _some(self.updates)
        chosen = np.zeros((len(some), self.size), np.float32)
        for number, each in enumerate(some):
            chosen[number, each.rows["index"].to_numpy()] = 1
        return [str(self.updates.index(each) + 1) for each in some], jaccard(chosen)

    @cached_property
    def last(self) -> Scores | None:
        """The scores of the last update that recorded the pool's."""
        return next((found for each in reversed(self.updates) if (found := self._scores(each)) is not None), None)

    def spread(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Return names of updates, (u, 5) quantiles of the pool's scores, and (u, 5) of those chosen."""
        names, pool, chosen = [], [], []
        for each in _some(self.updates):
            if (found := self._scores(each)) is not None:
                usable = found.pool[np.isfinite(found.pool)]
                trained = np.repeat(found.pool, found.chosen)
                names.append(found.update)
                pool.append(np.quantile(usable, _QUANTILES))
                trained = trained[np.isfinite(trained)]
                chosen.append(np.quantile(trained, _QUANTILES) if len(trained) else [np.nan] * len(_QUANTILES))
        return names, np.array(pool), np.array(chosen)

    def spread_by_source(self) -> tuple[list[str], np.ndarray]:
        """Return names of sources, and (S, 5) quantiles of their scores at the last update."""
        names, codes = self.sources
        last = np.empty(0) if self.last is None else self.last.pool
        found = [(name, last[(codes == i) & np.isfinite(last)]) for i, name in enumerate(names)]
        some = [(name, np.quantile(values, _QUANTILES)) for name, values in found if len(values)]
        return [name for name, _ in some], np.array([values for _, values in some])

    def _scores(self, update: RecordedRound) -> Scores | None:
        pool = self.run.pool(update.number)
        if pool is None or len(pool) != self.size or judged(pool).null_count == len(pool):
            return None
        norm = _floats(pool["norm"]) if "norm" in pool.column_names else np.full(self.size, np.nan)
        chosen = np.bincount(update.rows["index"].to_numpy(), minlength=self.size)
        return Scores(str(self.updates.index(update) + 1), _floats(judged(pool)), norm, chosen)

    def _by_row(self, name: str) -> np.ndarray:
        if self.run.training_rows is not None:
            return _floats(self.run.training_rows[name])
        found = np.full(self.size, np.nan)
        for each in self.run.recorded:
            found[each.rows["index"].to_numpy()] = _floats(each.rows[name])
        return found

    def _places(self) -> Iterator[tuple[np.ndarray, pa.ChunkedArray]]:
        """Yield rows, and the dataset of each."""
        if self.run.training_rows is not None:
            yield np.arange(self.size), self.run.training_rows["dataset"].cast(pa.string())
        else:
            for each in self.run.recorded:
                yield each.rows["index"].to_numpy(), each.rows["dataset"].fill_null("not known")


def _some(updates: Sequence[RecordedRound]) -> Sequence[RecordedRound]:
    if len(updates) <= _MOST_COMPARED:
        return updates
    return [updates[i] for i in np.linspace(0, len(updates) - 1, _MOST_COMPARED).round().astype(int)]


def jaccard(chosen: np.ndarray) -> np.ndarray:
    """Return, of the rows that one or the other of two chose, the share that both did.

    Args:
        chosen: (u, N) 1 where a row was chosen, else 0.

    Returns:
        (u, u), 1 on the diagonal; NaN of two that chose nothing.
    """
    both = chosen.astype(np.float64) @ chosen.T.astype(np.float64)
    own = np.diag(both)
    either = own[:, None] + own[None, :] - both
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = both / either
    return found


def heads(runs: Sequence[RunFolder]) -> list[np.ndarray]:
    """Return the first eight bytes of each row key that updates of a run chose, which tell digests apart; sorted."""
    found = []
    for run in runs:
        parts = [
            np.frombuffer(b"".join(each.rows["row_key"].to_pylist()), ">u8").reshape(-1, 2)[:, 0]
            for each in run.recorded
            if each.kind == "update"
        ]
        found.append(np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64))
    return found


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    found: np.ndarray = column.cast(pa.float64()).to_numpy()
    return found
