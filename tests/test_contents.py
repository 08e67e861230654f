"""A reader takes those parts of a data file that hold what it asks for, and finds there what Parquet does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import CorruptionError
from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.contents import columns_of, contents_of, parse
from dataflex.stores.files import Extent, LocalFiles
from dataflex.stores.fragment import serialise
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.record import seal, unseal
from dataflex.stores.root import StoreRoot
from dataflex.stores.rounding import STORAGES
from dataflex.stores.values import SCALAR_DTYPES, Layout, Values
from tests.looked_at import faults

pytestmark = pytest.mark.usefixtures("unsynced")

ALL = {f"of_{dtype}": dtype for dtype in SCALAR_DTYPES}


class Counting(LocalFiles):
    """Counts the bytes that are asked for of data files."""

    asked = 0

    def fetch(self, wanted: Sequence[Extent]) -> list[bytes | None]:
        found = super().fetch(wanted)
        self.asked += sum(
            len(part or b"") for (path, _, _), part in zip(wanted, found, strict=True) if "/data/" in path
        )
        return found


def drawn(layout: Layout, rows: int, seed: int = 0) -> Values:
    rng = np.random.default_rng(seed)
    scalars = {
        name: rng.integers(0, 2 if kind == "bool" else 100, rows).astype(kind) for name, kind in layout.scalars.items()
    }
    status = np.where(rng.random(rows) < 0.1, Status.NONFINITE, Status.OK).astype(np.uint8)
    vectors = rng.standard_normal((rows, layout.width), np.float32) if layout.width else None
    return Values(np.frombuffer(rng.bytes(16 * rows), KEY_DTYPE), status, scalars, vectors)


def filled(folder: Path, layout: Layout, fragments: Sequence[Values]) -> ParquetStore:
    store = StoreRoot(Counting(folder)).open("gradient", {"r": 1}, layout)
    for number, values in enumerate(fragments):
        store.append(f"f{number:03}", values)
    return store


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("width", [0, 1, 7, 5000])
def test_parts_hold_what_parquet_says(tmp_path: Path, storage: str, width: int) -> None:
    layout = Layout(ALL, width, storage)
    values = drawn(layout, 4099 if width < 100 else 70)  # more than one row group
    store = filled(tmp_path, layout, [values])
    found = store.read(values.keys)
    table = pq.read_table(next(Path(store.path, "data").iterdir()))
    for name in ALL:
        np.testing.assert_array_equal(found.scalars[name], table.column(name).to_numpy())
        assert found.scalars[name].dtype == np.dtype(ALL[name])
    np.testing.assert_array_equal(found.status, table.column("status").to_numpy())
    if width:
        raw = b"".join(row.as_py() for row in table.column("vector"))
        encoded = next(iter(store.encoded(len(values))))
        assert encoded.codes is not None
        assert encoded.codes.shape == (len(values), STORAGES[storage].items(width))
        order = np.argsort(encoded.keys), np.argsort(values.keys)
        assert (
            encoded.codes[order[0]].tobytes()
            == np.frombuffer(raw, np.uint8).reshape(len(values), -1)[order[1]].tobytes()
        )


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 299), max_size=40),
    st.sampled_from([(), ("of_bool",), ("of_int8", "of_float64")]),
    st.booleans(),
)
def test_any_rows_in_any_order_are_those_of_a_whole_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int], columns: tuple[str, ...], vectors: bool
) -> None:
    layout = Layout(ALL, 3000, "float16")
    parts = [drawn(layout, 100, seed) for seed in range(3)]
    folder = tmp_path_factory.getbasetemp() / "any_rows"
    store = filled(folder, layout, parts)
    keys = np.concatenate([part.keys for part in parts])
    whole, some = store.read(keys), store.read(keys[rows], columns, vectors)
    np.testing.assert_array_equal(some.status, whole.status[rows])
    assert list(some.scalars) == list(columns)
    for name in columns:
        np.testing.assert_array_equal(some.scalars[name], whole.scalars[name][rows])
    assert (some.vectors is None) == (not vectors)
    if some.vectors is not None and whole.vectors is not None:
        np.testing.assert_array_equal(some.vectors, whole.vectors[rows])


def test_a_reader_takes_no_more_than_the_parts_it_needs(tmp_path: Path) -> None:
    layout = Layout({"norm": "float32"}, 1024, "int8")
    parts = [drawn(layout, 512, seed) for seed in range(40)]
    assert filled(tmp_path, layout, parts).compact()
    files = Counting(tmp_path)
    store = StoreRoot(files).open("gradient", {"r": 1}, layout)
    keys = np.concatenate([part.keys for part in parts])
    assert store.contains(keys).all()
    store.read(keys, columns=[], vectors=False)
    assert store.rows == len(keys)
    assert files.asked == 0  # row keys and statuses are in the compacted log
    some = keys[np.random.default_rng(0).permutation(len(keys))[:200]]
    store.read(some, columns=[])
    assert files.asked <= 200 * (16 << 10) + 40 * 512 * 4  # 16 rows for each, and the scales of all fragments
    files.asked = 0
    store.read(parts[7].keys, columns=[])
    assert files.asked == 512 * (1024 + 4)
    files.asked = 0
    store.read(keys, columns=["norm"], vectors=False)
    assert files.asked == len(keys) * 4


def said(layout: Layout, values: Values) -> tuple[str, int]:
    data = serialise(layout, values)
    return contents_of(layout, data).text(), data.size


def edited(text: str, line: int, field: int, value: str) -> str:
    lines = [each.split(" ") for each in text.split("\n")]
    lines[line][field] = value
    return "\n".join(" ".join(each) for each in lines)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((0, "other"), (1, "0"), (1, "-1"), (1, "41"), (1, str(1 << 70)), (2, "-1"), (2, str(1 << 60)), (2, "x")),
        *((3, ""), (3, "AA"), (3, "%")),
    ],
)
def test_what_cannot_be_inside_a_data_file_is_refused(field: int, value: str) -> None:
    layout, values = Layout({}, 8, "int8"), drawn(Layout({}, 8, "int8"), 40)
    text, size = said(layout, values)
    assert parse(text, columns_of(layout), 40, size, "it").text() == text
    for line in range(4):
        with pytest.raises(CorruptionError, match="it is damaged"):
            parse(edited(text, line, field, value), columns_of(layout), 40, size, "it")
    for other in ("", text + "\n" + text, "\n".join(text.split("\n")[:-1])):
        with pytest.raises(CorruptionError, match="it is damaged"):
            parse(other, columns_of(layout), 40, size, "it")


def test_a_log_that_names_other_bytes_than_the_values_is_found(tmp_path: Path) -> None:
    layout, values = Layout({}, 8, "int8"), drawn(Layout({}, 8, "int8"), 40)
    store = filled(tmp_path, layout, [values])
    path = next(Path(store.path, "log").iterdir())
    entry = unseal(path.read_bytes(), "it")
    text = str(entry["contents"])
    offset = int(text.split("\n")[3].split(" ")[2])
    path.write_bytes(seal({**entry, "contents": edited(text, 3, 2, str(offset - 8))}, 2))
    again = StoreRoot(tmp_path).open("gradient", {"r": 1}, layout)
    with pytest.raises(CorruptionError, match="are not those committed"):
        again.read(values.keys)
    assert [problem.path for problem in faults(again)]


def test_two_entries_that_differ_in_their_contents_alone_are_equal(tmp_path: Path) -> None:
    layout, values = Layout({}, 8, "int8"), drawn(Layout({}, 8, "int8"), 40)
    store = filled(tmp_path, layout, [values])
    version = store.version
    path = next(Path(store.path, "log").iterdir())
    entry = unseal(path.read_bytes(), "it")
    assert entry.pop("format") == 2  # an older DataFlex would take the entry for damage
    del entry["contents"]
    path.write_bytes(seal(entry))
    again = StoreRoot(tmp_path).open("gradient", {"r": 1}, layout)
    assert again.version == version  # what was derived from the store stays valid
    np.testing.assert_array_equal(again.read(values.keys).vectors, store.read(values.keys).vectors)


def test_the_layout_is_that_of_the_values(tmp_path: Path) -> None:
    layout = Layout({"norm": "float32"}, 8, "int8")
    text, size = said(layout, drawn(layout, 40))
    with pytest.raises(CorruptionError, match="cannot be"):
        parse(text, columns_of(dataclasses.replace(layout, width=4000)), 40, size, "it")
