"""A store gives back what it was given, refuses what does not fit it, and is found under its root."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from dataflex.errors import ConflictError, CoverageError, DataflexError, MismatchError
from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.files import LocalFiles
from dataflex.stores.record import FORMAT, seal, unseal
from dataflex.stores.root import StoreRoot, open_store
from dataflex.stores.rounding import STORAGES, decode, encode
from dataflex.stores.values import SCALAR_DTYPES, Layout, Values
from tests.looked_at import faults, problems

RECIPE = {"feature": {"kind": "gradient", "projection": {"dim": 24}}, "base": "3f2a" * 8}
LAYOUT = Layout({"norm": "float32", "tokens": "int32"}, 24, "float16")


def keys(*numbers: int) -> np.ndarray:
    """Keys that differ only in their last byte, most of the rest being zero: the hard case for an index."""
    return np.array([bytes(15) + bytes([n]) for n in numbers], "S16").view(KEY_DTYPE)


def some(layout: Layout, row_keys: np.ndarray, seed: int = 0) -> Values:
    rng = np.random.default_rng(seed)
    scalars = {}
    for name, dtype in layout.scalars.items():
        kind = np.dtype(dtype).kind
        scalars[name] = (rng.standard_normal(len(row_keys)) * (1 if kind == "f" else 1000)).astype(dtype)
    vectors = rng.standard_normal((len(row_keys), layout.width), np.float32) if layout.width else None
    return Values(row_keys, np.zeros(len(row_keys), np.uint8), scalars, vectors)


def rounded(vectors: np.ndarray, storage: str) -> np.ndarray:
    """Return vectors as a store gives them back."""
    return decode(*encode(vectors, storage), storage, vectors.shape[1])


def equal(found: Values, expected: Values, storage: str) -> None:
    assert found.keys.tobytes() == expected.keys.tobytes()
    np.testing.assert_array_equal(found.status, expected.status)
    assert found.scalars.keys() == expected.scalars.keys()
    for name, column in expected.scalars.items():
        assert found.scalars[name].dtype == column.dtype
        np.testing.assert_array_equal(found.scalars[name], column)
    if expected.vectors is None:
        assert found.vectors is None
    else:
        assert found.vectors is not None
        np.testing.assert_array_equal(found.vectors, rounded(expected.vectors, storage))


def pick(values: Values, rows: list[int]) -> Values:
    vectors = None if values.vectors is None else values.vectors[rows]
    return Values(values.keys[rows], values.status[rows], {k: v[rows] for k, v in values.scalars.items()}, vectors)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("url", ["folder", "a folder with 空格 and ünïcode", "memory://{}/deep", "file://{}"])
def test_round_trip_keeps_order_and_multiplicity(tmp_path: Path, url: str, storage: str) -> None:
    root = StoreRoot(url.format(tmp_path) if ":" in url else tmp_path / url)
    store = root.open("gradient", RECIPE, Layout({dtype: dtype for dtype in SCALAR_DTYPES}, 24, storage))
    values = some(store.layout, keys(*range(0, 200, 2)))
    assert store.append("even", values)
    again = root.find("gradient", RECIPE)
    assert again is not None
    rows = [7, 99, 7, 0, 50, 50, 1]
    equal(again.read(values.keys[rows]), pick(values, rows), storage)
    equal(again.read(values.keys), values, storage)
    assert again.contains(keys(0, 1, 198, 200)).tolist() == [True, False, True, False]
    assert (again.rows, again.committed_fragments()) == (100, ["even"])
    assert len(again.read(keys())) == 0


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    store = StoreRoot(tmp_path).open("gradient", RECIPE, LAYOUT)
    store.append("a", some(LAYOUT, keys(1, 2)))
    found = store.read(keys(2), columns=["norm"], vectors=False)
    assert (list(found.scalars), found.vectors) == (["norm"], None)
    with pytest.raises(MismatchError, match="no column loss"):
        store.read(keys(2), columns=["loss"])
    with pytest.raises(MismatchError, match="row keys are"):
        store.contains(np.zeros(3, np.int64))


def test_large_row_groups_and_small_fragments(tmp_path: Path) -> None:
    layout = Layout({"n": "int64"}, 3, "float32")
    store = StoreRoot(tmp_path).open("loss", {"v": 1}, layout)
    rng = np.random.default_rng(1)
    all_keys = np.frombuffer(rng.bytes(16 * 10_000), KEY_DTYPE)
    number = np.arange(len(all_keys))
    vectors = rng.standard_normal((len(all_keys), 3), np.float32)
    bounds = [0, 9_000, 9_001, 9_500, 10_000]
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        part = slice(start, stop)
        store.append(
            f"f{i}", Values(all_keys[part], np.zeros(stop - start, np.uint8), {"n": number[part]}, vectors[part])
        )
    order = rng.integers(0, 10_000, 500)
    found = store.read(all_keys[order])
    assert found.scalars["n"].tolist() == order.tolist()
    np.testing.assert_array_equal(found.vectors, vectors[order])
    for block_rows in (1000, 4096, 20_000):
        blocks = list(store.scan(block_rows))
        assert {len(block) for block in blocks[:-1]} <= {block_rows}
        assert np.concatenate([block.scalars["n"] for block in blocks]).tolist() == number.tolist()
    within = list(store.scan(128, keys=np.concatenate([all_keys[order], keys(1)])))
    assert np.concatenate([block.scalars["n"] for block in within]).tolist() == sorted(set(order.tolist()))


def test_the_first_fragment_of_the_log_has_a_key(tmp_path: Path) -> None:
    root = StoreRoot(tmp_path)
    store = root.open("gradient", RECIPE, LAYOUT)
    late, early = some(LAYOUT, keys(1, 2, 2), seed=1), some(LAYOUT, keys(2, 3), seed=2)
    store.append("b", late)
    equal(store.read(keys(2)), pick(late, [1]), "float16")
    store.append("a", early)
    assert store.contains(keys(1, 2, 3)).all()
    expected = Values(keys(1, 2, 3), np.zeros(3, np.uint8), {}, None)
    for reader in (store, root.open("gradient", RECIPE, LAYOUT)):
        found = reader.read(keys(1, 2, 3))
        assert found.keys.tobytes() == expected.keys.tobytes()
        np.testing.assert_array_equal(found.scalars["norm"], [late.scalars["norm"][0], *early.scalars["norm"]])
        scanned = np.concatenate([block.keys for block in reader.scan(2)])
        assert sorted(k.tobytes() for k in scanned) == [k.tobytes() for k in keys(1, 2, 3)]


def test_of_many_equal_keys_the_first_row_counts(tmp_path: Path) -> None:
    layout = Layout({"n": "int64"})
    store = StoreRoot(tmp_path).open("loss", RECIPE, layout)
    for i in range(3):
        row_keys = keys(*np.random.default_rng(i).integers(0, 5, 300).tolist())
        store.append(f"f{i}", Values(row_keys, np.zeros(300, np.uint8), {"n": np.arange(300) + 1000 * i}))
    first = np.random.default_rng(0).integers(0, 5, 300).tolist()
    assert store.read(keys(*range(5))).scalars["n"].tolist() == [first.index(n) for n in range(5)]


def test_rows_that_are_not_ok_become_zeros(tmp_path: Path) -> None:
    store = StoreRoot(tmp_path).open("gradient", RECIPE, LAYOUT)
    values = some(LAYOUT, keys(1, 2, 3))
    values.status[1:] = [Status.NONFINITE, Status.NO_LABELS]
    assert values.vectors is not None
    values.vectors[1], values.scalars["norm"][1] = np.nan, np.inf
    store.append("a", values)
    found = store.read(keys(1, 2, 3))
    assert found.status.tolist() == [0, 2, 1]
    assert found.vectors is not None
    assert not found.vectors[1:].any()
    assert found.scalars["norm"][1:].tolist() == [0, 0]
    assert len(next(store.scan())) == 3


def test_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store = StoreRoot(tmp_path).open("gradient", RECIPE, LAYOUT)
    good = some(LAYOUT, keys(1, 2))
    assert good.vectors is not None
    bad = [
        Values(good.keys, good.status, good.scalars, None),
        Values(good.keys, good.status, {"norm": good.scalars["norm"]}, good.vectors),
        Values(good.keys, good.status, good.scalars, good.vectors[:, :5]),
        Values(good.keys, good.status, good.scalars, good.vectors.astype(np.float64)),
        Values(good.keys, good.status[:1], good.scalars, good.vectors),
        Values(good.keys.view("S16"), good.status, good.scalars, good.vectors),
    ]
    for values in bad:
        with pytest.raises(MismatchError, match="column"):
            store.append("a", values)
    good.vectors[1, 3] = np.nan
    with pytest.raises(DataflexError, match="not finite although"):
        store.append("a", good)
    with pytest.raises(DataflexError, match="no rows"):
        store.append("a", some(LAYOUT, keys()))
    with pytest.raises(DataflexError, match="cannot be called"):
        store.append("../a", some(LAYOUT, keys(1)))
    assert store.committed_fragments() == []


@pytest.mark.parametrize(
    "bad",
    [
        {"scalars": {"row_key": "int8"}},
        {"scalars": {"a b": "int8"}},
        {"scalars": {"a": "object"}},
        {"width": -1},
        {"storage": "int2"},
    ],
)
def test_layouts_that_no_store_can_have_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(MismatchError):
        Layout(**bad)  # type: ignore[arg-type]


def test_a_fragment_is_committed_once(tmp_path: Path) -> None:
    store = StoreRoot(tmp_path).open("gradient", RECIPE, LAYOUT)
    first, second = some(LAYOUT, keys(1, 2), seed=1), some(LAYOUT, keys(1, 2), seed=2)
    assert store.append("a", first)
    assert store.append("a", first)
    assert not store.append("a", second)
    assert StoreRoot(tmp_path).open("gradient", RECIPE, LAYOUT).append("a", first)
    with pytest.raises(ConflictError, match="other rows"):
        store.append("a", some(LAYOUT, keys(1, 3)))
    equal(store.read(keys(1, 2)), first, "float16")
    assert faults(store) == []


def test_missing_rows_are_counted(tmp_path: Path) -> None:
    store = StoreRoot(tmp_path).open("gradient", RECIPE, LAYOUT)
    with pytest.raises(CoverageError, match="2 of 2 rows"):
        store.read(keys(1, 2))
    store.append("a", some(LAYOUT, keys(1, 2)))
    with pytest.raises(CoverageError, match="1 of 3 rows are not in"):
        store.read(keys(1, 2, 3, 3))


def test_a_reader_sees_what_another_writer_commits(tmp_path: Path) -> None:
    reader = StoreRoot(tmp_path).open("gradient", RECIPE, LAYOUT)
    assert not reader.contains(keys(1)).any()
    version = reader.version
    StoreRoot(tmp_path).open("gradient", RECIPE, LAYOUT).append("a", some(LAYOUT, keys(1)))
    assert len(reader.read(keys(1))) == 1
    assert reader.version != version


def test_stores_are_found_by_recipe(tmp_path: Path) -> None:
    root = StoreRoot(tmp_path)
    assert root.find("gradient", RECIPE) is None
    assert root.stores() == []
    assert list(tmp_path.iterdir()) == []
    store = root.open("gradient", RECIPE, LAYOUT)
    store.append("a", some(LAYOUT, keys(1, 2)))
    other = {**RECIPE, "feature": {"kind": "gradient", "projection": {"dim": 48}}}
    root.open("gradient", {**other, "base": "0" * 32}, LAYOUT)
    root.open("loss", other, Layout({"loss_sum": "float64"}))
    (tmp_path / "notes").mkdir()
    (tmp_path / "states").mkdir()
    assert sorted((s.kind, s.rows) for s in root.stores()) == [("gradient", 0), ("gradient", 2), ("loss", 0)]
    found = root.nearest("gradient", other)
    assert found is not None
    assert (found[0].path, found[1]) == (store.path, ["feature.projection.dim: 24 → 48"])
    assert root.nearest("embedding", other) is None
    recipe = unseal(Path(store.path, "recipe.json").read_bytes(), "it")
    assert recipe["libraries"]["numpy"] == np.__version__
    assert store.bytes == sum(p.stat().st_size for p in tmp_path.glob("*/data/*"))


def test_a_pinned_store_is_opened_under_any_name(tmp_path: Path) -> None:
    store = StoreRoot(tmp_path).open("gradient", RECIPE, LAYOUT)
    store.append("a", some(LAYOUT, keys(1)))
    os.rename(store.path, tmp_path / "my grads")
    pinned = open_store(tmp_path / "my grads")
    assert (pinned.recipe, pinned.rows) == (RECIPE, 1)
    with pytest.raises(MismatchError, match="is no store"):
        open_store(tmp_path / "other")
    os.rename(pinned.path, tmp_path / f"gradient-{'0' * 32}")
    assert StoreRoot(tmp_path).stores() == []


def test_another_layout_is_refused_with_both_sides(tmp_path: Path) -> None:
    StoreRoot(tmp_path).open("gradient", RECIPE, LAYOUT)
    with pytest.raises(MismatchError, match="storage: float16 → int8"):
        StoreRoot(tmp_path).open("gradient", RECIPE, Layout(LAYOUT.scalars, 24, "int8"))


def test_a_newer_format_is_refused_with_a_hint(tmp_path: Path) -> None:
    store = StoreRoot(tmp_path).open("gradient", RECIPE, LAYOUT)
    store.append("a", some(LAYOUT, keys(1)))
    for path in (Path(store.path, "log", "a.json"), Path(store.path, "recipe.json")):
        document = unseal(path.read_bytes(), "it")
        path.write_bytes(seal({**document, "format": FORMAT + 1}))
        with pytest.raises(MismatchError, match="read it with a newer DataFlex"):
            StoreRoot(tmp_path).open("gradient", RECIPE, LAYOUT).contains(keys(1))


class ReadOnly(LocalFiles):
    """A mount without write permission; permission bits would not stop a test that runs as root."""

    def _make_folder(self, folder: Path) -> None:
        raise OSError(30, "Read-only file system")


def test_a_read_only_store_is_readable_and_says_why_it_cannot_grow(tmp_path: Path) -> None:
    values = some(LAYOUT, keys(1, 2))
    StoreRoot(tmp_path).open("gradient", RECIPE, LAYOUT).append("a", values)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    store = StoreRoot(ReadOnly(link)).open("gradient", RECIPE, LAYOUT)
    equal(store.read(values.keys), values, "float16")
    assert problems(store) == []
    with pytest.raises(DataflexError, match=r"cannot write .*Read-only"):
        store.append("b", some(LAYOUT, keys(3)))


@pytest.mark.parametrize(
    ("storage", "tolerance"), [("float32", 0), ("float16", 2**-11), ("int8", 0.5 / 127), ("int4", 0.5 / 7)]
)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1, 1e30])
def test_rounding_is_relative_to_the_row(storage: str, tolerance: float, size: float) -> None:
    vectors = (np.random.default_rng(0).standard_normal((50, 33)) * size).astype(np.float32)
    vectors[0] = 0
    found = rounded(vectors, storage)
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    assert (np.abs(found - vectors) <= tolerance * largest * 1.001).all()
    assert not found[0].any()
    np.testing.assert_array_equal(encode(found, storage)[0], encode(vectors, storage)[0])
