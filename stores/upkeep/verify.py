"""Full check of one store, byte by byte: its documents, its log entries and its data files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dataflex.errors import CorruptionError
from dataflex.fingerprint import keys_digest
from dataflex.rows import Status
from dataflex.stores.compacted import faulty
from dataflex.stores.contents import columns_of, parse
from dataflex.stores.files import Files
from dataflex.stores.fragment import Fragment
from dataflex.stores.log import Entry, Log
from dataflex.stores.problem import CURE, Problem
from dataflex.stores.record import read_record
from dataflex.stores.values import Layout


def document_problems(files: Files, folder: str, stem: str) -> Iterator[Problem]:
    """Check every document of a folder that stands for `stem` (`recipe`, `manifest`)."""
    for name in files.names(folder):
        if name.startswith(stem) and name.endswith(".json"):
            path = f"{folder}/{name}"
            try:
                read_record(files, path)
            except FileNotFoundError:  # removed between the listing and now
                continue
            except CorruptionError as error:
                yield Problem(path, str(error), remove=(path,))


def log_and_data(files: Files, folder: str, log: Log, layout: Layout | None) -> Iterator[Problem]:
    """Check every log entry and every data file, in memory bounded by a row group.

    Where the recipe is lost, `layout` is None, and of a data file only its SHA-256 can be checked.
    """
    for name, what in log.damaged.items():
        yield Problem(f"{folder}/log/{name}", what, remove=(f"{folder}/log/{name}",))
    for name in files.names(f"{folder}/log"):
        if name not in log.entries and name not in log.damaged:
            path = f"{folder}/log/{name}"
            yield Problem(path, f"{files.name(path)} is no log entry; it is never opened", harmless=True)
    for path in faulty(files, folder, log.entries):
        yield Problem(path, f"{files.name(path)} is damaged: it is not what its name or the log says", remove=(path,))
    users: dict[str, list[str]] = {}
    for name, entry in log.entries.items():
        users.setdefault(f"{entry.data}.parquet", []).append(name)
    for data, names in users.items():
        path = f"{folder}/data/{data}"
        fault = _fault(files, path, layout, [log.entries[name] for name in names])
        if fault:
            # Log entries go first: a crash in between leaves an unused data file, not an entry without one.
            yield Problem(path, f"{fault}; {CURE}", remove=(*(f"{folder}/log/{name}" for name in names), path))
    for name in files.names(f"{folder}/data"):
        if name not in users:
            path = f"{folder}/data/{name}"
            yield Problem(path, f"{files.name(path)} is in no log entry; it is never opened", harmless=True)


def _fault(files: Files, path: str, layout: Layout | None, entries: Sequence[Entry]) -> str | None:
    """Say what is wrong with a data file, or None."""
    try:
        if files.sha256(path) != entries[0].data:
            return f"{files.name(path)} is damaged: its SHA-256 is not the one committed"
        if layout is None:
            return None
        with files.open(path) as file:
            size = file.size()
        for entry in entries:
            if entry.bytes != size:
                return f"{files.name(path)} has {size} bytes, of which fragment {entry.fragment} says {entry.bytes}"
            if entry.contents is not None and not _agrees(files, path, layout, entry):
                return f"the log entry of fragment {entry.fragment} does not say what {files.name(path)} holds"
        with Fragment(files, path, layout) as fragment:
            keys, _ = fragment.keys()
            counts = np.zeros(256, np.int64)
            for group in range(len(fragment.starts) - 1):
                counts += np.bincount(fragment.group(group, list(layout.scalars), vectors=False).status, minlength=256)
    except FileNotFoundError:
        return f"{files.name(path)} is missing although it was committed"
    except CorruptionError as error:
        return str(error)
    status = {status.name.lower(): int(counts[status]) for status in Status}
    for entry in entries:
        if (len(keys), keys_digest(keys), status) != (entry.rows, entry.keys, entry.status):
            return f"{files.name(path)} does not hold the rows that fragment {entry.fragment} committed"
    return None


def _agrees(files: Files, path: str, layout: Layout, entry: Entry) -> bool:
    """Say whether the parts of a whole data file are what its log entry says of them."""
    assert entry.contents is not None
    contents = parse(entry.contents, columns_of(layout), entry.rows, entry.bytes, files.name(path))
    for group in contents.groups:
        data = files.fetch([(path, *chunk.extent(chunk.whole)) for chunk in group.values()])
        if any(chunk.wrong(chunk.whole, part or b"") for chunk, part in zip(group.values(), data, strict=True)):
            return False
    return True
