"""Stores of features, read as tables: the values of rows, whoever computed them. R rows, D numbers per vector."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from dataflex.config import store_root
from dataflex.errors import ConfigError, CoverageError
from dataflex.results.row_map import key_column
from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import NAME, StoreRoot, existing_files
from dataflex.stores.root import open_store as open_by_path
from dataflex.stores.values import Values

if TYPE_CHECKING:
    import pandas as pd

_ABSENT = len(Status)
_STATUS = np.array([*(status.name.lower() for status in Status), "missing"])
"""What a status is called, by its number; the last is of rows that the store does not have."""


def list_stores(root: str | os.PathLike[str] | None = None) -> list[Store]:
    """Return the stores under a root, sorted by name.

    Args:
        root: path or URL; None: the root of a run file that names no store.

    Raises:
        ConfigError: it is named and not there.
    """
    named_by = "root" if root is not None else "DATAFLEX_HOME" if os.environ.get("DATAFLEX_HOME") else None
    files = existing_files(store_root(None if root is None else os.fspath(root)), named_by)
    return [Store(store) for store in StoreRoot(files).stores()]


def open_store(where: str | os.PathLike[str] | None = None, name: str = "") -> Store:
    """Open a store to read from it.

    `open_store("stores/gradient-3f2a…")`, or by its root and how its name begins: `open_store("stores", "gradient")`.

    Args:
        where: path or URL of the store or of its root; None: the root of a run file that names no store.
        name: how the store's name begins, its kind for one; not needed where the root has a single store.

    Raises:
        ConfigError: no store of the root is meant, or several are; the text lists them.
        MismatchError: a newer DataFlex wrote it.
        CorruptionError: its recipe is damaged.
    """
    path = None if where is None else os.fspath(where)
    if path is not None and not name and NAME.fullmatch(path.rstrip("/").rpartition("/")[2]):
        return Store(open_by_path(path))
    found = list_stores(path)
    matching = [store for store in found if store.name.startswith(name)]
    if len(matching) != 1:
        what = f"{len(matching)} stores" if matching else "no store"
        called = f" whose name begins with {name!r}" if name else ""
        names = ", ".join(store.name for store in found) or "none"
        raise ConfigError(f"{store_root(path)}: found {what}{called}; expected one of: {names}")
    return matching[0]


class Store:
    """A store, read as tables; got from `dataflex.open_store`, `dataflex.list_stores` or `RunResults.stores`.

    Every table has `row_key` and `status` (`ok`; `no_labels`, `nonfinite`: there is no value; `missing`: not in the
    store), then a column for each scalar of the feature and, of a feature that has them, `vector`, decoded to float32.
    Where the status is not `ok`, Arrow has null and NumPy NaN, or 0 in columns of whole numbers.

    Rows are named by row key: 16 bytes each, as a list, an array of `dataflex.rows.KEY_DTYPE`, or a `row_key` column of
    a run's tables (Arrow or pandas). They come in that order and multiplicity; without `rows`, each once, as they lie
    in the store.
    """

    def __init__(self, store: ParquetStore):
        self._store = store

    def __repr__(self) -> str:
        vector = f", vectors of {self.width}" if self.width else ""
        return f"Store({self.name!r}: {len(self)} rows, {', '.join(self.columns)}{vector})"

    def __len__(self) -> int:
        return self._store.rows

    @property
    def name(self) -> str:
        """Kind and digest of the recipe; the folder's name."""
        return self._store.folder

    @property
    def kind(self) -> str:
        """Which feature it has: `loss`, `embedding`, `gradient` or another."""
        return self._store.kind

    @property
    def path(self) -> str:
        """Where it lies."""
        return self._store.path

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Everything but the row that the values depend on."""
        return self._store.recipe

    @property
    def columns(self) -> list[str]:
        """Names of the scalar columns."""
        return list(self._store.layout.scalars)

    @property
    def width(self) -> int:
        """D, numbers of a vector; 0 where there are none."""
        return self._store.layout.width

    @property
    def nbytes(self) -> int:
        """Size of the committed data files."""
        return self._store.bytes

    def has(self, rows: Any) -> np.ndarray:
        """Say for each of R rows whether the store has it, (R,) bool."""
        keys, is_named = _keys(rows)
        found = np.zeros(len(keys), bool)
        found[is_named] = self._store.contains(keys[is_named])
        return found

    def to_numpy(
        self,
        rows: Any = None,
        columns: Sequence[str] | None = None,
        vectors: bool = True,
        missing: Literal["error", "nan"] = "error",
    ) -> dict[str, np.ndarray]:
        """Return columns by name: `row_key` (R,), `status` (R,) text, scalars (R,), `vector` (R, D) float32.

        Args:
            rows: R row keys; None: all of the store.
            columns: scalar columns wanted; None: all.
            vectors: whether vectors are wanted.
            missing: `error`, or `nan`: rows that the store lacks have the status `missing`, and all scalars that are no
                floating-point numbers become float64, so that they can be NaN.

        Raises:
            CoverageError: rows are not in the store, or have no key because the run dropped them.
            MismatchError: there is no such column.
            CorruptionError: a data file is missing or damaged.
        """
        if missing not in ("error", "nan"):
            raise ConfigError(f"missing: found {missing!r}; expected error or nan")
        values, is_there = self._read(rows, columns, vectors, missing)
        is_ok = is_there & (values.status == Status.OK)
        found = {"row_key": values.keys, "status": _STATUS[np.where(is_there, values.status, _ABSENT)]}
        for name, column in values.scalars.items():
            if column.dtype.kind == "f" or missing == "nan":
                column = column.astype(column.dtype if column.dtype.kind == "f" else np.float64)
                column[~is_ok] = np.nan
            found[name] = column
        if values.vectors is not None:
            values.vectors[~is_ok] = np.nan
            found["vector"] = values.vectors
        return found

    def to_arrow(
        self,
        rows: Any = None,
        columns: Sequence[str] | None = None,
        vectors: bool = True,
        missing: Literal["error", "nan"] = "error",
    ) -> pa.Table:
        """Return a table; vectors are lists of D float32. The arguments are those of `to_numpy`."""
        values, is_there = self._read(rows, columns, vectors, missing)
        return _table(values, is_there)

    def to_pandas(
        self,
        rows: Any = None,
        columns: Sequence[str] | None = None,
        vectors: bool = False,
        missing: Literal["error", "nan"] = "error",
    ) -> pd.DataFrame:
        """Return a data frame, without vectors unless they are asked for: pandas keeps each as an object.

        The arguments are those of `to_numpy`.
        """
        return self.to_arrow(rows, columns, vectors, missing).to_pandas()

    def batches(
        self, size: int = 4096, columns: Sequence[str] | None = None, vectors: bool = True
    ) -> Iterator[pa.Table]:
        """Yield the tables of `to_arrow` of all rows, `size` rows at a time: memory is bounded by that.

        Raises:
            ConfigError: `size` is not positive.
        """
        if size < 1:
            raise ConfigError(f"size: found {size}; expected the rows of a table, at least 1")
        for values in self._store.scan(size, columns, vectors):
            yield _table(values, np.ones(len(values), bool))

    def _read(self, rows: Any, columns: Sequence[str] | None, vectors: bool, missing: str) -> tuple[Values, np.ndarray]:
        """Return the values of rows, zeros for those that are not there, and which are, (R,) bool."""
        if rows is None:
            parts = [block.keys for block in self._store.scan(columns=(), vectors=False)]
            rows = np.concatenate([np.empty(0, KEY_DTYPE), *parts])
        keys, is_named = _keys(rows)
        if missing == "error":
            if unnamed := int((~is_named).sum()):
                raise CoverageError(
                    f"rows: found {unnamed} of {len(keys)} without a row key, as records have that the run dropped; "
                    "expected keys alone: leave them out, or pass missing='nan'"
                )
            return self._store.read(keys, columns, vectors), is_named
        is_there = is_named.copy()
        is_there[is_named] = self._store.contains(keys[is_named])
        some = self._store.read(keys[is_there], columns, vectors)
        return _spread(some, keys, is_there), is_there


def _keys(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return row keys (R,) of `KEY_DTYPE`, zeros where one is null, and which are not, (R,) bool."""
    if isinstance(rows, np.ndarray) and rows.dtype == KEY_DTYPE:
        return np.ascontiguousarray(rows).reshape(-1), np.ones(rows.size, bool)
    if isinstance(rows, pa.Array | pa.ChunkedArray):
        rows = rows.to_pylist()
    given, void = list(rows), bytes(KEY_DTYPE.itemsize)
    keys, is_named = [], np.array([not _is_null(key) for key in given], bool)
    for key in given:
        found = key.tobytes() if isinstance(key, np.void) else void if _is_null(key) else key
        if not isinstance(found, bytes) or len(found) != len(void):
            raise ConfigError(f"rows: found {str(key)[:40]!r} ({type(key).__name__}); expected row keys of 16 bytes")
        keys.append(found)
    return np.frombuffer(b"".join(keys), KEY_DTYPE), is_named


def _is_null(key: Any) -> bool:
    """Say whether a key is null: pandas has NaN, or its own NA, in the place of None."""
    return key is None or isinstance(key, float) or type(key).__name__ == "NAType"


def _spread(some: Values, keys: np.ndarray, at: np.ndarray) -> Values:
    """Return the values of some of R rows as those of all, zeros where there are none."""

    def whole(part: np.ndarray) -> np.ndarray:
        found = np.zeros((len(keys), *part.shape[1:]), part.dtype)
        found[at] = part
        return found

    scalars = {name: whole(column) for name, column in some.scalars.items()}
    return Values(keys, whole(some.status), scalars, None if some.vectors is None else whole(some.vectors))


def _table(values: Values, is_there: np.ndarray) -> pa.Table:
    """Return values as a table, null where there are none."""
    is_void = ~(is_there & (values.status == Status.OK))
    status = pa.array(np.where(is_there, values.status, _ABSENT), pa.int8())
    columns = {
        "row_key": key_column(np.ascontiguousarray(values.keys)),
        "status": pa.DictionaryArray.from_arrays(status, pa.array(_STATUS.tolist(), pa.string())),
        **{name: pa.array(column, mask=is_void) for name, column in values.scalars.items()},
    }
    if values.vectors is not None:
        width = values.vectors.shape[1]
        flat = pa.array(np.ascontiguousarray(values.vectors).reshape(-1), pa.float32())
        columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(is_void))
    return pa.table(columns)
