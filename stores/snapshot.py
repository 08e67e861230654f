"""The commits that one read sees: an index of their row keys, and their values by row groups. R rows asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dataflex.errors import CorruptionError
from dataflex.fingerprint import keys_digest
from dataflex.stores.compacted import Held
from dataflex.stores.encoded import Encoded
from dataflex.stores.files import Files
from dataflex.stores.fragment import Fragment
from dataflex.stores.locations import Locations
from dataflex.stores.log import Entry
from dataflex.stores.problem import CURE
from dataflex.stores.values import Layout


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
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        before = {} if earlier is None else earlier._known
        self._checked: set[str] = set() if earlier is None else earlier._checked
        for name, entry in entries.items():  # committed files never change, so those known are not read again
            if name in before and earlier is not None and earlier.entries[name] == entry:
                self._known[name] = before[name]
            elif name in held and held[name].entry == entry:
                self._known[name] = held[name].keys, held[name].status
            else:
                self._known[name] = self._read_keys(entry)
        self.locations = Locations([keys for keys, _ in self._known.values()])
        self.status = np.concatenate([np.empty(0, np.uint8), *(status for _, status in self._known.values())])
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
        bounds = itertools.pairwise(np.searchsorted(positions, self.locations.offsets))
        for entry, offset, (low, high) in zip(self.entries.values(), self.locations.offsets, bounds, strict=False):
            if low == high:
                continue
            rows = positions[low:high] - offset
            with self._open(entry) as fragment:
                cuts = itertools.pairwise(np.searchsorted(rows, fragment.starts))
                for group, (start, stop) in enumerate(cuts):
                    if start < stop:
                        part = fragment.group(group, columns, vectors)
                        wanted = rows[start:stop] - fragment.starts[group]
                        is_whole = len(wanted) == len(part.keys) and bool((np.diff(wanted) == 1).all())
                        yield slice(low + start, low + stop), part if is_whole else part.take(wanted)

    def _path(self, entry: Entry) -> str:
        return f"{self.folder}/{entry.data}.parquet"

    def _read_keys(self, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
        with self._open(entry) as fragment:
            keys, status = fragment.keys()
            if len(keys) != entry.rows or keys_digest(keys) != entry.keys:
                raise CorruptionError(f"{fragment.name} is damaged: its row keys are not those committed; {CURE}")
            return keys, status

    def _open(self, entry: Entry) -> Fragment:
        """Open a data file. Its SHA-256 is checked on first use: page CRCs do not cover the footer, which Arrow trusts.

        Of some footers with one wrong bit it makes wrong rows, and of some the end of the process.
        """
        path = self._path(entry)
        if entry.data not in self._checked:
            try:
                found = self.files.sha256(path)
            except FileNotFoundError as error:
                raise CorruptionError(
                    f"{self.files.name(path)} is missing although it was committed; {CURE}"
                ) from error
            if found != entry.data:
                raise CorruptionError(f"{self.files.name(path)} is damaged: its SHA-256 is {found[:12]}…; {CURE}")
            self._checked.add(entry.data)
        return Fragment(self.files, path, self.layout)
