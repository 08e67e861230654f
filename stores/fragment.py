"""One data file: the values of one fragment as Parquet. R rows, D numbers per vector.

Vectors are fixed-size binary, which reads at 5.5 GB/s per core where a list of floats reads at 0.5 (pyarrow 26, hot
cache); scalars are ordinary columns that any Parquet reader prunes. Nothing is compressed or dictionary-coded, so that
a file cannot declare more data than it has bytes, and every page carries a CRC that is checked when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataflex.errors import CorruptionError, MismatchError
from dataflex.fingerprint import canonical
from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.encoded import Encoded
from dataflex.stores.files import Files
from dataflex.stores.rounding import STORAGES, encode
from dataflex.stores.values import Layout, Values

_GROUP_ROWS, _GROUP_BYTES = 4096, 64 << 20  # a reader holds one row group at a time, so this bounds its memory
_PAGE_BYTES = 2 * _GROUP_BYTES  # one page for each column of a row group: its values lie one after another
FORMAT = 1
"""Version of data files. Raise it when an older DataFlex could misread the new ones."""


def schema(layout: Layout) -> pa.Schema:
    """Return the one schema that data files of a layout have."""
    columns: dict[str, pa.DataType] = {"row_key": pa.binary(KEY_DTYPE.itemsize), "status": pa.uint8()}
    columns |= {name: pa.from_numpy_dtype(np.dtype(dtype)) for name, dtype in layout.scalars.items()}
    if layout.width:
        if layout.storage != "float32":
            columns["scale"] = pa.float32()
        columns["vector"] = pa.binary(STORAGES[layout.storage].bytes(layout.width))
    return pa.schema([pa.field(name, dtype, nullable=False) for name, dtype in columns.items()])


def serialise(layout: Layout, values: Values) -> pa.Buffer:
    """Return the bytes of a data file; equal values have equal bytes. Rows that are not OK become zeros."""
    fields = schema(layout)
    sink = pa.BufferOutputStream()
    # A byte for each number, at least: of fewer a group would be many times its bytes once it is decoded.
    row_bytes = max(1, layout.width, STORAGES[layout.storage].bytes(layout.width))
    group_rows = max(1, min(_GROUP_ROWS, _GROUP_BYTES // row_bytes))
    with pq.ParquetWriter(
        sink,
        fields,
        compression="NONE",
        use_dictionary=False,
        write_statistics=["status", *layout.scalars],  # smallest and largest key or vector would prune nothing
        data_page_size=_PAGE_BYTES,
        write_page_checksum=True,
        store_schema=False,  # pyarrow's copy of the schema could name extension types; `_check` takes our metadata only
    ) as writer:
        for start in range(0, len(values), group_rows):
            part = slice(start, start + group_rows)
            writer.write_table(_table(layout, fields, values, part), row_group_size=group_rows)
        writer.add_key_value_metadata(_metadata(layout))
    return sink.getvalue()


def _table(layout: Layout, fields: pa.Schema, values: Values, part: slice) -> pa.Table:
    # Zeros, whatever a failed computation left: equal values then give equal bytes, and `encode` wants finite numbers.
    unusable = values.status[part] != Status.OK
    columns = {"row_key": _binary(values.keys[part]), "status": pa.array(values.status[part])}
    for name in layout.scalars:
        columns[name] = pa.array(np.where(unusable, values.scalars[name].dtype.type(0), values.scalars[name][part]))
    if values.vectors is not None:
        vectors = values.vectors[part]
        if unusable.any():
            vectors = np.where(unusable[:, None], np.float32(0), vectors)
        codes, scale = encode(vectors, layout.storage)
        columns["vector"] = _binary(codes)
        if scale is not None:
            columns["scale"] = pa.array(scale)
    return pa.table([columns[name] for name in fields.names], schema=fields)


def _binary(rows: np.ndarray) -> pa.Array:
    """View (R,) or (R, D) of fixed-size items as R binary values, without a copy."""
    rows = np.ascontiguousarray(rows)
    width = rows.dtype.itemsize * (rows.shape[1] if rows.ndim == 2 else 1)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows.view(np.uint8))])


def _metadata(layout: Layout) -> dict[str, str]:
    return {"dataflex.format": str(FORMAT), "dataflex.layout": canonical(layout.plain()).decode()}


class Fragment:
    """A data file opened for reading.

    Args:
        files: where it lies.
        path: its path there.
        layout: what it must hold.

    Raises:
        CorruptionError: the file is missing, is no Parquet file, or holds other columns than the layout has.
        MismatchError: a newer DataFlex wrote it.
    """

    def __init__(self, files: Files, path: str, layout: Layout):
        self.name = files.name(path)
        self.layout = layout
        with self._reading():
            self._source = files.open(path)
        with self._reading():
            self._file = pq.ParquetFile(self._source, page_checksum_verification=True)
            self._check(self._file.metadata, self._file.schema_arrow, self._source.size())
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self.starts = np.cumsum([0, *groups])
        """(G + 1,) first row of each row group, and the number of rows."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._source.close()

    def __enter__(self) -> Fragment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def keys(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the row keys, (R,), and the statuses, (R,) uint8; vectors are not touched."""
        with self._reading():
            table = self._file.read(["row_key", "status"], use_threads=False)
            return _array(table.column("row_key"), KEY_DTYPE), table.column("status").to_numpy()

    def group(self, index: int, columns: Sequence[str], vectors: bool) -> Encoded:
        """Return one row group: key, status, and the scalar columns and vectors asked for."""
        names = ["row_key", "status", *columns]
        if vectors and self.layout.width:
            names += ["vector"] if self.layout.storage == "float32" else ["scale", "vector"]
        with self._reading():
            table = self._file.read_row_group(index, columns=names, use_threads=False)
        found = {name: table.column(name) for name in names}
        codes = None
        if "vector" in found:
            storage, width = STORAGES[self.layout.storage], self.layout.width
            # A void item per row, viewed as numbers: the vectors are used where pyarrow read them to, without a copy.
            codes = _array(found["vector"], np.dtype((np.void, storage.bytes(width))))
            codes = codes.view(storage.dtype).reshape(-1, storage.items(width))
        return Encoded(
            keys=_array(found["row_key"], KEY_DTYPE),
            status=found["status"].to_numpy(),
            scalars={name: found[name].to_numpy() for name in columns},
            codes=codes,
            scale=found["scale"].to_numpy() if "scale" in found else None,
        )

    def _check(self, metadata: pq.FileMetaData, found: pa.Schema, size: int) -> None:
        """Refuse every file but those that `serialise` writes, before any page of it is read."""
        written = {k.decode(errors="replace"): v.decode(errors="replace") for k, v in (metadata.metadata or {}).items()}
        version = written.get("dataflex.format", "")
        if version.isdecimal() and int(version) > FORMAT:
            raise MismatchError(
                f"{self.name} has format {version}; this DataFlex reads up to {FORMAT}; read it with a newer DataFlex"
            )
        if written != _metadata(self.layout) or not found.remove_metadata().equals(schema(self.layout)):
            raise CorruptionError(
                f"{self.name} is not a data file of this store: it holds {_described(found)} "
                f"({written.get('dataflex.layout', 'no layout')[:500]}), expected {_described(schema(self.layout))} "
                f"({canonical(self.layout.plain()).decode()})"
            )
        for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
            chunks = [group.column(i) for i in range(group.num_columns)]
            plain = all(c.compression == "UNCOMPRESSED" and not c.has_dictionary_page for c in chunks)
            if not plain or group.total_byte_size > size or group.num_rows > size:
                raise CorruptionError(
                    f"{self.name} declares compressed columns or more data than its {size} bytes hold"
                )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise CorruptionError(f"{self.name} is missing although it was committed") from error
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None):  # the file system's own complaint, not a wrong byte
                raise
            raise CorruptionError(f"{self.name} is damaged: {str(error)[:300]}") from error


def _described(fields: pa.Schema) -> str:
    return ", ".join(str(field) for field in fields)[:1000]


def _array(column: pa.ChunkedArray, dtype: np.dtype[Any]) -> np.ndarray:
    """View a column of fixed-size binary values as (R,) items."""
    chunks = [np.frombuffer(c.buffers()[1], dtype, len(c), c.offset * dtype.itemsize) for c in column.chunks if len(c)]
    if len(chunks) == 1:
        return chunks[0]
    return np.concatenate(chunks) if chunks else np.empty(0, dtype)
