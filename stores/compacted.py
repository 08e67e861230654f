"""The log of a store, with its row keys and statuses, in one file: `derived/log-<rows>-<sha256>.parquet`.

Reading 10,000 entries and the keys behind them one by one takes 10,000 requests twice; this file takes one. It is
derived from the log and the data files: it can be deleted at any time, is put once, and is read only if its content is
what its name says. An entry in it counts as long as the log file that it was read from is as it was then, by size and
time of writing, so that what was removed or written anew since is read from the log itself. F entries, N rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataflex.errors import DataflexError
from dataflex.rows import KEY_DTYPE
from dataflex.stores.files import Files
from dataflex.stores.log import Entry

_log = logging.getLogger(__name__)
_NAME = re.compile(r"log-(\d+)-([0-9a-f]{64})\.parquet")
_KEPT = 2
"""Of the newest so many stay: a reader may just have been told of the one before the last."""
_META = b"dataflex.log"


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
            data = files.read(path)
            if hashlib.sha256(data).hexdigest() == name.rpartition("-")[2].removesuffix(".parquet"):
                return _parsed(data)
            _log.warning("%s is damaged: its content is not what its name says; the log is read instead", path)
        except (pa.ArrowException, ValueError, TypeError, KeyError, DataflexError, OSError) as error:
            _log.warning("%s cannot be read (%s); the log is read instead", files.name(path), error)
    return {}


def write_compacted(files: Files, folder: str, held: Mapping[str, Held]) -> None:
    """Put what is known of the fragments into one file, and remove those that it replaces."""
    keys = np.concatenate([each.keys for each in held.values()])
    status = np.concatenate([each.status for each in held.values()])
    about = {name: [asdict(each.entry), *each.stamp] for name, each in held.items()}
    schema = pa.schema(
        [pa.field("row_key", pa.binary(KEY_DTYPE.itemsize), False), pa.field("status", pa.uint8(), False)],
        metadata={_META: json.dumps(about)},
    )
    buffers = [None, pa.py_buffer(np.ascontiguousarray(keys).view(np.uint8))]
    column = pa.FixedSizeBinaryArray.from_buffers(schema.field("row_key").type, len(keys), buffers)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table([column, pa.array(status)], schema=schema), sink, compression="NONE", use_dictionary=False)
    data = sink.getvalue().to_pybytes()
    path = f"{folder}/derived/log-{len(keys)}-{hashlib.sha256(data).hexdigest()}.parquet"
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
            is_right = hashlib.sha256(data).hexdigest() == name.rpartition("-")[2].removesuffix(".parquet")
            said = (
                {log: each for log, each in _parsed(data).items() if stamps.get(log) == each.stamp} if is_right else {}
            )
        except FileNotFoundError:  # replaced between the listing and now
            continue
        except (pa.ArrowException, ValueError, TypeError, KeyError, DataflexError):
            is_right, said = False, {}
        believed = {log: each for log, each in said.items() if stamps.get(log) == each.stamp}
        if not is_right or any(entries.get(log) != each.entry for log, each in believed.items()):
            yield path


def stamps_of(files: Files, folder: str) -> dict[str, tuple[int, float]]:
    """Return size and time of writing of each file of a store's log, by name."""
    found = {file.path.removeprefix(f"{folder}/log/"): file for file in files.stored(f"{folder}/log")}
    return {name: (file.bytes, file.modified) for name, file in found.items() if "/" not in name}


def _names(files: Files, folder: str) -> list[str]:
    """List the files, the one of the most rows first."""
    found = [match for match in map(_NAME.fullmatch, files.names(f"{folder}/derived")) if match is not None]
    return [match[0] for match in sorted(found, key=lambda match: (-int(match[1]), match[0]))]


def _parsed(data: bytes) -> dict[str, Held]:
    table = pq.read_table(pa.BufferReader(data), use_threads=False)
    keys = table.column("row_key").combine_chunks()
    raw = np.frombuffer(keys.buffers()[1], KEY_DTYPE, len(keys), keys.offset * KEY_DTYPE.itemsize)
    status = table.column("status").to_numpy()
    found, start = {}, 0
    for name, (entry, size, modified) in json.loads(table.schema.metadata[_META]).items():
        made = Entry(**entry)
        part = slice(start, start := start + made.rows)
        found[name] = Held(made, (size, modified), raw[part], status[part])
    if start != len(raw):
        raise ValueError(f"{start} rows by its entries, {len(raw)} keys")
    return found
