"""The run's record of what was trained on: one Parquet file per round, written before its first batch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataflex.errors import CorruptionError, MismatchError
from dataflex.rows import Rows, keys_from
from dataflex.schedule import Round
from dataflex.trainers.rounds import DecidedRound
from dataflex.whole import replacing

_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("index", pa.int64()),
        ("row_key", pa.binary(16)),
        ("score", pa.float64()),
        ("age", pa.int32()),
        ("dataset", pa.dictionary(pa.int32(), pa.string())),
        ("record", pa.int64()),
        ("tokens", pa.int32()),
    ]
)
_NEEDED = ("index", "row_key", "score", "age")
"""Columns that a round is read from."""


class Journal:
    """Rounds under one folder.

    Columns: `position` in training order, `index` in the processed training set, `row_key`, `score` (null where the
    method gives none), `age` of the features behind the score in updates (null where there are none); then what joins a
    row with the data it came from: `dataset`, `record` (position in that dataset), and its length in `tokens`.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)

    def path(self, number: int) -> Path:
        """Return where a round is, or would be."""
        return self.folder / f"round-{number:05d}.parquet"

    def texts(self, number: int) -> Path:
        """Return where the texts of a round are, or would be (`dataflex.results.texts`)."""
        return self.folder / f"texts-{number:05d}.parquet"

    def numbers(self) -> list[int]:
        """Return the numbers of the rounds recorded, in order."""
        return sorted(int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.parquet"))

    def write(self, decided: DecidedRound, rows: Rows) -> None:
        """Record a round durably: it is visible whole or not at all.

        Args:
            decided: the round.
            rows: the whole training set.
        """
        round, chosen = decided.round, decided.rows
        about = {"round": _fields(round), **decided.info}
        table = pa.table(
            {
                "position": np.arange(len(decided.rows)),
                "index": chosen,
                "row_key": pa.array([k.tobytes() for k in rows.keys[chosen]], pa.binary(16)),
                "score": pa.array(decided.scores, pa.float64(), mask=np.isnan(decided.scores)),
                "age": pa.array(decided.ages, pa.int32(), mask=decided.ages < 0),
                "dataset": pa.DictionaryArray.from_arrays(pa.array(rows.dataset[chosen]), list(rows.names)),
                "record": rows.index[chosen],
                "tokens": rows.length[chosen],
            },
            schema=_SCHEMA.with_metadata({b"dataflex": json.dumps(about).encode()}),
        )
        self._put(self.path(round.number), table)

    def read(self, round: Round, keys: np.ndarray, batch: int) -> DecidedRound | None:
        """Return a recorded round, or None if there is no record.

        Args:
            round: which.
            keys: row keys of the whole training set.
            batch: rows of an optimizer step.

        Raises:
            MismatchError: the record belongs to another schedule or another training set.
            CorruptionError: the file cannot be read.
        """
        path = self.path(round.number)
        if not path.is_file():
            return None
        table = _read(path, _NEEDED)
        try:
            about = dict(json.loads((table.schema.metadata or {})[b"dataflex"]))
            found = about.pop("round")
        except (KeyError, ValueError, TypeError) as error:
            raise _unreadable(path, error) from error
        if found != _fields(round):
            raise MismatchError(
                f"{path}: found round {found}, this run's schedule has {_fields(round)}; resume with the steps the "
                "run was begun with, or start anew with another output_dir"
            )
        rows = table["index"].to_numpy()
        if len(rows) != round.steps * batch:
            raise MismatchError(
                f"{path}: found {len(rows)} rows for {round.steps} steps; this run has a global batch of {batch}. "
                "Resume with the per_device_train_batch_size, gradient_accumulation_steps and processes that give "
                f"{len(rows) / round.steps:g} rows per step, or start anew with another output_dir"
            )
        recorded = keys_from(table["row_key"].to_pylist())
        inside = bool(len(rows)) and rows.min() >= 0 and rows.max() < len(keys)
        if not inside or not np.array_equal(keys[rows], recorded):
            raise MismatchError(
                f"{path}: its rows are not the rows of this training set (dataset, template, tokenizer or cutoff_len "
                "changed); resume with the data the run was begun with, or start anew with another output_dir"
            )
        scores = table["score"].to_numpy(zero_copy_only=False).astype(np.float64)
        ages = table["age"].fill_null(-1).to_numpy().astype(np.int32)
        return DecidedRound(round, rows, scores, ages, about)

    def write_pool(
        self, number: int, scores: np.ndarray, updated: np.ndarray, judged: np.ndarray, norms: np.ndarray
    ) -> None:
        """Record every training row.

        Args:
            number: of the round.
            scores: (N,) how much the rule prefers a row, not finite where it cannot be chosen.
            updated: (N,) the update at which a row's features were computed, -1 of a row that was not looked at.
            judged: (N,) the method's score of it, not finite where it has none.
            norms: (N,) of its gradient, NaN where there is none.
        """
        columns = {
            "score": pa.array(scores, pa.float32(), mask=~np.isfinite(scores)),
            "updated": pa.array(updated, pa.int32()),
            "judged": pa.array(judged, pa.float64(), mask=~np.isfinite(judged)),
            "norm": pa.array(norms, pa.float32(), mask=~np.isfinite(norms)),
        }
        self._put(self._pool(number), pa.table(columns))

    def read_pool(self, number: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return scores (N,) with -inf for null, and updates (N,) of a recorded pool, or None.

        Raises:
            CorruptionError: the file cannot be read.
        """
        path = self._pool(number)
        if not path.is_file():
            return None
        table = _read(path, ("score", "updated"))
        scores = table["score"].fill_null(-np.inf).to_numpy().astype(np.float64)
        return scores, table["updated"].to_numpy()

    def copy_to(self, folder: str | os.PathLike[str], numbers: Sequence[int], has_texts: bool = True) -> None:
        """Link (or copy) recorded rounds into another folder; those already there stay.

        What is itself a symbolic link, as in a checkpoint made of a kept state, is copied: where it leads to may go.
        """
        target = Journal(folder)
        target.folder.mkdir(parents=True, exist_ok=True)
        kinds = (self.path, self._pool, *((self.texts,) if has_texts else ()))
        for source in (kind(number) for number in numbers for kind in kinds):
            copy = target.folder / source.name
            if copy.exists() or not source.exists():
                continue
            copy.unlink(missing_ok=True)  # a link that leads nowhere
            with replacing(copy) as temporary:
                try:
                    if source.is_symlink():
                        raise OSError
                    os.link(source, temporary)
                except OSError:  # or another file system
                    shutil.copyfile(source, temporary)

    def clear(self) -> None:
        """Remove the rounds of an earlier run."""
        for kind in ("round", "pool", "texts"):
            for path in self.folder.glob(f"{kind}-*.parquet"):
                path.unlink()

    def _pool(self, number: int) -> Path:
        return self.folder / f"pool-{number:05d}.parquet"

    def _put(self, path: Path, table: pa.Table) -> None:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            pq.write_table(table, file, write_page_checksum=True)


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    """Read a file of the journal that has certain columns.

    Raises:
        CorruptionError: it cannot be read, or lacks one of them.
    """
    try:
        return pq.read_table(path, columns=list(columns), page_checksum_verification=True).select(list(columns))
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CorruptionError:
    return CorruptionError(f"{path}: not readable as a round of a run ({error}); restore it or start anew")


def _fields(round: Round) -> dict[str, object]:
    return {name: getattr(round, name) for name in ("number", "kind", "first_step", "steps", "epoch", "update")}
