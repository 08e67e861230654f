"""Rows that were chosen once, as tables and as a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset


class Choice:
    """Rows that `Run.select` chose, best first.

    Attributes:
        table: a line for each row: `index` (position in the training set), `row_key`, `score` (null where the method
            gives none), `rank`, `dataset` and `record` (position in that dataset).
        records: their raw records with all fields, in that order.
    """

    def __init__(self, table: pa.Table, records: Sequence[Mapping[str, Any]]):
        self.table = table
        self.records = records

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        names = ", ".join(sorted(set(self.table["dataset"].to_pylist())))
        return f"Choice({len(self)} rows of {names})"

    def to_pandas(self) -> pd.DataFrame:
        """Return the table as a data frame."""
        return self.table.to_pandas()

    def to_dataset(self) -> Dataset:
        """Return the records as a data set of `datasets`, with all their fields; None where a record lacks one."""
        from datasets import Dataset

        fields = dict.fromkeys(name for record in self.records for name in record)
        return Dataset.from_dict({name: [record.get(name) for record in self.records] for name in fields})
