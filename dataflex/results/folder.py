"""A run's output folder, read as tables: what it was, what was trained on, and what came out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataflex.errors import ConfigError, CorruptionError
from dataflex.results import row_map, texts
from dataflex.results.names import ABOUT, MIXTURE, PLAN, ROWS, SUMMARY, TEST, TRAINING_LOG, WARNINGS

_MARKS = ("rounds", ABOUT, SUMMARY, TRAINING_LOG)
"""Any of these makes a folder one of a run."""
_ROUND = {
    "index": pa.int64(), "row_key": pa.binary(16), "score": pa.float64(), "age": pa.int32(),
    "dataset": pa.string(), "record": pa.int64(), "tokens": pa.int32(),
}  # fmt: skip


_NUMBERED = re.compile(r"round-(\d+)\.parquet")


@dataclass(frozen=True)
class RecordedRound:
    """One round as it was recorded.

    Attributes:
        number: of the round, from 0.
        kind: `warmup` or `update`.
        first_step: steps before its first.
        steps: its steps.
        epoch: the flex epoch that it is of, from 0.
        update: its number among the updates of its epoch, from 1; 0 of a warm-up.
        info: what else was recorded: method, features computed and reused, seconds, diagnostics.
        rows: a line for each row in training order: `position`, `index`, `row_key`, `score`, `age`, `dataset`,
            `record`, `tokens`.
    """

    number: int
    kind: str
    first_step: int
    steps: int
    epoch: int
    update: int
    info: Mapping[str, Any]
    rows: pa.Table

    @property
    def name(self) -> str:
        """What people call it."""
        name = f"update {self.update}" if self.kind == "update" else "warm-up"
        return f"{name} of epoch {self.epoch + 1}" if self.epoch else name


class RunFolder:
    """The output folder of `dataflex train`, finished or not.

    Args:
        folder: its path.

    Raises:
        ConfigError: it is not the folder of a run.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.path = Path(folder).expanduser()
        if not any((self.path / mark).exists() for mark in _MARKS):
            found = "no such folder" if not self.path.is_dir() else "a folder without a run"
            raise ConfigError(
                f"{folder}: found {found}; expected the output_dir of `dataflex train`, where {ABOUT} and rounds/ lie"
            )

    @property
    def name(self) -> str:
        """What the run is called: the last part of its path."""
        return self.path.resolve().name

    @cached_property
    def about(self) -> dict[str, Any]:
        """What was run, where and when (`dataflex_run.json`); empty of a run of an older version."""
        return self._json(ABOUT)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the training came to (`dataflex_summary.json`); empty until it has ended."""
        return self._json(SUMMARY)

    @cached_property
    def status(self) -> dict[str, Any]:
        """The status file; empty where there is none."""
        return self._json("status.json")

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What `dataflex plan` had said (`dataflex_plan.json`); empty where it was not asked."""
        return self._json(PLAN)

    @cached_property
    def round_numbers(self) -> list[int]:
        """The rounds recorded, in order."""
        found = [_NUMBERED.fullmatch(path.name) for path in (self.path / "rounds").glob("round-*.parquet")]
        return sorted(int(each[1]) for each in found if each)

    @cached_property
    def recorded(self) -> list[RecordedRound]:
        """All rounds, in order."""
        return [self.round(number) for number in self.round_numbers]

    def round(self, number: int) -> RecordedRound:
        """Return a round.

        Raises:
            ConfigError: there is none of this number.
            CorruptionError: it cannot be read.
        """
        if number not in self.round_numbers:
            known = ", ".join(map(str, self.round_numbers)) or "none"
            raise ConfigError(f"{self.path}: found no round {number}; expected one of: {known}")
        path = self.path / "rounds" / f"round-{number:05d}.parquet"
        table = _parquet(path)
        self._refuse_another(path, table)
        try:
            info = dict(json.loads((table.schema.metadata or {})[b"dataflex"]))
            round = info.pop("round")
            lines = {name: _column(table, name, kind) for name, kind in _ROUND.items()}
            rows = pa.table({"position": pa.array(np.arange(len(table))), **lines})
            return RecordedRound(
                number, round["kind"], round["first_step"], round["steps"], round["epoch"], round["update"], info, rows
            )  # fmt: skip
        except (KeyError, ValueError, TypeError, pa.ArrowException) as error:
            raise _unreadable(path, error) from error

    def _refuse_another(self, path: Path, round: pa.Table) -> None:
        """Hold the rows of a round against the map of the run.

        Raises:
            CorruptionError: they are of another training.
        """
        known = self.training_rows
        if known is None or not {"index", "row_key"} <= set(round.column_names):
            return
        most = pc.max(round["index"]).as_py() or 0
        if most >= len(known):
            raise self._of_another(path, most + 1)
        if not known["row_key"].take(round["index"].combine_chunks()).equals(round["row_key"].cast(pa.binary(16))):
            raise CorruptionError(
                f"{path}: found other rows than {ROWS} has at their places; expected those of one training. One of the "
                "two is another's, as where a training was killed before its first step: start it again"
            )

    def _of_another(self, path: Path, rows: int) -> CorruptionError:
        return CorruptionError(
            f"{path}: found {rows} training rows, {len(self.training_rows or ())} in {ROWS}; expected those of one "
            "training. One of the two is another's: train anew with another output_dir"
        )

    def rounds(self) -> pa.Table:
        """Return all rounds in one table: the columns of a round behind `round`, `kind` and `first_step`."""
        parts = []
        for each in self.recorded:
            said = {"round": pa.repeat(pa.scalar(each.number, pa.int64()), len(each.rows))}
            said |= {"kind": pa.repeat(each.kind, len(each.rows))}
            said |= {"first_step": pa.repeat(pa.scalar(each.first_step, pa.int64()), len(each.rows))}
            columns = {name: each.rows[name] for name in each.rows.column_names}
            parts.append(pa.table({**said, **columns}))
        kinds = {"round": pa.int64(), "kind": pa.string(), "first_step": pa.int64(), "position": pa.int64(), **_ROUND}
        return pa.concat_tables(parts) if parts else pa.schema(kinds).empty_table()

    def pool(self, number: int) -> pa.Table | None:
        """Return the score of every training row at an update, and the update its features were of; or None.

        Columns: `score`, how much the method's rule prefers the row (null: it cannot be chosen), `updated` (-1: a
        prefilter left the row out), `judged`, the score itself (null: the method has none), and `norm` of the row's
        gradient (null: not known). Runs of an older version have the first two.

        Raises:
            CorruptionError: it cannot be read, or has other rows than the run's map.
        """
        path = self.path / "rounds" / f"pool-{number:05d}.parquet"
        if not path.is_file():
            return None
        found = _parquet(path)
        if self.training_rows is not None and len(found) != len(self.training_rows):
            raise self._of_another(path, len(found))
        return found

    @cached_property
    def training_rows(self) -> pa.Table | None:
        """The map of the training rows alone, in the order of their `index`; None of an older run."""
        known = self.rows
        if known is None:
            return None
        return known.filter(pc.and_(pc.equal(known["role"], "train"), pc.is_valid(known["index"])))

    @cached_property
    def rows(self) -> pa.Table | None:
        """The map from the user's data to row keys (`dataflex.results.row_map.SCHEMA`); None of an older run."""
        path = self.path / ROWS
        return _parquet(path).cast(row_map.SCHEMA) if path.is_file() else None

    def texts(self, number: int) -> pa.Table:
        """Return what rows of a round say (`dataflex.results.texts.SCHEMA`); empty where no text was kept."""
        path = self.path / "rounds" / f"texts-{number:05d}.parquet"
        return _parquet(path).cast(texts.SCHEMA) if path.is_file() else texts.SCHEMA.empty_table()

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The training's log: a line for each step at which something was logged, in order.

        A training that went on from a checkpoint has logged some steps twice; the later word counts.
        """
        steps: dict[int, dict[str, Any]] = {}
        for line in self._lines(TRAINING_LOG):
            step = line.get("current_steps")
            if isinstance(step, int):
                steps.setdefault(step, {"step": step}).update({k: v for k, v in line.items() if v is not None})
        return [steps[step] for step in sorted(steps)]

    @cached_property
    def warnings(self) -> list[str]:
        """What the training warned of, each once."""
        return [str(line.get("text")) for line in self._lines(WARNINGS)]

    def losses(self) -> pa.Table:
        """Return `step`, training `loss`, `eval_loss`, `learning_rate`; null where none was logged."""
        names = {"loss": "loss", "eval_loss": "eval_loss", "lr": "learning_rate"}
        lines = [line for line in self.log if any(name in line for name in names)]
        columns: dict[str, Any] = {"step": pa.array([line["step"] for line in lines], pa.int64())}
        for name, called in names.items():
            values = [line.get(name) for line in lines]
            columns[called] = pa.array([v if isinstance(v, int | float) else None for v in values], pa.float64())
        return pa.table(columns)

    def shares(self) -> pa.Table:
        """Return what a mixer set and knew: a line for each `step`, `domain` and `name`, with its `value`.

        `name` is `proportions`, `loss`, `tokens` or what the mixer records, such as `rewards`.
        """
        return self._shares

    @cached_property
    def _shares(self) -> pa.Table:
        steps: dict[int, dict[str, Any]] = {}
        for line in self._lines(MIXTURE):
            if "resumed" in line:  # what was written behind that step is done again
                steps = {step: known for step, known in steps.items() if step < line["resumed"]}
            elif isinstance(line.get("step"), int):
                steps.setdefault(line["step"], {}).update(line)
        found = [
            {"step": step, "domain": domain, "name": name, "value": float(value)}
            for step, line in sorted(steps.items())
            for name, values in line.items()
            if isinstance(values, Mapping)
            for domain, value in values.items()
            if isinstance(value, int | float)
        ]
        kinds = [("step", pa.int64()), ("domain", pa.string()), ("name", pa.string()), ("value", pa.float64())]
        return pa.Table.from_pylist(found, schema=pa.schema(kinds))

    def test(self) -> pa.Table | None:
        """Return what each row of the test sets came to (`test.parquet`); None where the run was not measured."""
        path = self.path / TEST
        return _parquet(path) if path.is_file() else None

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise _unreadable(path, error) from error

    @cached_property
    def torn(self) -> list[str]:
        """Places in the logs that cannot be read, as where a process was killed while it wrote."""
        for name in (TRAINING_LOG, MIXTURE, WARNINGS):
            self._lines(name)
        return [f"{name}, line {number}" for name, numbers in self._torn.items() for number in numbers]

    @cached_property
    def _torn(self) -> dict[str, list[int]]:
        return {}

    def _lines(self, name: str) -> Sequence[dict[str, Any]]:
        """Return a file of one JSON object a line, without those that cannot be read (`torn`).

        A last line that is still being written is not there yet.
        """
        path = self.path / name
        if not path.is_file():
            return []
        found, torn = [], []
        for number, line in enumerate(path.read_text("utf-8", errors="replace").split("\n")[:-1], start=1):
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                torn.append(number)
        self._torn[name] = torn
        return found


def judged(pool: pa.Table) -> pa.ChunkedArray:
    """Return the score of every training row; of an older run what the rule made of it, which was kept alone."""
    return pool["judged" if "judged" in pool.column_names else "score"]


def _column(table: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """Return a column, null where a run of an older version has none."""
    return table[name].cast(kind) if name in table.column_names else pa.chunked_array([pa.nulls(len(table), kind)])


def _parquet(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CorruptionError:
    return CorruptionError(f"{path}: not readable ({error}); restore it, or train anew with another output_dir")
