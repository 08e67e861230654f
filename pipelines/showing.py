"""`dataflex show`: the rows that a round of a run was trained on, as a table."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataflex.components.registry import did_you_mean
from dataflex.errors import ConfigError
from dataflex.results.folder import RecordedRound, RunFolder, judged
from dataflex.results.texts import ranking

_WIDEST = 40
SHOWN = 20
"""Rows that are shown to people who ask for no number."""
_SCHEMA = pa.schema(
    [
        ("round", pa.int64()), ("rank", pa.int64()), ("score", pa.float64()), ("dataset", pa.string()),
        ("record", pa.int64()), ("index", pa.int64()), ("age", pa.int32()), ("tokens", pa.int32()),
        ("times", pa.int64()), ("row_key", pa.binary(16)),
    ]
)  # fmt: skip
"""Columns: `rank` by how much the method prefers a row, among all that it could choose, from 1, the best, equal ones
alike; `score` as the method judges it, of which the preference may be another function, such as the chance to be drawn;
`times` that it was trained on in the round.
"""


def rounds_of(run: RunFolder, asked: str | None) -> list[RecordedRound]:
    """Return the rounds that are asked for: a number, `all`, or None, which means the last one.

    Raises:
        ConfigError: there is none, or none such.
    """
    if not run.round_numbers:
        kind = run.about.get("train_type")
        why = {
            "dynamic_mix": "a mixer draws rows by shares and records those: `dataflex report` shows them",
            "dynamic_weight": "a weighter trains on every row in LLaMA-Factory's order",
            "static": "LLaMA-Factory itself ordered the rows",
        }.get(str(kind), "no round was begun")
        raise ConfigError(f"{run.path}: found no rounds; expected those of a run with a selector ({why})")
    if asked == "all":
        return run.recorded
    if asked is None:
        return [run.round(run.round_numbers[-1])]
    try:
        number = int(asked)
    except ValueError:
        raise ConfigError(f"--round: found {asked!r}; expected a number, or all") from None
    return [run.round(number)]


def table(
    run: RunFolder,
    rounds: Sequence[RecordedRound],
    top: int | None = None,
    bottom: int | None = None,
    source: str | None = None,
    whole_pool: bool = False,
) -> pa.Table:
    """Return the distinct rows of rounds, best first; without scores, in training order.

    Args:
        run: the run.
        rounds: of it.
        top: so many of each round, the best.
        bottom: so many of each, the worst, worst first.
        source: of this dataset alone.
        whole_pool: every row that has a score, chosen or not, and not only those trained on.

    Raises:
        ConfigError: no row is of that source; or the scores of rows that were not chosen are not known.
    """
    parts = []
    for each in rounds:
        if not whole_pool:
            rows = _chosen(run, each)
        elif len(rounds) > 1 and run.pool(each.number) is None:
            continue
        else:
            rows = _pool(run, each)
        if source is not None:
            rows = rows.filter(pc.equal(rows["dataset"], source))
        if bottom is not None:
            rows = rows.filter(pc.is_valid(rows["rank"])) if rows["rank"].null_count < len(rows) else rows
            rows = rows.take(pa.array(np.arange(len(rows))[::-1][:bottom]))
        parts.append(rows.slice(0, top) if top is not None else rows)
    found = pa.concat_tables(parts) if parts else _SCHEMA.empty_table()
    if source is not None and not len(found):
        known = sorted({str(name) for each in rounds for name in pc.unique(each.rows["dataset"]).to_pylist()})
        raise ConfigError(
            f"--source: found no row of {source!r}; expected one of: {', '.join(known)}{did_you_mean(source, known)}"
        )
    return found


def with_texts(run: RunFolder, rows: pa.Table) -> pa.Table:
    """Add `prompt`, `response` (null where no text was kept), and `nearest`: target rows, each with what it says."""
    said: dict[tuple[int, str | None, int], Mapping[str, Any]] = {}
    for number in pc.unique(rows["round"]).to_pylist():
        said |= {(number, line["set"], line["index"]): line for line in run.texts(number).to_pylist()}
    found: list[Mapping[str, Any]] = []
    for number, index in zip(rows["round"].to_pylist(), rows["index"].to_pylist(), strict=True):
        line = said.get((number, None, index), {})
        near = [
            {**each, **{name: said.get((number, each["set"], each["index"]), {}).get(name) for name in _TEXTS}}
            for each in line.get("nearest") or ()
        ]
        found.append({**{name: line.get(name) for name in _TEXTS}, "nearest": near})
    schema = pa.schema([*((name, pa.string()) for name in _TEXTS), ("nearest", _NEAREST)])
    more = pa.Table.from_pylist(list(found), schema=schema)
    return pa.table({**_columns(rows), **_columns(more)})


_TEXTS = ("prompt", "response")
_NEAREST = pa.list_(
    pa.struct(
        [("set", pa.string()), ("index", pa.int64()), ("cosine", pa.float32()), *((n, pa.string()) for n in _TEXTS)]
    )
)


def plain(rows: pa.Table) -> list[dict[str, Any]]:
    """Return a table as plain data: row keys as hexadecimal digits."""
    lines = rows.to_pylist()
    return [{**line, "row_key": None if line["row_key"] is None else line["row_key"].hex()} for line in lines]


def csv_table(rows: pa.Table) -> pa.Table:
    """Return a table with columns that a CSV can hold."""
    keys = pa.array([None if key is None else key.hex() for key in rows["row_key"].to_pylist()], pa.string())
    found = {**_columns(rows), "row_key": keys}
    found.pop("nearest", None)
    return pa.table(found)


def lines(run: RunFolder, rounds: Sequence[RecordedRound], rows: pa.Table, whole_text: bool, hidden: int) -> list[str]:
    """Say the same for people: a line for each row; with `whole_text`, what it says and what is near below it."""
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    found = [f"{run.path}: {_said(rounds)}"]
    cells = [[_cell(line, name) for name in _SHOWN] for line in rows.to_pylist()]
    sizes = [max(len(name), *(len(row[i]) for row in cells), 0) if cells else 0 for i, name in enumerate(_SHOWN)]
    used = sum(sizes) + 2 * len(sizes)
    head = "  ".join(_put(name, size, name) for name, size in zip(_SHOWN, sizes, strict=True))
    found.append(head if whole_text else f"{head}  text")
    without = 0
    for row, line in zip(cells, rows.to_pylist(), strict=True):
        text = "  ".join(_put(cell, size, name) for cell, size, name in zip(row, sizes, _SHOWN, strict=True))
        is_kept = line.get("prompt") is not None
        without += not is_kept
        if whole_text:
            found += [text, *_block(line, width)] if is_kept else [text]
        else:
            excerpt = printable(f"{line['prompt']} → {line['response']}") if is_kept else "(not kept)"
            found.append(f"{text}  {textwrap.shorten(excerpt, max(30, width - used), placeholder='…')}".rstrip())
    if hidden > 0:
        found.append(f"{hidden} more; --top, --bottom, --source, --round; all of them by --json, --csv, --parquet FILE")
    if without:
        found.append(f"the text of {without} of these rows was not kept; dataflex.keep_texts says of how many it is")
    return found


def printable(text: str) -> str:
    """Return a text that cannot steer a terminal: on one line, control characters as blanks."""
    return "".join(c if c.isprintable() else " " for c in text)


_SHOWN = ("rank", "score", "times", "dataset", "record", "age", "tokens")


def _chosen(run: RunFolder, round: RecordedRound) -> pa.Table:
    """Return the distinct rows of a round, best first; without scores, in training order."""
    rows, index = round.rows, round.rows["index"].to_numpy()
    distinct, first, times = np.unique(index, return_index=True, return_counts=True)
    scores = _numbers(rows["score"])[first]
    pool = run.pool(round.number)
    of_all = scores if pool is None else _numbers(pool["score"])
    own = scores if pool is None else of_all[distinct]
    order = ranking(own) if np.isfinite(own).any() else np.argsort(first, kind="stable")
    return _schema(round, rows.take(pa.array(first[order])), times[order], _ranks(own, of_all)[order])


def _pool(run: RunFolder, round: RecordedRound) -> pa.Table:
    """Return every row that could be chosen at an update, best first."""
    pool, known = run.pool(round.number), run.rows
    if pool is None or known is None:
        raise ConfigError(
            f"{run.path}: found no scores of rows that {round.name} did not choose; expected a method that scores the "
            "whole pool, at an update. Leave out --pool"
        )
    of_train = run.training_rows
    assert of_train is not None
    preference = _numbers(pool["score"])
    order = ranking(preference)[: np.isfinite(preference).sum()]
    times = np.bincount(round.rows["index"].to_numpy(), minlength=len(preference))
    some = pa.table(
        {
            **{name: of_train[name] for name in ("index", "dataset", "record", "tokens", "row_key")},
            "score": judged(pool),
            "age": pa.nulls(len(pool), pa.int32()),
        }
    ).take(pa.array(order))
    return _schema(round, some, times[order], _ranks(preference, preference)[order])


def _ranks(own: np.ndarray, of_all: np.ndarray) -> np.ndarray:
    """Return the rank of rows among all, from 1, equal ones alike; masked where a row has none."""
    ordered = np.sort(-of_all[np.isfinite(of_all)])
    return np.ma.masked_array(np.searchsorted(ordered, -own) + 1, mask=~np.isfinite(own))


def _schema(round: RecordedRound, rows: pa.Table, times: np.ndarray, ranks: np.ndarray) -> pa.Table:
    found = {**_columns(rows), "round": pa.array([round.number] * len(rows), pa.int64())}
    found |= {"times": pa.array(times, pa.int64())}
    found |= {"rank": pa.array(np.ma.getdata(ranks), pa.int64(), mask=np.ma.getmaskarray(ranks))}
    return pa.table({name: found[name].cast(_SCHEMA.field(name).type) for name in _SCHEMA.names})


def _columns(rows: pa.Table) -> dict[str, Any]:
    return {name: rows[name] for name in rows.column_names}


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    found: np.ndarray = column.cast(pa.float64()).to_numpy()
    return found


def _said(rounds: Sequence[RecordedRound]) -> str:
    """Describe rounds in a line."""
    if len(rounds) > 1:
        return f"{len(rounds)} rounds, {sum(len(each.rows) for each in rounds)} rows trained on"
    (one,) = rounds
    steps = f"steps {one.first_step + 1}-{one.first_step + one.steps}"
    return f"round {one.number} ({one.name}, {steps}), {len(one.rows)} rows trained on"


def _cell(line: Mapping[str, Any], name: str) -> str:
    value = line[name]
    if value is None:
        return "-"
    text = f"{value:.5g}" if name == "score" else printable(str(value))
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"


def _put(text: str, size: int, name: str) -> str:
    return text.ljust(size) if name == "dataset" else text.rjust(size)


def _block(line: Mapping[str, Any], width: int) -> list[str]:
    """Return what a row says, indented, and the target rows nearest to it."""
    found = []
    for name in _TEXTS:
        found += textwrap.wrap(
            f"{name}: {printable(line[name])}", width, initial_indent="    ", subsequent_indent="      "
        )  # fmt: skip
    for near in line["nearest"]:
        text = printable(f"{near['prompt']} → {near['response']}")
        said = f"near: {near['set']} {near['index']}, cosine {near['cosine']:.3f}: {text}"
        found.append("    " + textwrap.shorten(said, width - 4, placeholder="…"))
    return [*found, ""]
