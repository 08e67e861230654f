"""Where a data file holds the values of each column, and digests of their parts.

To everybody else a data file is Parquet. Its values are plain, though: uncompressed, of fixed size, none missing, one
page for each column of a row group, so that they lie one after another in it. With their place and the digest of every
16 KiB of them in the log, a reader takes the parts that it needs and believes them without parsing or hashing the rest.

The log says it as text, a line for each column of each row group, in the order of the file:

    <column> <rows> <offset of the first value, in bytes> <digests of the parts, in base64>

R rows, D numbers per vector, C items of its codes.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataflex.errors import CorruptionError, DataflexError
from dataflex.rows import KEY_DTYPE
from dataflex.stores.rounding import STORAGES
from dataflex.stores.values import Layout

_PART_BYTES = 16 << 10
_DIGEST_BYTES = 16  # of SHA-256: 128 bits

Span = tuple[int, int]
"""Parts of a column of a row group: the first, and the one after the last."""


@dataclass(frozen=True)
class Column:
    """How the values of a column lie in a data file, as Parquet's plain encoding has them.

    Attributes:
        dtype: of a value, or of one item of a vector's codes.
        items: C of a vector, 0 of a scalar.
    """

    dtype: np.dtype[Any]
    items: int = 0

    @cached_property
    def bits(self) -> int:
        """Bits of a value in the file."""
        return 1 if self.dtype.kind == "b" else 8 * self._stored.itemsize * max(1, self.items)

    @cached_property
    def part_rows(self) -> int:
        """Rows of a part: 16 KiB of values, or one value that is larger."""
        return max(1, 8 * _PART_BYTES // self.bits)

    def size(self, rows: int) -> int:
        """Return the bytes of so many values."""
        return -(-rows * self.bits // 8)

    def packed(self, values: np.ndarray) -> np.ndarray:
        """Return the bytes (n,) uint8 of values (R,) or (R, C)."""
        if self.dtype.kind == "b":
            return np.packbits(values, bitorder="little")
        return np.ascontiguousarray(values, self._stored).reshape(-1).view(np.uint8)

    def values(self, packed: bytes, rows: int) -> np.ndarray:
        """Return values (R,), or (R, C) where a value is a vector, of their bytes."""
        if self.dtype.kind == "b":
            return np.unpackbits(np.frombuffer(packed, np.uint8), count=rows, bitorder="little").astype(bool)
        found = np.frombuffer(packed, self._stored)
        return found.reshape(rows, self.items) if self.items else found.astype(self.dtype, copy=False)

    @cached_property
    def _stored(self) -> np.dtype[Any]:
        """Parquet has no integers of fewer than four bytes."""
        is_small = self.dtype.kind in "iu" and self.dtype.itemsize < 4 and not self.items
        return np.dtype(f"<{self.dtype.kind}4") if is_small else self.dtype


@dataclass(frozen=True)
class Chunk:
    """The values of one column in one row group.

    Attributes:
        column: how they lie there.
        rows: of the row group.
        offset: of the first, in bytes from the beginning of the file.
        digests: of the parts, one after another.
    """

    column: Column
    rows: int
    offset: int
    digests: bytes

    @property
    def whole(self) -> Span:
        """All parts."""
        return 0, -(-self.rows // self.column.part_rows)

    def spans(self, rows: np.ndarray) -> list[Span]:
        """Return the parts that hold rows (r,) of the row group, sorted; those that adjoin together."""
        parts = rows // self.column.part_rows
        breaks = np.flatnonzero(np.diff(parts) > 1)
        first, last = parts[[0, *(breaks + 1)]], parts[[*breaks, -1]]
        return list(zip(first.tolist(), (last + 1).tolist(), strict=True))

    def extent(self, span: Span) -> tuple[int, int]:
        """Return where some parts begin and end, in bytes from the beginning of the file."""
        first, end = (self.column.size(min(part * self.column.part_rows, self.rows)) for part in span)
        return self.offset + first, self.offset + end

    def wrong(self, span: Span, data: bytes) -> list[Span]:
        """Return which of some parts these bytes do not hold, those that adjoin together; none: all are right."""
        size, view = self.column.size(self.column.part_rows), memoryview(data)
        found: list[Span] = []
        for number, part in enumerate(range(*span)):
            expected = self.digests[part * _DIGEST_BYTES : (part + 1) * _DIGEST_BYTES]
            if _digest(view[number * size : (number + 1) * size]) == expected:
                continue
            if found and found[-1][1] == part:
                found[-1] = found[-1][0], part + 1
            else:
                found.append((part, part + 1))
        return found

    def take(self, rows: np.ndarray, spans: Sequence[Span], data: Sequence[bytes]) -> np.ndarray:
        """Return the values of rows (r,) of the row group, sorted, given the bytes of the parts that hold them."""
        size = self.column.part_rows
        bounds = [(first * size, min(end * size, self.rows)) for first, end in spans]
        arrays = [self.column.values(part, end - first) for part, (first, end) in zip(data, bounds, strict=True)]
        if len(arrays) == 1:
            at = rows - bounds[0][0]
            is_whole = len(at) == len(arrays[0]) and bool((np.diff(at) == 1).all())
            return arrays[0] if is_whole else arrays[0][at]  # all of them, once each: no copy
        cuts = [0, *np.searchsorted(rows, [first for first, _ in bounds[1:]]).tolist(), len(rows)]
        asked = zip(arrays, itertools.pairwise(cuts), bounds, strict=True)
        return np.concatenate([array[rows[start:stop] - first] for array, (start, stop), (first, _) in asked])


@dataclass(frozen=True)
class Contents:
    """What the log says of the inside of one data file.

    Attributes:
        groups: the row groups; of each, its columns by name.
    """

    groups: Sequence[Mapping[str, Chunk]]

    @property
    def starts(self) -> np.ndarray:
        """(G + 1,) first row of each row group, and the number of rows."""
        return np.cumsum([0, *(group["row_key"].rows for group in self.groups)])

    def text(self) -> str:
        """Return it as the log has it."""
        lines = [
            f"{name} {chunk.rows} {chunk.offset} {base64.b64encode(chunk.digests).decode()}"
            for group in self.groups
            for name, chunk in group.items()
        ]
        return "\n".join(lines)


def columns_of(layout: Layout) -> dict[str, Column]:
    """Return the columns of a store's data files, in their order."""
    found = {"row_key": Column(KEY_DTYPE), "status": Column(np.dtype(np.uint8))}
    found |= {name: Column(np.dtype(dtype)) for name, dtype in layout.scalars.items()}
    if layout.width:
        if layout.storage != "float32":
            found["scale"] = Column(np.dtype("<f4"))
        storage = STORAGES[layout.storage]
        found["vector"] = Column(storage.dtype, storage.items(layout.width))
    return found


def contents_of(layout: Layout, data: pa.Buffer) -> Contents:
    """Find the values in a data file that was just written.

    Raises:
        DataflexError: pyarrow laid them out in another way than Parquet's plain encoding of fixed-size values.
    """
    file = pq.ParquetFile(pa.BufferReader(data))
    raw, groups = np.frombuffer(data, np.uint8), []
    for number in range(file.num_row_groups):
        about = file.metadata.row_group(number)
        table = file.read_row_group(number, use_threads=False)
        group = {}
        for index, (name, column) in enumerate(columns_of(layout).items()):
            chunk, values = about.column(index), column.packed(_values(table.column(name), column))
            # The header of the page lies before its values, and they end where it ends.
            offset = chunk.data_page_offset + chunk.total_compressed_size - len(values)
            if not np.array_equal(raw[offset : offset + len(values)], values):
                raise DataflexError(
                    f"pyarrow {pa.__version__} writes column {name} in another way than DataFlex reads it; install one "
                    "of the versions of constraints.txt"
                )
            group[name] = Chunk(column, about.num_rows, offset, _digests(column, values))
        groups.append(group)
    return Contents(groups)


def parse(text: str, columns: Mapping[str, Column], rows: int, size: int, where: str) -> Contents:
    """Return what the log says of a data file of so many rows and bytes, and of the columns of `columns_of`.

    Raises:
        CorruptionError: it says what cannot be.
    """
    lines = text.split("\n")
    groups = []
    try:
        for start in range(0, len(lines), len(columns)):
            group = {}
            for (name, column), line in zip(columns.items(), lines[start : start + len(columns)], strict=True):
                said, count, offset, digests = line.split(" ")
                chunk = Chunk(column, int(count), int(offset), base64.b64decode(digests, validate=True))
                end = chunk.offset + column.size(chunk.rows)
                fits = chunk.rows > 0 and 0 <= chunk.offset and end <= size
                if said != name or not fits or len(chunk.digests) != chunk.whole[1] * _DIGEST_BYTES:
                    raise ValueError(line[:100])
                group[name] = chunk
            if len({chunk.rows for chunk in group.values()}) != 1:
                raise ValueError("columns of different length")
            groups.append(group)
    except ValueError as error:  # a `binascii.Error` is one
        raise CorruptionError(f"{where} is damaged: it says of its data file what cannot be ({error})") from error
    found = Contents(groups)
    if found.starts[-1] != rows:
        raise CorruptionError(f"{where} is damaged: {rows} rows, of which its data file would have {found.starts[-1]}")
    return found


def _values(column: pa.ChunkedArray, kind: Column) -> np.ndarray:
    if not pa.types.is_fixed_size_binary(column.type):
        found: np.ndarray = column.to_numpy()
        return found
    chunk = column.combine_chunks()
    width = column.type.byte_width
    return np.frombuffer(chunk.buffers()[1], kind.dtype, len(chunk) * max(1, kind.items), chunk.offset * width)


def _digests(column: Column, values: np.ndarray) -> bytes:
    size = column.size(column.part_rows)
    return b"".join(_digest(values[start : start + size].data) for start in range(0, len(values), size))


def _digest(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]
