"""Where each row key is: an index in memory over the fragments of a store. N keys over all fragments, R asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Text of one length compares byte by byte, as keys do; that it neglects trailing zeros cannot make two keys equal,
# since all are as long.
_SORTABLE = np.dtype("S16")
_LARGER = 4
"""How many times as large as the next an index is, at least: a key is sought in few, and sorted anew a few times."""


class Locations:
    """An index over fragments. A key that several fragments hold is the first one's.

    Fragments that were not there before are indexed by themselves, beside the larger indexes of those that were.

    Args:
        fragments: row keys of each fragment, in the order of the log.
        earlier: an index over some of these fragments.
        places: (F',) which of `fragments` each of these is.
    """

    def __init__(self, fragments: Sequence[np.ndarray], earlier: Locations | None = None, places: Sequence[int] = ()):
        self.offsets = np.cumsum([0, *map(len, fragments)])
        """(F + 1,) position of each fragment's first row, and N."""
        known = np.asarray(places, np.int64)
        parts = [] if earlier is None else [(known[at], index) for at, index in earlier._parts]
        fresh = np.setdiff1d(np.arange(len(fragments)), known)
        if len(fresh) or not parts:
            parts.append((fresh, _Index([fragments[i] for i in fresh])))
        while len(parts) > 1 and len(parts[-2][1]) < _LARGER * len(parts[-1][1]):
            at = np.sort(np.concatenate([parts.pop()[0], parts.pop()[0]]))
            parts.append((at, _Index([fragments[i] for i in at])))
        self._parts: list[tuple[np.ndarray, _Index]] = parts

    def __len__(self) -> int:
        return len(self.all())

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the position of each key among all rows of all fragments, -1 where it is in none; (R,) int64."""
        first: np.ndarray | None = None
        for at, index in self._parts:
            found = self._among_all(at, index, index.find(keys))
            # Compared as unsigned numbers, -1 is after every position.
            first = found if first is None else np.minimum(first.view(np.uint64), found.view(np.uint64)).view(np.int64)
        assert first is not None
        return first

    def all(self) -> np.ndarray:
        """Return the position of every key once, in no order; int64."""
        found = [self._among_all(at, index, index.positions) for at, index in self._parts]
        if len(found) == 1:
            return found[0]
        return np.unique(self.find(np.concatenate([index.keys for _, index in self._parts])))

    def _among_all(self, at: np.ndarray, index: _Index, positions: np.ndarray) -> np.ndarray:
        """Return positions among the rows of all fragments, given those among the rows of some; -1 stays."""
        if len(self._parts) == 1:
            return positions
        fragment = np.searchsorted(index.offsets, positions, side="right") - 1
        moved: np.ndarray = np.where(positions < 0, -1, positions + (self.offsets[at] - index.offsets[:-1])[fragment])
        return moved


class _Index:
    """An index over fragments that stays as it is.

    Keys are digests, so their first eight bytes tell them apart, and numbers are sorted and searched several times
    faster than text. Where two keys do share them, whole keys are compared throughout.
    """

    def __init__(self, fragments: Sequence[np.ndarray]):
        self.offsets = np.cumsum([0, *map(len, fragments)])
        found = np.concatenate(fragments).view(_SORTABLE) if fragments else np.empty(0, _SORTABLE)
        heads = _heads(found)
        order = np.argsort(heads)
        self._by_head = True
        if bool((np.diff(heads[order]) == 0).any()):  # equal keys must stay in the order of the log: the first is kept
            order = np.argsort(heads, kind="stable")  # several times slower, so only then
        if _has_shared_heads(found[order]):
            self._by_head = False
            order = np.argsort(found, kind="stable")
        found = found[order]
        first = np.ones(len(found), bool)
        first[1:] = found[1:] != found[:-1]
        self.keys, self.positions = found[first], order[first]
        self._heads = _heads(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the position of each key among the rows of these fragments, -1 where it is in none; (R,) int64."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        wanted = np.ascontiguousarray(keys).view(_SORTABLE)
        known, asked = (self._heads, _heads(wanted)) if self._by_head else (self.keys, wanted)
        # In order, so that one search begins where the last one ended: random ones miss the cache at every step.
        order = np.argsort(asked)
        slot = np.empty(len(wanted), np.int64)
        slot[order] = np.searchsorted(known, asked[order])
        slot = np.minimum(slot, len(known) - 1)
        return np.where(self.keys[slot] == wanted, self.positions[slot], -1)


def _heads(keys: np.ndarray) -> np.ndarray:
    """Return the first eight bytes of each key as a number, in the order of the keys."""
    return keys.view(">u8").reshape(-1, 2)[:, 0].astype(np.uint64)


def _has_shared_heads(ordered: np.ndarray) -> bool:
    """Say whether two different keys begin with the same eight bytes."""
    heads = _heads(ordered)
    return bool(((heads[1:] == heads[:-1]) & (ordered[1:] != ordered[:-1])).any())
