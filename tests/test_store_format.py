"""Stores written by released versions are read for ever: `format/<n>/` holds one of each format, never rewritten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.root import StoreRoot
from dataflex.stores.rounding import STORAGES
from dataflex.stores.values import Layout, Values
from tests.looked_at import problems

FROZEN = Path(__file__).parent / "format"
KEYS = np.array([bytes([n]) + bytes(15) for n in range(5)], "S16").view(KEY_DTYPE)
STATUS = np.array([Status.OK, Status.OK, Status.NO_LABELS, Status.NONFINITE, Status.OK], np.uint8)
VECTORS = np.array([[1, -1, 0.5, 0], [0, 2, 0, -2], [0, 0, 0, 0], [0, 0, 0, 0], [0.25, 0.5, 0.75, -1]], np.float32)
ROUNDED = {  # where that is far from `VECTORS`
    "int4": np.array([[7, -7, 4, 0], [0, 14, 0, -14], [0, 0, 0, 0], [0, 0, 0, 0], [2, 4, 5, -7]], np.float32) / 7,
    "int1": np.array([[5, -5, 5, 5], [8, 8, 8, -8], [0, 0, 0, 0], [0, 0, 0, 0], [5, 5, 5, -5]], np.float32) / 8,
}
SCALARS = {"loss_sum": np.array([1.5, 2.5, 0, 0, 0.125]), "tokens": np.array([3, 5, 0, 0, 1], np.int32)}
STORES = [
    ("loss", Layout({"loss_sum": "float64", "tokens": "int32"}, 0, "float32")),
    *(("embedding", Layout({"norm": "float32"}, 4, storage)) for storage in STORAGES),
]


def recipe(kind: str, layout: Layout) -> dict[str, object]:
    return {"feature": {"kind": kind}, "storage": layout.storage}


def values(layout: Layout, rows: slice) -> Values:
    norms = {"norm": np.linalg.norm(VECTORS, axis=1).astype(np.float32)}
    scalars = {name: {**SCALARS, **norms}[name][rows] for name in layout.scalars}
    return Values(KEYS[rows], STATUS[rows], scalars, VECTORS[rows] if layout.width else None)


def write(root: Path) -> None:
    """Write what is frozen; a new format gets a folder of its own."""
    for kind, layout in STORES:
        store = StoreRoot(root).open(kind, recipe(kind, layout), layout)
        store.append("1" * 32, values(layout, slice(0, 3)))
        store.append("2" * 32, values(layout, slice(3, 5)))
    source = root.parent / "state"
    source.mkdir()
    (source / "weights.txt").write_text("1 2 3\n")
    StoreRoot(root).states.put("a-lineage", source, {"steps": 4})


@pytest.mark.parametrize("version", sorted(path.name for path in FROZEN.iterdir()))
def test_every_format_is_read(version: str, tmp_path: Path) -> None:
    root = StoreRoot(FROZEN / version)
    assert len(root.stores()) == len(STORES)
    for kind, layout in STORES:
        store = root.find(kind, recipe(kind, layout))
        assert store is not None
        assert store.layout == layout
        assert problems(store) == []
        found, expected = store.read(KEYS), values(layout, slice(None))
        np.testing.assert_array_equal(found.status, expected.status)
        for name, column in expected.scalars.items():
            np.testing.assert_array_equal(found.scalars[name], column)
        if expected.vectors is not None:
            assert found.vectors is not None
            wanted = ROUNDED.get(layout.storage, expected.vectors)
            np.testing.assert_allclose(found.vectors, wanted, atol=2 / 127 if layout.storage == "int8" else 1e-7)
    assert root.states.find("a-lineage") == {"steps": 4}
    assert (root.states.fetch("a-lineage", tmp_path) / "weights.txt").read_text() == "1 2 3\n"


def test_this_version_writes_the_newest_format(tmp_path: Path) -> None:
    write(tmp_path / "root")
    newest = StoreRoot(FROZEN / max(path.name for path in FROZEN.iterdir()))
    assert [s.folder for s in StoreRoot(tmp_path / "root").stores()] == [s.folder for s in newest.stores()]
