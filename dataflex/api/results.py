"""What a run left, as tables, joined with the user's own data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dataflex.api.stores import Store
from dataflex.errors import ConfigError
from dataflex.results import export
from dataflex.results.folder import RunFolder
from dataflex.stores.root import StoreRoot, folder_name
from dataflex.stores.runs import read_runs
from dataflex.whole import replacing

if TYPE_CHECKING:
    from datasets import Dataset


def read_run(folder: str | os.PathLike[str]) -> RunResults:
    """Read the output folder of a run, finished or not; neither its model nor its data are needed.

    Raises:
        ConfigError: it is not the folder of a run.
    """
    return RunResults(folder)


class RunResults(RunFolder):
    """The output folder of a run as tables of Arrow, each with `to_pandas()`; got from `dataflex.read_run`.

    Beside what is here: `about`, `summary`, `status`, `rows` (the map from data to row keys), `rounds()`, `round(n)`,
    `pool(n)`, `texts(n)`, `losses()`, `shares()`, `test()`.
    """

    def __repr__(self) -> str:
        method = self.about.get("method") or self.about.get("train_type") or "a run"
        state = self.status.get("state", "state unknown")
        return f"RunResults({str(self.path)!r}: {method}, {state}, {len(self.round_numbers)} rounds)"

    def scores(self, round: int | None = None) -> pa.Table:
        """Return a line for each training row, in the order of `index`.

        Columns: `index` (position in the training set), `dataset`, `record`, `row_key`, `status`, `tokens`, `score`
        (null: none is known, or the row cannot be chosen) and `chosen` (how often the row is in the round).

        Args:
            round: its number; None: the last update.

        Raises:
            ConfigError: there is no such round, or an older version wrote the run.
        """
        return export.scores(self, round)

    def join(
        self, dataset: Dataset, name: str | None = None, *, round: int | None = None, role: str = "train",
        prefix: str = "",
    ) -> Dataset:  # fmt: skip
        """Return the user's data set with what the run knows of each record.

        Columns are added: `row_key` and `status` (`ok`, `no_labels`, `dropped`; null: the run did not load the record),
        and of training data `score` (at the last update, or in the round; null: none is known) and `chosen` (how often
        the record was trained on, in all rounds or in that one; null where the run has recorded none).

        Args:
            dataset: the data set as the run loaded it, all records in their order.
            name: what the run file calls it; None: the only one that the run has in that role.
            round: the number of a round; None: all.
            role: `train`, `target` or `test`, as what the run had it.
            prefix: what the added columns' names begin with.

        Raises:
            ConfigError: it has such columns already, the run has no such data or round, or its rows are no records.
            MismatchError: the run has records beyond the end of the data set.
        """
        _check(dataset)
        return _beside(dataset, export.records(self, name, round, role, len(dataset)), prefix)

    def chosen(
        self, dataset: Dataset, name: str | None = None, *, round: int | None = None, prefix: str = "",
        parquet: str | os.PathLike[str] | None = None,
    ) -> Dataset:  # fmt: skip
        """Return the records that were chosen from the user's data set, once for each time, in the order of training.

        Columns are added: `row_key`, `round`, and `score` as it was in that round.

        Args:
            dataset: the data set as the run loaded it, all records in their order.
            name: what the run file calls it; None: the only one that was trained on.
            round: the number of a round; None: all updates, and not the random rows of the warm-up.
            prefix: what the added columns' names begin with.
            parquet: a file that the records are written to as well.

        Raises:
            ConfigError: it has such columns already, the run has no such data, round or update, or its rows are no
                records.
            MismatchError: the run has records beyond the end of the data set.
        """
        _check(dataset)
        picks = export.picks(self, name, round, len(dataset))
        some = dataset.select(picks["record"].to_pylist()).flatten_indices()
        found = _beside(some, picks.drop_columns("record"), prefix)
        if parquet is not None:
            with replacing(Path(parquet)) as temporary:
                found.to_parquet(os.fspath(temporary))
        return found

    def stores(self, round: int | None = None) -> list[Store]:
        """Return the stores that the run used, sorted by name; none where they are gone.

        Args:
            round: the number of an update: those of them that had the live model's features there, in the order in
                which the method asks for them; None: all.

        Raises:
            ConfigError: there is no such round, or an older version wrote the run, without the place of its stores.
        """
        if not (place := self.about.get("store")):
            raise ConfigError(f"{self.path}: found no record of where its stores are; an older version wrote the run")
        root = StoreRoot(place)
        if round is not None:
            recipes = self.round(round).info.get("recipes", [])
            found = (root.find(recipe["feature"]["kind"], recipe) for recipe in recipes)
            return [Store(store) for store in found if store is not None]
        ours = os.path.abspath(self.path)
        used = {name for run in read_runs(root.files) if run.output_dir == ours for _, name in run.uses}
        return [Store(store) for store in root.stores() if folder_name(store.kind, store.recipe) in used]


def _check(dataset: Any) -> None:
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        what = f"{type(dataset).__module__.partition('.')[0]}.{type(dataset).__name__}"
        raise ConfigError(f"dataset: found {what}; expected a datasets.Dataset, such as one split of a DatasetDict")


def _beside(dataset: Dataset, columns: pa.Table, prefix: str) -> Dataset:
    """Return a data set with further columns."""
    from datasets import Dataset, concatenate_datasets

    columns = columns.rename_columns([f"{prefix}{name}" for name in columns.column_names])
    if twice := sorted({*columns.column_names} & {*dataset.column_names}):
        raise ConfigError(
            f"dataset: found columns {', '.join(twice)}, which would be added; expected none of that name: pass "
            "prefix='dataflex_', or rename them"
        )
    return concatenate_datasets([dataset, Dataset(columns)], axis=1)
