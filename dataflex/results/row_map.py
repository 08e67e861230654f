"""The map from a record of the user's data to its row key, by which any store can be joined with the data. N rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataflex.rows import KEY_DTYPE, Rows
from dataflex.whole import replacing

_NAMES = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("role", _NAMES),
        ("set", _NAMES),
        ("index", pa.int64()),
        ("dataset", _NAMES),
        ("record", pa.int64()),
        ("row_key", pa.binary(16)),
        ("tokens", pa.int32()),
        ("supervised", pa.int32()),
        ("truncated", pa.bool_()),
        ("status", _NAMES),
    ]
)
"""Columns of the map, one line for each record of the run's data.

`role` is `train`, `target` or `test`; `set` the target or test set, null of training rows; `index` the position in that
set, as the run counts it; `dataset` and `record` the place in the user's data (of packed blocks, the number of the
block); `row_key` the key in stores of features of the model; `tokens` and `supervised` the length and the tokens whose
label counts; `truncated` whether `cutoff_len` shortened it. `status` is `ok`, `no_labels` (no supervised token: never
chosen) or `dropped` (LLaMA-Factory made no row of it: `index`, `row_key` and what follows from tokens are null).
"""


def table(train: Rows, targets: Mapping[str, Rows], tests: Mapping[str, Rows]) -> pa.Table:
    """Return the map of a run's data, in the order of its sets."""
    parts = [_part("train", None, train)]
    parts += [_part("target", name, rows) for name, rows in targets.items()]
    parts += [_part("test", name, rows) for name, rows in tests.items()]
    return pa.concat_tables(part for pair in parts for part in pair).unify_dictionaries()


def write(path: Path, found: pa.Table) -> None:
    """Write a map, whole or not at all."""
    with replacing(path) as temporary:
        pq.write_table(found, temporary, compression="zstd", write_page_checksum=True)


def key_column(keys: np.ndarray) -> pa.Array:
    """Return row keys, (N,) of `KEY_DTYPE`, as a column."""
    assert keys.dtype == KEY_DTYPE
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), [None, pa.py_buffer(keys.tobytes())])


def _part(role: str, name: str | None, rows: Rows) -> tuple[pa.Table, pa.Table]:
    """Return the rows of a set, and the records that were dropped from it."""
    dropped = np.asarray(rows.dropped or np.empty((0, 2)), np.int64).reshape(-1, 2)
    kept = {
        "index": np.arange(len(rows)),
        "dataset": _one_of(rows.dataset, rows.names),
        "record": rows.index,
        "row_key": key_column(rows.keys),
        "tokens": rows.length,
        "supervised": rows.supervised,
        "truncated": pa.nulls(len(rows), pa.bool_()) if rows.truncated is None else rows.truncated,
        "status": _one_of((rows.supervised == 0).astype(np.int32), ["ok", "no_labels"]),
    }
    lost = {
        "dataset": _one_of(dropped[:, 0].astype(np.int32), rows.names),
        "record": dropped[:, 1],
        "status": _one_of(np.zeros(len(dropped), np.int32), ["dropped"]),
    }
    return _whole(role, name, kept, len(rows)), _whole(role, name, lost, len(dropped))


def _whole(role: str, name: str | None, columns: Mapping[str, object], count: int) -> pa.Table:
    said = {"role": _one_of(np.zeros(count, np.int32), [role])}
    said["set"] = pa.nulls(count, _NAMES) if name is None else _one_of(np.zeros(count, np.int32), [name])
    every = {**said, **columns}
    return pa.table({f.name: every.get(f.name, pa.nulls(count, f.type)) for f in SCHEMA}, schema=SCHEMA)


def _one_of(numbers: np.ndarray, names: object) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), pa.array(list(names), pa.string()))  # type: ignore[call-overload]
