"""Where each row key is: an index in memory over the fragments of a store. N keys over all fragments, R asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Text of one length compares byte by byte, as keys do; that it neglects trailing zeros cannot make two keys equal,
# since all are as long.
_SORTABLE = np.dtype("S16")


class Locations:
    """An index over fragments. A key that several fragments hold is the first one's.

    Keys are digests, so their first eight bytes tell them apart, and numbers are sorted and searched several times
    faster than text. Where two keys do share them, whole keys are compared throughout.

    Args:
        fragments: row keys of each fragment, in the order of the log.
    """

    def __init__(self, fragments: Sequence[np.ndarray]):
        self.offsets = np.cumsum([0, *map(len, fragments)])
        """(F + 1,) position of each fragment's first row, and N."""
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
        self._keys, self._positions = found[first], order[first]
        self._heads = _heads(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the position of each key among all rows of all fragments, -1 where it is in none; (R,) int64."""
        if not len(self._keys):
            return np.full(len(keys), -1)
        wanted = np.ascontiguousarray(keys).view(_SORTABLE)
        known, asked = (self._heads, _heads(wanted)) if self._by_head else (self._keys, wanted)
        # In order, so that one search begins where the last one ended: random ones miss the cache at every step.
        order = np.argsort(asked)
        slot = np.empty(len(wanted), np.int64)
        slot[order] = np.searchsorted(known, asked[order])
        slot = np.minimum(slot, len(known) - 1)
        return np.where(self._keys[slot] == wanted, self._positions[slot], -1)

    def all(self) -> np.ndarray:
        """Return the position of every key once, in no order; (len(self),) int64."""
        return self._positions


def _heads(keys: np.ndarray) -> np.ndarray:
    """Return the first eight bytes of each key as a number, in the order of the keys."""
    return keys.view(">u8").reshape(-1, 2)[:, 0].astype(np.uint64)


def _has_shared_heads(ordered: np.ndarray) -> bool:
    """Say whether two different keys begin with the same eight bytes."""
    heads = _heads(ordered)
    return bool(((heads[1:] == heads[:-1]) & (ordered[1:] != ordered[:-1])).any())
