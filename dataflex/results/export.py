"""A run's choices beside the data that they were made from. N training rows, M records of a data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataflex.errors import ConfigError, MismatchError
from dataflex.results.folder import RecordedRound, RunFolder, judged
from dataflex.results.names import ROWS

ROLES = ("train", "target", "test")


def scores(run: RunFolder, number: int | None = None) -> pa.Table:
    """Return a line for each training row, in the order of `index`.

    Columns: `index` (position in the training set), `dataset`, `record`, `row_key`, `status`, `tokens`, `score` (as the
    method judges the row; null: it does not, or that is not known) and `chosen` (how often the row is in the round).

    Args:
        run: the run's folder.
        number: of a round; None: the last update.

    Raises:
        ConfigError: there is no such round, or the run has kept no map of its rows.
        MismatchError: the round is of other rows than the map.
    """
    round = _update(run, number)
    rows = _map(run)
    rows = rows.filter(pc.and_(pc.equal(rows["role"], "train"), pc.is_valid(rows["index"]))).sort_by("index")
    count, pool = len(rows), run.pool(round.number)
    index = round.rows["index"].to_numpy()
    if (pool is not None and len(pool) != count) or index.max(initial=-1) >= count:
        raise MismatchError(
            f"{run.path}: round {round.number} is of other rows than the {count} of {ROWS}; expected those of one run. "
            "Was the folder put together from two?"
        )
    score = np.full(count, np.nan)
    if pool is not None:
        score = judged(pool).cast(pa.float64()).fill_null(np.nan).to_numpy().copy()
    own = round.rows["score"].fill_null(np.nan).to_numpy()
    score[index] = np.where(np.isnan(own), score[index], own)
    found = {name: rows[name] for name in ("index", "dataset", "record", "row_key", "status", "tokens")}
    found["score"] = pa.array(score, mask=~np.isfinite(score))
    found["chosen"] = pa.array(np.bincount(index, minlength=count))
    return pa.table(found)


def records(run: RunFolder, name: str | None, number: int | None, role: str, size: int) -> pa.Table:
    """Return a line for each of the M records of a data set of the run, in its order.

    Columns: `row_key`, `status` (null: the run did not load the record), and of training data `score` (of the last
    update, or of the round), `chosen` (how often the record was trained on, in all rounds or in that one; null where
    the run has recorded none). A record that was repeated in the training set counts as one.

    Args:
        run: the run's folder.
        name: the data set; None: the only one that the run has in that role.
        number: of a round; None: all.
        role: `train`, `target` or `test`.
        size: M.

    Raises:
        ConfigError: the run has no such data set or round, or its rows are blocks of several records.
        MismatchError: the run has records beyond the M.
    """
    lines = _of(run, name, role)
    called, at = lines["dataset"][0].as_py(), lines["record"].to_numpy()
    _refuse_beyond(run, called, at, size)
    first = np.full(size, -1)
    first[at[::-1]] = np.arange(len(at))[::-1]  # of repetitions, which say the same, the first
    found = {each: lines[each].take(pa.array(first, mask=first < 0)) for each in ("row_key", "status")}
    if role != "train":
        return _plain(found)
    numbers = run.round_numbers if number is None else [run.round(number).number]
    counts = np.zeros(size, np.int64)
    for each in numbers:
        counts += np.bincount(_picked(run.round(each), called)["record"].to_numpy(), minlength=size)
    score: pa.Array | pa.ChunkedArray = pa.nulls(size, pa.float64())
    if number is not None or any(each.kind == "update" for each in run.recorded):
        known = scores(run, number)
        known = known.filter(pc.equal(known["dataset"], called))
        place = np.full(size, -1)
        place[known["record"].to_numpy()[::-1]] = np.arange(len(known))[::-1]
        score = known["score"].take(pa.array(place, mask=place < 0))
    return _plain({**found, "score": score, "chosen": pa.array(counts, mask=np.full(size, not numbers))})


def picks(run: RunFolder, name: str | None, number: int | None, size: int) -> pa.Table:
    """Return a line for each time that a record of a data set was chosen, in the order of training.

    Columns: `record`, `row_key`, `round`, `score`. The other arguments are those of `records`; without a number it is
    all updates, whose rows a method chose, and not the warm-up.

    Raises:
        ConfigError: as `records`; and where the run has recorded no update.
        MismatchError: as `records`.
    """
    lines = _of(run, name, "train")
    called = lines["dataset"][0].as_py()
    _refuse_beyond(run, called, lines["record"].to_numpy(), size)
    rounds = [run.round(number)] if number is not None else [r for r in run.recorded if r.kind == "update"]
    if not rounds:
        raise _no_update(run)
    parts = []
    for round in rounds:
        some = _picked(round, called)
        which = pa.array(np.full(len(some), round.number))
        parts.append(
            pa.table({"record": some["record"], "row_key": some["row_key"], "round": which, "score": some["score"]})
        )
    return _plain(pa.concat_tables(parts))


def _update(run: RunFolder, number: int | None) -> RecordedRound:
    """Return a round, the last update where none is named."""
    if number is not None:
        return run.round(number)
    found = [each for each in run.recorded if each.kind == "update"]
    if not found:
        raise _no_update(run)
    return found[-1]


def _no_update(run: RunFolder) -> ConfigError:
    return ConfigError(
        f"{run.path}: found no update among its {len(run.round_numbers)} rounds; expected a run that has chosen rows "
        "(train_type: dynamic_select), behind its first update"
    )


def _map(run: RunFolder) -> pa.Table:
    if run.rows is None:
        raise ConfigError(
            f"{run.path}: found no {ROWS}; expected the map of its rows, which a run writes as it begins. An older "
            "version wrote this one: run the same command again with another output_dir"
        )
    return run.rows


def _of(run: RunFolder, name: str | None, role: str) -> pa.Table:
    """Return the lines of the map of one data set."""
    if role not in ROLES:
        raise ConfigError(f"role: found {role!r}; expected one of {', '.join(ROLES)}")
    settings = run.about.get("settings", {})
    if settings.get("stage") == "pt" and settings.get("packing") is not False:
        raise ConfigError(
            f"{run.path}: its rows are blocks packed from several records; expected rows that are one record each, as "
            "with packing: false"
        )
    lines = _map(run)
    lines = lines.filter(pc.equal(lines["role"], role))
    names = pc.unique(lines["dataset"]).to_pylist()
    if len(lines) and lines["truncated"].null_count == len(lines) and settings.get("tokenized_path"):
        raise ConfigError(
            f"{run.path}: its rows came tokenized from {settings['tokenized_path']}, where nothing says which "
            "records they were; expected a run on datasets"
        )
    if name is None and len(names) == 1:
        return lines
    if name not in names:
        found = "no name" if name is None else repr(name)
        raise ConfigError(f"name: found {found}; expected one of the run's {role} data: {', '.join(names) or 'none'}")
    return lines.filter(pc.equal(lines["dataset"], name))


def _picked(round: RecordedRound, name: str) -> pa.Table:
    """Return the rows of a round that are of a data set, in the order of training."""
    if round.rows["record"].null_count:
        raise ConfigError(f"round {round.number} was recorded by an older version, without the records of its rows")
    return round.rows.filter(pc.equal(round.rows["dataset"], name))


def _refuse_beyond(run: RunFolder, name: str, at: np.ndarray, size: int) -> None:
    most = int(at.max(initial=-1))
    if most >= size:
        raise MismatchError(
            f"data set {name}: found {size} records; expected at least {most + 1}, as many as {run.path} was made "
            "with: pass the data set as the run loaded it, in its order"
        )


def _plain(columns: dict[str, pa.ChunkedArray] | pa.Table) -> pa.Table:
    """Return a table of types that `datasets` has as well: variable binary, plain text."""
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    kinds: dict[str, pa.DataType] = {"row_key": pa.binary(), "status": pa.string()}
    fields: Sequence[pa.Field] = [pa.field(f.name, kinds.get(f.name, f.type)) for f in table.schema]
    return table.cast(pa.schema(fields))
