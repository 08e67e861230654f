"""`dataflex.open_store` reads a store as tables: any rows, in any order, decoded, void where there is no value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import dataflex
from dataflex.errors import ConfigError, CoverageError
from dataflex.stores.files import LocalFiles
from dataflex.stores.root import folder_name
from tests.roots import empty_root, make_store
from tests.test_store_format import FROZEN, KEYS, ROUNDED, SCALARS, STATUS, STORES, VECTORS, recipe

NAMES = {layout.storage: folder_name(kind, recipe(kind, layout)) for kind, layout in STORES if kind == "embedding"}


def test_a_store_is_opened_by_path_by_kind_or_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = FROZEN / "1"
    assert [store.kind for store in dataflex.list_stores(root)] == ["embedding"] * 5 + ["loss"]
    loss = dataflex.open_store(root, "loss")
    assert (loss.kind, loss.columns, loss.width, len(loss)) == ("loss", ["loss_sum", "tokens"], 0, 5)
    assert dataflex.open_store(f"{root}/{NAMES['float16']}").recipe["storage"] == "float16"
    assert "5 rows, norm, vectors of 4" in repr(dataflex.open_store(root, NAMES["float32"][:12]))
    with pytest.raises(
        ConfigError, match=f"found 5 stores whose name begins with 'embedding'; expected .*{NAMES['int8']}"
    ):
        dataflex.open_store(root, "embedding")
    with pytest.raises(ConfigError, match="found 6 stores; expected one of"):
        dataflex.open_store(root)
    with pytest.raises(ConfigError, match="root: found no such folder"):
        dataflex.list_stores(tmp_path / "none")
    monkeypatch.setenv("DATAFLEX_HOME", str(root))
    assert dataflex.open_store(name="loss").path == loss.path
    made = make_store(empty_root("memory", tmp_path), 1)
    alone = dataflex.open_store("memory://tested/root")
    assert (alone.name, alone.nbytes) == (made.folder, made.bytes)


@pytest.mark.parametrize("storage", NAMES)
def test_values_are_decoded_and_void_where_the_status_is_not_ok(storage: str) -> None:
    store = dataflex.open_store(FROZEN / "1" / NAMES[storage])
    ok = STATUS == 0
    found = store.to_numpy(rows=KEYS)
    assert found["vector"].dtype == np.float32
    np.testing.assert_allclose(found["vector"][ok], ROUNDED.get(storage, VECTORS)[ok], rtol=1e-3, atol=8e-3)
    assert np.isnan(found["vector"][~ok]).all()
    assert np.isnan(found["norm"][~ok]).all()
    assert found["status"].tolist() == ["ok", "ok", "no_labels", "nonfinite", "ok"]
    table = store.to_arrow(rows=KEYS)
    assert table["vector"].is_null().to_pylist() == (~ok).tolist()
    assert table["vector"].drop_null().to_pylist() == found["vector"][ok].tolist()
    assert table["norm"].null_count == 2
    assert table["row_key"].to_pylist() == [key.tobytes() for key in KEYS]
    assert store.to_pandas(rows=KEYS, vectors=True)["vector"][1].tolist() == found["vector"][1].tolist()
    assert list(store.to_pandas().columns) == ["row_key", "status", "norm"]
    assert store.to_arrow(columns=[], vectors=False).column_names == ["row_key", "status"]


def test_rows_come_in_the_order_and_number_asked_for_whatever_names_them() -> None:
    store = dataflex.open_store(FROZEN / "1", "loss")
    order = [4, 0, 4, 1]
    expected = SCALARS["loss_sum"][order].tolist()
    keys = [KEYS[i].tobytes() for i in order]
    column = pa.chunked_array([pa.array(keys[:1], pa.binary(16)), pa.array(keys[1:], pa.binary(16))])
    for rows in (KEYS[order], keys, column, column.cast(pa.binary()), pd.Series(keys), list(KEYS[order])):
        assert store.to_numpy(rows=rows)["loss_sum"].tolist() == expected
        assert store.to_arrow(rows=rows)["tokens"].to_pylist() == [1, 3, 1, 5]
    every = store.to_arrow()
    assert sorted(every["row_key"].to_pylist()) == sorted(key.tobytes() for key in KEYS)
    assert pa.concat_tables(store.batches(2)).combine_chunks() == every.combine_chunks()
    assert [len(part) for part in store.batches(2)] == [2, 2, 1]
    assert len(store.to_arrow(rows=[])) == 0
    for wrong in ([b"short"], ["text"], [16]):
        with pytest.raises(ConfigError, match="expected row keys of 16 bytes"):
            store.to_numpy(rows=wrong)


@pytest.mark.parametrize("null", [None, float("nan"), pd.NA])
def test_missing_rows_are_an_error_or_void(null: Any) -> None:
    store = dataflex.open_store(FROZEN / "1", "loss")
    rows = [KEYS[1].tobytes(), b"x" * 16, null, KEYS[3].tobytes()]
    with pytest.raises(CoverageError, match="rows: found 1 of 4 without a row key"):
        store.to_numpy(rows=rows)
    with pytest.raises(CoverageError, match="1 of 3 rows are not in"):
        store.to_numpy(rows=[row for row in rows if row is not null])
    with pytest.raises(ConfigError, match="missing: found 'zero'; expected error or nan"):
        store.to_numpy(rows=rows, missing="zero")  # type: ignore[arg-type]
    found = store.to_numpy(rows=rows, missing="nan")
    assert found["status"].tolist() == ["ok", "missing", "missing", "nonfinite"]
    np.testing.assert_array_equal(found["loss_sum"], [2.5, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(found["tokens"], [5, np.nan, np.nan, np.nan])
    assert store.to_arrow(rows=rows, missing="nan")["tokens"].to_pylist() == [5, None, None, None]
    assert store.has(rows).tolist() == [True, False, False, True]


def test_a_store_is_read_by_at_least_a_row_at_a_time(tmp_path: Path) -> None:
    store = dataflex.open_store(tmp_path / "root", make_store(LocalFiles(tmp_path / "root"), 1).folder)
    assert sum(table.num_rows for table in store.batches(1)) == len(store)
    for size in (0, -1):
        with pytest.raises(ConfigError, match="at least 1"):
            list(store.batches(size))
