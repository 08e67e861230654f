"""The index of row keys against a dictionary: duplicates, keys that begin alike, zeros at either end, keys of none."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.rows import KEY_DTYPE
from dataflex.stores.locations import Locations


def of(*keys: bytes) -> np.ndarray:
    return np.frombuffer(b"".join(keys), KEY_DTYPE)


@pytest.mark.parametrize("alike", [0, 8, 15])
def test_every_key_is_found_where_it_is_first(alike: int) -> None:
    """Also where the first bytes are the same for many keys, which no digest is likely to show."""
    rng = np.random.default_rng(alike)
    made = [bytes(alike) + rng.integers(0, 3, 16 - alike, np.uint8).tobytes() for _ in range(400)]
    fragments = [made[:100], [], made[100:101], made[101:]]
    first: dict[bytes, int] = {}
    for position, key in enumerate(made):
        first.setdefault(key, position)
    index = Locations([of(*some) for some in fragments])
    others = [rng.integers(0, 4, 16, np.uint8).tobytes() for _ in range(100)] + [bytes(16), b"\xff" * 16]
    asked = [made[i] for i in rng.permutation(400)] + others
    assert index.find(of(*asked)).tolist() == [first.get(key, -1) for key in asked]
    assert sorted(index.all().tolist()) == sorted(first.values())
    assert len(index) == len(first)
    assert index.offsets.tolist() == [0, 100, 100, 101, 400]


def test_an_empty_store_has_no_key() -> None:
    assert Locations([]).find(of(bytes(16))).tolist() == [-1]
    assert len(Locations([])) == 0


def test_fragments_that_come_later_are_found_as_if_all_were_there_at_once() -> None:
    """Whatever their order in the log, and also where one that comes later holds a key first."""
    rng = np.random.default_rng(0)
    pool = [bytes([n]) * 3 + rng.bytes(13) for n in range(200)]
    fragments = [[pool[i] for i in rng.integers(0, 200, rng.integers(0, 30))] for _ in range(40)]
    there: list[int] = []
    index = None
    for several in np.array_split(rng.permutation(40), 17):
        before, there = there, sorted([*there, *several.tolist()])
        keys = [of(*fragments[i]) for i in there]
        index = Locations(keys, index, [there.index(i) for i in before])
        anew = Locations(keys)
        asked = of(*pool, bytes(16))
        assert index.find(asked).tolist() == anew.find(asked).tolist()
        assert sorted(index.all().tolist()) == sorted(anew.all().tolist())
        assert len(index) == len(anew)
    assert len(index._parts) < 6  # type: ignore[union-attr]
