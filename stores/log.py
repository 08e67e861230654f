"""The log of a store: one small document per committed fragment, written after its data file is durable."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from dataflex.errors import ConflictError, CorruptionError, DataflexError
from dataflex.fingerprint import digest
from dataflex.stores.files import Files
from dataflex.stores.record import claim, find_record, read_records

_log = logging.getLogger(__name__)
_FRAGMENT_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """Proof that one fragment is committed.

    Attributes:
        fragment: its id, which the writer chose.
        data: SHA-256 of its data file, which names the file.
        bytes: size of the data file.
        rows: rows in it.
        keys: `dataflex.fingerprint.keys_digest` of its row keys.
        status: name of each status -> rows that have it.
        writer: unique to the writing process.
        contents: where its data file holds what, as text of `dataflex.stores.contents`; None in logs of old, of whose
            data files each has to be read and hashed whole once. It follows from the data file, so two entries that
            differ in nothing else are equal.
    """

    fragment: str
    data: str
    bytes: int
    rows: int
    keys: str
    status: dict[str, int]
    writer: str
    contents: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not _FRAGMENT_ID.fullmatch(self.fragment):
            raise DataflexError(
                f"a fragment cannot be called {self.fragment!r}: use up to 128 letters, digits, _ and -"
            )

    @cached_property
    def digest(self) -> str:
        """Name this commit."""
        return digest({name: value for name, value in asdict(self).items() if name != "contents"})

    @property
    def document(self) -> tuple[dict[str, Any], int]:
        """What its file says, and the version of documents that a reader has to know."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return said, 1 if self.contents is None else 2


def parse(record: dict[str, Any], name: str, where: str) -> Entry:
    """Return the entry in a log file called `name`.

    Raises:
        CorruptionError: the document is intact but is no entry of that name.
    """
    fields = {key: value for key, value in record.items() if key != "format"}
    kinds = {"fragment": str, "data": str, "bytes": int, "rows": int, "keys": str, "status": dict, "writer": str}
    kinds |= {"contents": str} if "contents" in fields else {}
    fits = fields.keys() == kinds.keys() and all(type(fields[key]) is kind for key, kind in kinds.items())
    # The hash becomes part of a path, so it may be nothing but a hash.
    if not fits or not _SHA256.fullmatch(fields["data"]) or re.sub(r"(~\d+)?\.json$", "", name) != fields["fragment"]:
        raise CorruptionError(f"{where} is damaged: it is no log entry of that name")
    return Entry(**fields)


class Log:
    """The entries under `folder`, as far as they were read."""

    def __init__(self, files: Files, folder: str):
        self.files = files
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        """File name -> entry, in the order of fragment ids, which is the same for every reader."""
        self.damaged: dict[str, str] = {}
        """File name -> what is wrong with it."""

    def take(self, entries: Mapping[str, Entry]) -> None:
        """Take over entries that were read before, by file name; the next `refresh` drops those that are gone."""
        self.entries = dict(sorted(entries.items(), key=lambda item: (item[1].fragment, item[0])))

    def refresh(self, names: Iterable[str] | None = None) -> bool:
        """Read what other writers committed since; say whether anything changed. One listing, and the new entries.

        Damaged entries are left out and logged, once each: their rows count as missing.

        Args:
            names: of the log files, where they were just listed.
        """
        names = sorted(self.files.names(self.folder) if names is None else names)
        there = set(names)
        entries = {name: entry for name, entry in self.entries.items() if name in there}
        self.damaged = {name: what for name, what in self.damaged.items() if name in there}
        known = entries.keys() | self.damaged.keys()
        fresh = [name for name in names if name.endswith(".json") and name not in known]
        found = read_records(self.files, [f"{self.folder}/{name}" for name in fresh])
        for name, record in zip(fresh, found, strict=True):
            if record is None:  # removed between the listing and now
                continue
            try:
                if isinstance(record, DataflexError):
                    raise record
                entries[name] = parse(record, name, self.files.name(f"{self.folder}/{name}"))
            except CorruptionError as error:
                self.damaged[name] = str(error)
                _log.warning("%s; its rows count as missing", error)
        changed = entries.keys() != self.entries.keys()
        if changed:
            self.entries = dict(sorted(entries.items(), key=lambda item: (item[1].fragment, item[0])))
        return changed

    def has(self, fragment: str) -> bool:
        """Say whether a fragment is committed now; a damaged entry is none."""
        return find_record(self.files, self.folder, fragment) is not None

    def find(self, entry: Entry) -> Entry | None:
        """Return the entry that storage has now for the same fragment, or None.

        Raises:
            ConflictError: that entry is of other rows.
        """
        record = find_record(self.files, self.folder, entry.fragment)
        return None if record is None else self._same_rows(entry, record)

    def commit(self, entry: Entry) -> Entry:
        """Make an entry visible; return the one that is kept: ours, or another writer's who was first.

        Raises:
            ConflictError: another writer committed other rows under the same fragment id.
        """
        body, version = entry.document
        return self._same_rows(entry, claim(self.files, self.folder, entry.fragment, body, version)[0])

    def _same_rows(self, entry: Entry, record: dict[str, Any]) -> Entry:
        # Row keys, not the data's SHA-256: in half precision two writers' values may differ, and both are right.
        there = parse(record, entry.fragment, self.files.name(f"{self.folder}/{entry.fragment}.json"))
        if there.keys != entry.keys:
            raise ConflictError(
                f"{self.files.name(self.folder)}: fragment {entry.fragment} was committed with other rows "
                f"({there.rows} by writer {there.writer}) than this process has ({entry.rows}); a fragment's id must "
                "be a function of its row keys"
            )
        return there
