"""Full check of a store, byte by byte, and the removal of what is damaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dataflex.errors import CorruptionError
from dataflex.fingerprint import keys_digest
from dataflex.rows import Status
from dataflex.stores.base import Layout
from dataflex.stores.files import Files
from dataflex.stores.fragment import Fragment
from dataflex.stores.log import Entry, Log
from dataflex.stores.record import read_record

CURE = "`dataflex store repair` removes what is damaged, `dataflex featurize` computes it again"


@dataclass(frozen=True)
class Problem:
    """Something in a store that should not be there, or is not what it should be.

    Attributes:
        path: of the file, relative to the root.
        what: for people.
        harmless: no reader ever opens it; a crash or a lost race leaves such files.
        remove: files to remove, in this order, so that the rows concerned count as missing.
    """

    path: str
    what: str
    harmless: bool = False
    remove: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.what


def problems(files: Files, folder: str, layout: Layout) -> list[Problem]:
    """Check the recipe, every log entry and every data file; bounded by a row group in memory.

    Raises:
        MismatchError: a newer DataFlex wrote to this store.
    """
    return [*_recipe(files, folder), *_log_and_data(files, folder, layout)]


def remove(files: Files, found: Sequence[Problem]) -> None:
    """Remove the files that hold problems, harmless ones not: another writer may be about to commit them."""
    for problem in found:
        for path in problem.remove:
            files.remove(path)


def _recipe(files: Files, folder: str) -> Iterator[Problem]:
    names = [name for name in files.names(folder) if name.startswith("recipe") and name.endswith(".json")]
    for name in names or ["recipe.json"]:
        path = f"{folder}/{name}"
        try:
            read_record(files, path)
        except FileNotFoundError:
            yield Problem(path, f"{files.name(path)} is missing; `dataflex featurize` writes it again")
        except CorruptionError as error:
            yield Problem(path, str(error), remove=(path,))


def _log_and_data(files: Files, folder: str, layout: Layout) -> Iterator[Problem]:
    log = Log(files, f"{folder}/log")
    log.refresh()
    for name, what in log.damaged.items():
        yield Problem(f"{folder}/log/{name}", what, remove=(f"{folder}/log/{name}",))
    for name in files.names(f"{folder}/log"):
        if name not in log.entries and name not in log.damaged:
            path = f"{folder}/log/{name}"
            yield Problem(path, f"{files.name(path)} is no log entry; it is never opened", harmless=True)
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


def _fault(files: Files, path: str, layout: Layout, entries: Sequence[Entry]) -> str | None:
    """Say what is wrong with a data file, or None."""
    try:
        if files.sha256(path) != entries[0].data:
            return f"{files.name(path)} is damaged: its SHA-256 is not the one committed"
        with Fragment(files, path, layout) as fragment:
            keys = fragment.keys()
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
