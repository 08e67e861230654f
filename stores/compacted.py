"""The log of a store, with its row keys and statuses, in one file: `derived/log-<rows>-<sha256>.parquet`.

Reading 10,000 entries and the keys behind them one by one takes 10,000 requests twice; this file takes one. It is
derived from the log and the data files: it can be deleted at any time, is put once, and is read only if its content is
what its name says. An entry in it counts as long as the log file that it was read from is as it was then, by size and
time of writing, so that what was removed or written anew since is read from the log itself. F entries, N rows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataflex.errors import DataflexError
from dataflex.rows import KEY_DTYPE
from dataflex.stores.files import Files
from dataflex.stores.log import Entry, parse

_log = logging.getLogger(__name__)
_NAME = re.compile(r"log-(\d+)-([0-9a-f]{64})\.parquet")
_KEPT = 2
"""Of the newest so many stay: a reader may just have been told of the one before the last."""
_GROUP = 4096
_SCHEMA = pa.schema(
    [
        pa.field("about", pa.string(), False),
        pa.field("contents", pa.string()),
        pa.field("row_keys", pa.large_binary(), False),
        pa.field("statuses", pa.large_binary(), False),
    ]
)
"""A row for each fragment. `about` is JSON: name, entry, size and time of writing of its file in the log."""


@dataclass(frozen=True)
class Held:
    """What is known of one fragment without its data file.

    Attributes:
        entry: its log entry.
        stamp: size and time of writing of the log file.
        keys: (R,) row keys.
        status: (R,) uint8.
    """

    entry: Entry
    stamp: tuple[int, float]
    keys: np.ndarray
    status: np.ndarray


def read_compacted(files: Files, folder: str) -> dict[str, Held]:
    """Return what the largest intact file of a store holds, by name of the log file; nothing where there is none.

    Args:
        files: the root's files.
        folder: the store's.
    """
    for name in _names(files, folder):
        path = f"{folder}/derived/{name}"
        try:
            data = _cached(files, path, name)
            if _is_right(name, data):
                return _parsed(data)
            _log.warning("%s is damaged: its content is not what its name says; the log is read instead", path)
        except (pa.ArrowException, ValueError, TypeError, KeyError, DataflexError, OSError) as error:
            _log.warning("%s cannot be read (%s); the log is read instead", files.name(path), error)
    return {}


def write_compacted(files: Files, folder: str, held: Mapping[str, Held]) -> None:
    """Put what is known of the fragments into one file, and remove those that it replaces."""
    rows = [len(each.keys) for each in held.values()]
    columns = {
        "about": [
            json.dumps([name, replace(each.entry, contents=None).document[0], *each.stamp])
            for name, each in held.items()
        ],
        "contents": [each.entry.contents for each in held.values()],
        "row_keys": _joined([each.keys for each in held.values()], rows),
        "statuses": _joined([each.status for each in held.values()], rows),
    }
    sink = pa.BufferOutputStream()
    table = pa.table(columns, schema=_SCHEMA)
    pq.write_table(table, sink, compression="NONE", use_dictionary=False, row_group_size=_GROUP)
    data = sink.getvalue().to_pybytes()
    path = f"{folder}/derived/log-{sum(rows)}-{hashlib.sha256(data).hexdigest()}.parquet"
    with files.output(path) as file:
        file.write(data)
    others = [f"{folder}/derived/{name}" for name in _names(files, folder)]
    for other in [other for other in others if other != path][_KEPT - 1 :]:
        files.remove(other)


def faulty(files: Files, folder: str, entries: Mapping[str, Entry]) -> Iterator[str]:
    """Yield the paths of those files that are not what their names say, or that say another thing than the log.

    Args:
        files: the root's files.
        folder: the store's.
        entries: those of the log, by file name.
    """
    stamps = stamps_of(files, folder)
    for name in _names(files, folder):
        path = f"{folder}/derived/{name}"
        try:
            data = files.read(path)
            is_right = _is_right(name, data)
            said = _parsed(data) if is_right else {}
        except FileNotFoundError:  # replaced between the listing and now
            continue
        except (pa.ArrowException, ValueError, TypeError, KeyError, DataflexError):
            is_right, said = False, {}
        believed = {log: each.entry.document for log, each in said.items() if stamps.get(log) == each.stamp}
        known = {log: entry.document for log, entry in entries.items()}
        if not is_right or any(known.get(log) != document for log, document in believed.items()):
            yield path


def stamps_of(files: Files, folder: str) -> dict[str, tuple[int, float]]:
    """Return size and time of writing of each file of a store's log, by name."""
    found = {file.path.removeprefix(f"{folder}/log/"): file for file in files.stored(f"{folder}/log")}
    return {name: (file.bytes, file.modified) for name, file in found.items() if "/" not in name}


def _names(files: Files, folder: str) -> list[str]:
    """List the files, the one of the most rows first."""
    found = [match for match in map(_NAME.fullmatch, files.names(f"{folder}/derived")) if match is not None]
    return [match[0] for match in sorted(found, key=lambda match: (-int(match[1]), match[0]))]


def _cached(files: Files, path: str, name: str) -> bytes:
    """Read a file from the cache if it is there, else from storage."""
    if files.cache is None:
        return files.read(path)
    data = files.cache.read(_sha256(name))
    if not _is_right(name, data):
        data = files.read(path)
        files.cache.keep(_sha256(name), 0, data)
    return data


def _is_right(name: str, data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == _sha256(name)


def _sha256(name: str) -> str:
    return name.rpartition("-")[2].removesuffix(".parquet")


def _parsed(data: bytes) -> dict[str, Held]:
    found = {}
    file = pq.ParquetFile(pa.BufferReader(data))
    if not file.schema_arrow.remove_metadata().equals(_SCHEMA):
        raise ValueError(f"columns {', '.join(file.schema_arrow.names)}")
    for batch in file.read(use_threads=False).to_batches():
        about = json.loads(f"[{','.join(batch.column('about').to_pylist())}]")
        keys, status = _split(batch.column("row_keys"), KEY_DTYPE), _split(batch.column("statuses"), np.dtype(np.uint8))
        # What only a reader of a fragment's values needs stays text until then.
        inside = batch.column("contents").to_pylist()
        for (name, entry, size, modified), text, some, states in zip(about, inside, keys, status, strict=True):
            # As from the log itself: what an entry says becomes a path, and the size of what is read.
            made = parse({**entry, **({} if text is None else {"contents": text})}, name, "the compacted log")
            if not len(some) == len(states) == made.rows:
                raise ValueError(f"{name}: {made.rows} rows, {len(some)} keys, {len(states)} statuses")
            found[name] = Held(made, (size, modified), some, states)
    return found


def _joined(arrays: Sequence[np.ndarray], rows: Sequence[int]) -> pa.LargeBinaryArray:
    """Return a column with the bytes of each array (R,) as one value."""
    values = np.concatenate(arrays)
    offsets = np.cumsum([0, *rows]) * values.itemsize
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(values.view(np.uint8))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(rows), buffers)


def _split(column: pa.LargeBinaryArray, dtype: np.dtype[Any]) -> list[np.ndarray]:
    """Return the arrays (R,) whose bytes are the values of a column, without a copy."""
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    if (bounds % dtype.itemsize).any():
        raise ValueError(f"values that are no whole numbers of {dtype.itemsize} bytes")
    values, cuts = np.frombuffer(data, np.uint8)[: bounds[-1]], (bounds // dtype.itemsize).tolist()
    typed = values.view(dtype)
    return [typed[start:stop] for start, stop in itertools.pairwise(cuts)]
