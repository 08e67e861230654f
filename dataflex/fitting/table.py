"""The table of finished runs: the mixture that each was trained on, and the metrics that it reached.

R runs, K domains, J metrics.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.config.problems import Origin, Problems
from dataflex.errors import ConfigError

MIX, METRIC = "mix.", "metric."
LEAST = 3
"""Distinct mixtures below which nothing can be fitted to some and compared with another."""


@dataclass(frozen=True)
class Runs:
    """Finished runs.

    Attributes:
        domains: (K,) names, in the order of the columns.
        metrics: (J,) names, in the order of the columns.
        mixtures: (R, K) float64, at least 0, each line summing to 1.
        values: (R, J) float64, finite; lower is better.
        unused: columns that are neither.
    """

    domains: tuple[str, ...]
    metrics: tuple[str, ...]
    mixtures: np.ndarray
    values: np.ndarray
    unused: tuple[str, ...] = ()

    @property
    def group(self) -> np.ndarray:
        """(R,) int64, the same number for runs of the same mixture."""
        # Rounded: weights that are multiples of each other differ in their last digits once they are normalised.
        return np.unique(self.mixtures.round(12), axis=0, return_inverse=True)[1].reshape(-1)


def read_runs(path: Path) -> Runs:
    """Read a CSV file, or Parquet by its name, with a line for each run.

    Raises:
        ConfigError: lists all that is wrong in it, with lines and columns.
    """
    origin, problems = Origin(path), Problems()
    header, lines = _parquet(path) if path.suffix == ".parquet" else _csv(path)
    domains = [name for name in header if name.startswith(MIX)]
    metrics = [name for name in header if name.startswith(METRIC)]
    for name in dict.fromkeys(name for name in header if header.count(name) > 1):
        problems.say(origin, name, f"found {header.count(name)} columns of this name; expected one")
    for name in (name for name in (MIX, METRIC) if name in header):
        problems.say(origin, name, "found a column without a name after the dot; expected a domain or a metric")
    if len(domains) < 2:
        problems.say(origin, f"{MIX}*", f"found {len(domains)} columns; expected one for each of 2 or more domains")
    if not metrics:
        problems.say(origin, f"{METRIC}*", "found no column; expected at least one metric, lower being better")
    problems.raise_if_any()
    cells = _Cells(origin, problems, header)
    mixtures = np.zeros((len(lines), len(domains)))
    values = np.zeros((len(lines), len(metrics)))
    for row, (line, read) in enumerate(lines):
        mixtures[row] = [cells.number(line, read, name, lowest=0) for name in domains]
        values[row] = [cells.number(line, read, name) for name in metrics]
        if mixtures[row].sum() == 0:
            problems.say(origin, f"{MIX}*", "found no weight above 0; expected at least one", line=line)
    problems.raise_if_any()
    runs = Runs(
        tuple(name.removeprefix(MIX) for name in domains),
        tuple(name.removeprefix(METRIC) for name in metrics),
        mixtures / mixtures.sum(axis=1, keepdims=True),
        values,
        tuple(name for name in header if not name.startswith((MIX, METRIC))),
    )
    _check_content(runs, origin, problems)
    problems.raise_if_any()
    return runs


def _check_content(runs: Runs, origin: Origin, problems: Problems) -> None:
    """Note tables from which nothing can be learnt: too few mixtures, or columns that never change."""
    distinct = len(set(runs.group.tolist()))
    if distinct < LEAST:
        found = f"found {len(runs.mixtures)} lines with {distinct} different mixtures"
        problems.say(origin, "", f"{found}; expected {LEAST} mixtures or more, better several for each domain")
        return
    for name, weights in zip(runs.domains, runs.mixtures.T, strict=True):
        if not weights.any():
            why = "Nothing can be learnt about it: leave the column out"
            problems.say(origin, MIX + name, "found 0 in every line; expected runs with the domain", why)
    for name, values in zip(runs.metrics, runs.values.T, strict=True):
        if values.min() == values.max():
            problems.say(origin, METRIC + name, f"found {values[0]:g} in every line; expected values that differ")


class _Cells:
    """Reads numbers out of lines, and notes what is none."""

    def __init__(self, origin: Origin, problems: Problems, header: Sequence[str]):
        self._origin = origin
        self._problems = problems
        self._header = header

    def number(self, line: int, cells: Sequence[Any], column: str, lowest: float | None = None) -> float:
        """Return the number in a column; 0 where a problem was noted."""
        cell = cells[self._header.index(column)]
        try:
            value = float("nan" if cell is None else cell)
        except (TypeError, ValueError):
            value = float("nan")
        if np.isfinite(value) and (lowest is None or value >= lowest):
            return value
        wanted = "a finite number" + ("" if lowest is None else f", {lowest:g} or more")
        found = "nothing" if cell is None or cell == "" else repr(cell)
        self._problems.say(self._origin, column, f"found {found}; expected {wanted}", line=line)
        return 0.0


def _csv(path: Path) -> tuple[list[str], list[tuple[int, Sequence[Any]]]]:
    """Return the header, and each line that is not empty with its number in the file."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            read = [(reader.line_num, [cell.strip() for cell in line]) for line in reader if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: {error}; expected a CSV or .parquet file with a line for each run") from error
    if not read:
        raise ConfigError(f"{path}: found an empty file; expected a header and a line for each run")
    header, problems = read[0][1], Problems()
    for number, line in read[1:]:
        if len(line) != len(header):
            problems.say(Origin(path), "", f"found {len(line)} cells; expected {len(header)}", line=number)
    problems.raise_if_any()
    return header, list(read[1:])


def _parquet(path: Path) -> tuple[list[str], list[tuple[int, Sequence[Any]]]]:
    """Return the names of the columns, and the rows, counted from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{path}: {error}; expected a CSV or .parquet file with a line for each run") from error
    columns = [column.to_pylist() for column in table.columns]
    return table.column_names, list(enumerate(zip(*columns, strict=True), start=1))
