"""Static selection: train on rows that were chosen before, by `dataflex select` or by anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from dataflex.components.params import ExistingFile, Parameters
from dataflex.draws import stream
from dataflex.errors import ConfigError, MismatchError
from dataflex.rows import Rows, keys_from
from dataflex.selectors.base import Beginning, Context, NativeSelector, Selection


class Static(NativeSelector):
    """Passes over a fixed list of rows, each pass in a new order."""

    class Params(Parameters):
        """Parameters of `static`."""

        path: ExistingFile = Field(description="Parquet written by `dataflex select`, or JSON: a list of row positions")

    def prepare(self, beginning: Beginning) -> None:
        """Check the list against the training set.

        Raises:
            ConfigError: the list cannot be read.
            MismatchError: a row of it is not in the training set.
        """
        read_choice(self.params.path, beginning.rows)

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Selection:
        """Return the next `num_samples` entries of the endless pass over the list."""
        chosen = read_choice(self.params.path, context.rows)
        start = sum(len(rows) for rows in context.history)  # journaled, so a resumed run goes on there
        return Selection(stream(chosen, start, num_samples, context.seed, "static"))


def read_choice(path: str, rows: Rows) -> np.ndarray:
    """Read chosen rows, (k,) int64, and check them against the training set.

    Raises:
        ConfigError: the file is neither a `select` Parquet nor a JSON list of positions.
        MismatchError: a row of it is not in the training set.
    """
    file = Path(path)
    if file.suffix == ".parquet":
        return _from_parquet(file, rows)
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); expected a list of row positions") from error
    found = found.get("indices") if isinstance(found, dict) else found
    if (
        not isinstance(found, list)
        or not found
        or not all(isinstance(i, int) and not isinstance(i, bool) for i in found)
    ):
        raise ConfigError(f"{path}: expected a JSON list of row positions, or an object with such a list as `indices`")
    chosen = np.asarray(found, dtype=np.int64)
    if chosen.min() < 0 or chosen.max() >= len(rows):
        raise MismatchError(
            f"{path}: found positions {chosen.min()} to {chosen.max()}; the training set has rows 0 to {len(rows) - 1}"
        )
    return chosen


def _from_parquet(file: Path, rows: Rows) -> np.ndarray:
    import pyarrow.parquet as pq

    table = pq.read_table(file, page_checksum_verification=True)
    if not {"index", "row_key"} <= set(table.column_names):
        raise ConfigError(f"{file}: found columns {', '.join(table.column_names)}; expected index and row_key")
    index = table["index"].to_numpy().astype(np.int64)
    wanted = keys_from(table["row_key"].to_pylist())
    fits = (index >= 0) & (index < len(rows))
    fits[fits] = rows.keys[index[fits]] == wanted[fits]
    if not fits.all():  # the dataset was reordered or has grown: find the rows by their keys
        order = np.argsort(rows.keys, kind="stable")
        at = np.minimum(np.searchsorted(rows.keys[order], wanted), len(order) - 1)
        index = order[at]
        lost = int((rows.keys[index] != wanted).sum())
        if lost:
            raise MismatchError(
                f"{file}: {lost} of {len(wanted)} chosen rows are not in this training set; select anew, or train with "
                "the dataset, template, tokenizer and cutoff_len that they were selected with"
            )
    return index
