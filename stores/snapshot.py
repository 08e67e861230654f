"""The commits that one read sees: an index of their row keys, and their values by row groups.

Of a data file only the parts that hold what is asked for are read, and each is held against its digest in the log. Of
one that an older DataFlex committed without these, the whole is read and hashed on first use. R rows asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dataflex.errors import CorruptionError
from dataflex.fingerprint import keys_digest
from dataflex.stores.compacted import Held
from dataflex.stores.contents import Chunk, Contents, Span, columns_of, parse
from dataflex.stores.encoded import Encoded
from dataflex.stores.files import Files
from dataflex.stores.fragment import Fragment
from dataflex.stores.locations import Locations
from dataflex.stores.log import Entry
from dataflex.stores.pieces import Piece, missing, path_of, read_pieces
from dataflex.stores.problem import CURE
from dataflex.stores.values import Layout

_FRAGMENTS = 512
"""Fragments whose row keys are read at once."""


@dataclass(frozen=True)
class _Asked:
    """Rows of one row group of a data file that are wanted.

    Attributes:
        slots: what they fill of all that is wanted.
        file: SHA-256 of the data file.
        keys: (r,) their keys.
        status: (r,) uint8.
        rows: (r,) of the row group, sorted.
        chunks: the columns wanted of them.
        spans: the parts of each column that hold them.
    """

    slots: slice
    file: str
    keys: np.ndarray
    status: np.ndarray
    rows: np.ndarray
    chunks: Mapping[str, Chunk]
    spans: Mapping[str, Sequence[Span]]

    @property
    def pieces(self) -> list[Piece]:
        """What has to be read."""
        return [Piece(self.file, chunk, span) for name, chunk in self.chunks.items() for span in self.spans[name]]

    @property
    def bytes(self) -> int:
        """How much that is."""
        return sum(stop - start for start, stop in (piece.extent for piece in self.pieces))


class Snapshot:
    """What was committed at one moment; later commits do not change it.

    Args:
        files: the root's files.
        folder: where the data files lie.
        layout: of the store.
        entries: log file name -> entry, in the order of the log.
        held: log file name -> keys and statuses that are known without the data file.
        earlier: an earlier snapshot of the same store, whose row keys and checked files need not be read again.

    Raises:
        CorruptionError: the row keys of a data file are missing or damaged.
    """

    def __init__(
        self,
        files: Files,
        folder: str,
        layout: Layout,
        entries: Mapping[str, Entry],
        held: Mapping[str, Held],
        earlier: Snapshot | None = None,
    ):
        self.files = files
        self.folder = folder
        self.layout = layout
        self.entries = entries
        self._names = list(entries)
        self._columns = columns_of(layout)
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        before = {} if earlier is None else earlier._known
        self._hashed: set[str] = set() if earlier is None else earlier._hashed
        self._measured: set[str] = set() if earlier is None else earlier._measured
        for name, entry in entries.items():  # committed files never change, so those known are not read again
            if earlier is not None and _is_same(earlier.entries.get(name), entry):
                self._known[name] = before[name]
            elif name in held and _is_same(held[name].entry, entry):
                self._known[name] = held[name].keys, held[name].status
        is_grown = earlier is not None and all(self._known.get(name) is known for name, known in before.items())
        self._read_keys({name: entry for name, entry in entries.items() if name not in self._known})
        known = [self._known[name] for name in entries]
        places = dict(zip(self._names, range(len(known)), strict=True))
        if is_grown and earlier is not None:
            at = [places[name] for name in earlier._names]
            self.locations: Locations = Locations([keys for keys, _ in known], earlier.locations, at)
        else:
            self.locations = Locations([keys for keys, _ in known])
        self.status = np.concatenate([np.empty(0, np.uint8), *(status for _, status in known)])
        """(N,) status of every row of every fragment."""

    def known(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the row keys (R,) and statuses (R,) of the fragment of a log file."""
        return self._known[name]

    def groups(self, positions: np.ndarray, columns: Sequence[str], vectors: bool) -> Iterator[tuple[slice, Encoded]]:
        """Yield the rows at sorted positions, each row group once, with the slots of `positions` that they fill.

        Args:
            positions: (R,) of `Locations.find`, ascending; repeated positions give repeated rows.
            columns: scalar columns wanted.
            vectors: whether vectors are wanted.

        Raises:
            CorruptionError: a data file is missing or damaged.
        """
        held: list[_Asked] = []
        size = 0
        cuts = np.searchsorted(positions, self.locations.offsets)
        for at in np.flatnonzero(np.diff(cuts)):
            low, high = int(cuts[at]), int(cuts[at + 1])
            name, rows = self._names[at], positions[low:high] - self.locations.offsets[at]
            if self.entries[name].contents is None:
                yield from self._fetched(held, columns)
                held, size = [], 0
                yield from self._of_old(self.entries[name], rows, low, columns, vectors)
                continue
            for asked in self._asked(name, rows, low, columns, vectors):
                if held and size + asked.bytes > self.files.together:
                    yield from self._fetched(held, columns)
                    held, size = [], 0
                held.append(asked)
                size += asked.bytes
        yield from self._fetched(held, columns)

    def _asked(self, name: str, rows: np.ndarray, low: int, columns: Sequence[str], vectors: bool) -> Iterator[_Asked]:
        """Yield what to read for sorted rows (r,) of a fragment, the first of which fills slot `low`."""
        entry, (keys, status) = self.entries[name], self._known[name]
        self._refuse_cut(entry)
        names = [*columns, *(("scale", "vector") if vectors else ())]
        contents = self._contents(entry)
        cuts = itertools.pairwise(np.searchsorted(rows, contents.starts).tolist())
        for chunks, begin, (start, stop) in zip(contents.groups, contents.starts, cuts, strict=False):
            if start < stop:
                some = rows[start:stop]
                mine = {name: chunks[name] for name in names if name in chunks}
                spans = {name: chunk.spans(some - begin) for name, chunk in mine.items()}
                slots = slice(low + start, low + stop)
                yield _Asked(slots, entry.data, keys[some], status[some], some - begin, mine, spans)

    def _fetched(self, asked: Sequence[_Asked], columns: Sequence[str]) -> Iterator[tuple[slice, Encoded]]:
        """Read parts of many files at once, and yield the rows in them."""
        data = iter(read_pieces(self.files, self.folder, [piece for one in asked for piece in one.pieces]))
        for one in asked:
            taken = {
                name: chunk.take(one.rows, one.spans[name], list(itertools.islice(data, len(one.spans[name]))))
                for name, chunk in one.chunks.items()
            }
            scalars = {name: taken[name] for name in columns}
            yield one.slots, Encoded(one.keys, one.status, scalars, taken.get("vector"), taken.get("scale"))

    def _of_old(
        self, entry: Entry, rows: np.ndarray, low: int, columns: Sequence[str], vectors: bool
    ) -> Iterator[tuple[slice, Encoded]]:
        """Yield sorted rows (r,) of a fragment of whose inside the log says nothing."""
        with self._open(entry) as fragment:
            cuts = itertools.pairwise(np.searchsorted(rows, fragment.starts))
            for group, (start, stop) in enumerate(cuts):
                if start < stop:
                    part = fragment.group(group, columns, vectors)
                    yield slice(low + start, low + stop), part.take(rows[start:stop] - fragment.starts[group])

    def _contents(self, entry: Entry) -> Contents:
        assert entry.contents is not None
        where = f"the log entry of {entry.fragment} ({self.files.name(self.folder)})"
        return parse(entry.contents, self._columns, entry.rows, entry.bytes, where)

    def _refuse_cut(self, entry: Entry) -> None:
        """Refuse a data file that is shorter than what was committed, or longer, also where that holds no value."""
        size = self.files.size(path_of(self.folder, entry.data)) if entry.data not in self._measured else None
        if size not in (None, entry.bytes):
            path = self.files.name(path_of(self.folder, entry.data))
            raise CorruptionError(f"{path} is damaged: {size} bytes, {entry.bytes} were committed; {CURE}")
        self._measured.add(entry.data)

    def _read_keys(self, entries: Mapping[str, Entry]) -> None:
        """Learn the row keys and statuses of fragments, those of many at once."""
        names = list(entries)
        for some in (names[start : start + _FRAGMENTS] for start in range(0, len(names), _FRAGMENTS)):
            groups = {name: self._contents(entries[name]).groups for name in some if entries[name].contents is not None}
            for name in groups:
                self._refuse_cut(entries[name])
            pieces = [
                Piece(entries[name].data, group[column], group[column].whole)
                for name, inside in groups.items()
                for group in inside
                for column in ("row_key", "status")
            ]
            data = read_pieces(self.files, self.folder, pieces)
            values = (piece.chunk.column.values(d, piece.chunk.rows) for piece, d in zip(pieces, data, strict=True))
            for name in some:
                if name in groups:
                    found = [next(values) for _ in range(2 * len(groups[name]))]
                    keys, status = np.concatenate(found[::2]), np.concatenate(found[1::2])
                else:
                    with self._open(entries[name]) as fragment:
                        keys, status = fragment.keys()
                if len(keys) != entries[name].rows or keys_digest(keys) != entries[name].keys:
                    path = self.files.name(path_of(self.folder, entries[name].data))
                    raise CorruptionError(f"{path} is damaged: its row keys are not those committed; {CURE}")
                self._known[name] = keys, status

    def _open(self, entry: Entry) -> Fragment:
        """Open a data file as Parquet. Its SHA-256 is checked on first use: page CRCs do not cover the footer.

        Arrow trusts that: of some footers with one wrong bit it makes wrong rows, and of some the end of the process.
        """
        path = path_of(self.folder, entry.data)
        if entry.data not in self._hashed:
            try:
                found = self.files.sha256(path)
            except FileNotFoundError as error:
                raise missing(self.files.name(path)) from error
            if found != entry.data:
                raise CorruptionError(f"{self.files.name(path)} is damaged: its SHA-256 is {found[:12]}…; {CURE}")
            self._hashed.add(entry.data)
        return Fragment(self.files, path, self.layout)


def _is_same(one: Entry | None, other: Entry) -> bool:
    return one is other or one == other
