"""A feature store of immutable Parquet files and a log of commits.

    <kind>-<recipe digest>/
      recipe.json            the recipe in clear, the layout, library versions
      data/<sha256>.parquet  values of one fragment
      log/<fragment id>.json proof that a fragment is committed: written last, so what it names is there and durable
      derived/               caches that can be deleted at any time
      tmp/                   files being written; whatever a crash leaves here is never read

R rows, D numbers per vector.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dataflex.errors import CoverageError, DataflexError, MismatchError
from dataflex.fingerprint import digest, keys_digest
from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.compacted import Held, read_compacted, stamps_of, write_compacted
from dataflex.stores.contents import contents_of
from dataflex.stores.encoded import Encoded
from dataflex.stores.files import Files
from dataflex.stores.fragment import serialise
from dataflex.stores.log import Entry, Log
from dataflex.stores.rounding import decode
from dataflex.stores.snapshot import Snapshot
from dataflex.stores.values import Layout, Values

_logger = logging.getLogger(__name__)
_WRITER = uuid.uuid4().hex
_TAIL = 32
"""Entries that are read one by one rather than compacted."""


class ParquetStore:
    """Values of one feature under one recipe; got from `dataflex.stores.root.StoreRoot`.

    Any number of processes may read and append at a time.

    Args:
        files: the root's files.
        folder: this store's folder there.
        document: what its recipe.json says.
    """

    def __init__(self, files: Files, folder: str, document: Mapping[str, Any]):
        self.files = files
        self.folder = folder
        self.kind: str = document["kind"]
        self.recipe: Mapping[str, Any] = document["recipe"]
        self.layout = Layout(**document["layout"])
        self._log = Log(files, f"{folder}/log")
        self._snapshot: Snapshot | None = None
        self._is_stale = False
        self._held: dict[str, Held] | None = None

    @property
    def path(self) -> str:
        """Where the store lies."""
        return self.files.name(self.folder)

    @property
    def rows(self) -> int:
        """Rows committed, counting a key once per fragment that holds it."""
        self._refresh()
        return sum(entry.rows for entry in self._log.entries.values())

    @property
    def bytes(self) -> int:
        """Size of the committed data files."""
        self._refresh()
        # By data file: fragments with equal values share one, as it is named by its content.
        return sum({entry.data: entry.bytes for entry in self._log.entries.values()}.values())

    @property
    def version(self) -> str:
        """Name the set of commits: what is derived from a store is valid for one version."""
        self._refresh()
        return digest([entry.digest for entry in self._log.entries.values()])

    def committed_fragments(self) -> list[str]:
        """Return the ids of the fragments that are committed, sorted."""
        self._refresh()
        return sorted({entry.fragment for entry in self._log.entries.values()})

    def is_committed(self, fragment_id: str) -> bool:
        """Say whether a fragment is committed by now, asking storage for its entry alone."""
        return self._log.has(fragment_id)

    def append(self, fragment_id: str, values: Values) -> bool:
        """Commit values, rounded to the storage type, entirely or not at all; durable on return.

        Rows whose status is not OK are kept as zeros. A fragment that is committed already stays as it is.

        Args:
            fragment_id: a function of the row keys; up to 128 letters, digits, `_` and `-`.
            values: R > 0 rows.

        Returns:
            Whether the values kept are these. False where another writer's were first and differ: then read those.

        Raises:
            ConflictError: another writer committed other rows under the same id.
            MismatchError: the values do not fit the layout.
            DataflexError: a row with status OK is not finite, there are no rows, or storage is full or read-only.
        """
        values.check(self.layout)
        if not len(values):
            raise DataflexError(f"fragment {fragment_id} for {self.path} has no rows")
        data = serialise(self.layout, values)
        entry = Entry(
            fragment=fragment_id,
            data=hashlib.sha256(data).hexdigest(),
            bytes=data.size,
            rows=len(values),
            keys=keys_digest(values.keys),
            status={status.name.lower(): int((values.status == status).sum()) for status in Status},
            writer=_WRITER,
            contents=contents_of(self.layout, data).text(),
        )
        kept = self._log.find(entry)
        if kept is None:  # the data are durable before the entry that names them: a crash between leaves an unused file
            with self.files.output(f"{self.folder}/data/{entry.data}.parquet") as file:
                file.write(data)
            kept = self._log.commit(entry)
        return kept.data == entry.data

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Say for each of (R,) keys whether its value is committed; (R,) bool.

        Raises:
            CorruptionError: the row keys of a committed data file are missing or damaged.
        """
        return self._current(refresh=True).locations.find(_checked(keys)) >= 0

    def read(self, keys: np.ndarray, columns: Sequence[str] | None = None, vectors: bool = True) -> Values:
        """Return the values of (R,) keys, in that order and multiplicity; vectors decoded to float32.

        Reads the row groups that hold a key asked for, one at a time.

        Args:
            keys: (R,) row keys.
            columns: scalar columns wanted; all by default.
            vectors: whether vectors are wanted.

        Raises:
            CoverageError: some keys are not in the store.
            CorruptionError: a data file is missing or damaged.
        """
        keys = _checked(keys)
        # What is committed never changes, so old knowledge is right, and the log is listed only where a key is missing.
        snapshot = self._current(refresh=False)
        found = snapshot.locations.find(keys)
        if (found < 0).any():
            snapshot = self._current(refresh=True)
            found = snapshot.locations.find(keys)
            missing = len(np.unique(keys[found < 0].view("S16")))
            if missing:
                raise CoverageError(
                    f"{missing} of {len(np.unique(keys.view('S16')))} rows are not in {self.path} (first missing key "
                    f"{keys[found < 0][0].tobytes().hex()}); compute them with `dataflex featurize`"
                )
        columns = self._columns(columns)
        if not columns and not (vectors and self.layout.width):
            return Values(keys, snapshot.status[found], {})
        width = self.layout.width if vectors else 0
        status = np.empty(len(keys), np.uint8)
        scalars = {name: np.empty(len(keys), self.layout.scalars[name]) for name in columns}
        out = np.empty((len(keys), width), np.float32) if width else None
        order = np.argsort(found, kind="stable")  # in the order of storage, each row group is read once
        for slots, part in snapshot.groups(found[order], columns, vectors):
            rows = order[slots]
            status[rows] = part.status
            for name in columns:
                scalars[name][rows] = part.scalars[name]
            if out is not None and part.codes is not None:
                out[rows] = decode(part.codes, part.scale, self.layout.storage, width)
        return Values(keys, status, scalars, out)

    def scan(
        self,
        block_rows: int = 4096,
        columns: Sequence[str] | None = None,
        vectors: bool = True,
        keys: np.ndarray | None = None,
    ) -> Iterator[Values]:
        """Yield every value once, in blocks of `block_rows` rows (the last may be shorter), in storage order.

        Memory is bounded by a block and a row group. Rows of every status are included. What is committed while the
        scan runs is not.

        Args:
            block_rows: rows per block.
            columns: scalar columns wanted; all by default.
            vectors: whether vectors are wanted.
            keys: (R,) row keys to stay within; keys that are not in the store are passed over.

        Raises:
            CorruptionError: a data file is missing or damaged.
        """
        for block in self.encoded(block_rows, columns, vectors, keys):
            yield block.decoded(self.layout)

    def encoded(
        self,
        block_rows: int = 4096,
        columns: Sequence[str] | None = None,
        vectors: bool = True,
        keys: np.ndarray | None = None,
    ) -> Iterator[Encoded]:
        """Yield the blocks of `scan` with vectors as codes and scale: a search need not decode D numbers per row."""
        # As in `read`: a search goes through the same rows many times.
        snapshot = self._current(refresh=keys is None)
        found = snapshot.locations.all() if keys is None else snapshot.locations.find(_checked(keys))
        if keys is not None and (found < 0).any():
            snapshot = self._current(refresh=True)
            found = snapshot.locations.find(keys)
        found = np.unique(found)
        held: list[Encoded] = []
        free = block_rows
        for _, part in snapshot.groups(found[found >= 0], self._columns(columns), vectors):
            start = 0
            while start < len(part.keys):
                piece = part.take(slice(start, start + free))
                held.append(piece)
                start += len(piece.keys)
                free -= len(piece.keys)
                if not free:
                    yield Encoded.concatenate(held)
                    held, free = [], block_rows
        if held:
            yield Encoded.concatenate(held)

    def compact(self) -> bool:
        """Put the log and the row keys into one file, if much was committed since the last time; say whether it was.

        One process does it for all; a root that is full or read-only costs later readers time, and no more.
        """
        snapshot = self._current(refresh=True)
        before = self._held or {}
        fresh = len(snapshot.entries) - sum(name in before for name in snapshot.entries)
        if fresh < max(_TAIL, len(before) // 4):
            return False
        try:
            stamps, data = stamps_of(self.files, self.folder), set(self.files.names(f"{self.folder}/data"))
            # An entry that was read a while ago may have been removed with its data file, and another put in its place.
            held = {
                name: Held(entry, stamps[name], *snapshot.known(name))
                for name, entry in snapshot.entries.items()
                if name in stamps and f"{entry.data}.parquet" in data
            }
            if held:
                write_compacted(self.files, self.folder, held)
        except (OSError, DataflexError) as error:
            _logger.warning("the log of %s is not compacted: %s", self.path, error)
            return False
        self._held = held
        return True

    def look_anew(self) -> None:
        """Read at the next look what another process has compacted meanwhile."""
        self._held = None

    def _refresh(self) -> None:
        listed = None
        if self._held is None:  # the first look
            self._held = read_compacted(self.files, self.folder)
            if self._held:
                listed = stamps = stamps_of(self.files, self.folder)
                self._held = {name: each for name, each in self._held.items() if stamps.get(name) == each.stamp}
                self._log.take({name: each.entry for name, each in self._held.items()})
                self._is_stale = True
        if self._log.refresh(listed):
            self._is_stale = True

    def _current(self, refresh: bool) -> Snapshot:
        """Return a snapshot of the commits known, after a look for new ones if `refresh`."""
        if refresh or self._snapshot is None:
            self._refresh()
        if self._snapshot is None or self._is_stale:
            data = f"{self.folder}/data"
            held = self._held or {}
            self._snapshot = Snapshot(self.files, data, self.layout, self._log.entries, held, self._snapshot)
            self._is_stale = False
        return self._snapshot

    def _columns(self, columns: Sequence[str] | None) -> list[str]:
        chosen = list(self.layout.scalars if columns is None else columns)
        unknown = [name for name in chosen if name not in self.layout.scalars]
        if unknown:
            raise MismatchError(
                f"{self.path} has no column {', '.join(unknown)}; it has {', '.join(self.layout.scalars)}"
            )
        return chosen


def _checked(keys: np.ndarray) -> np.ndarray:
    if keys.dtype != KEY_DTYPE or keys.ndim != 1:
        raise MismatchError(f"row keys are {keys.dtype}{list(keys.shape)}, expected (R,) of {KEY_DTYPE}")
    return np.ascontiguousarray(keys)
