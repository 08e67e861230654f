"""What a store of feature values holds.

R rows, D numbers per stored vector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataflex.errors import DataflexError, MismatchError
from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.rounding import STORAGES

SCALAR_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")
RESERVED = ("row_key", "status", "scale", "vector")


@dataclass(frozen=True)
class Layout:
    """Columns of a store.

    Attributes:
        scalars: column name -> NumPy dtype name, one of `SCALAR_DTYPES`.
        width: D; 0 for a feature without vectors.
        storage: type that vectors are rounded to, one of `dataflex.stores.rounding.STORAGES`.

    Raises:
        MismatchError: a name or type is none that a store can hold.
    """

    scalars: Mapping[str, str] = field(default_factory=dict)
    width: int = 0
    storage: str = "float32"

    def __post_init__(self) -> None:
        # Sorted: two layouts with the same columns are equal and give the same bytes. `object`'s, as we are frozen.
        object.__setattr__(self, "scalars", dict(sorted(self.scalars.items())))
        for name, dtype in self.scalars.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name) or name in RESERVED:
                raise MismatchError(f"a store cannot have a column {name!r}: use letters, digits and _, not {RESERVED}")
            if dtype not in SCALAR_DTYPES:
                raise MismatchError(f"column {name} cannot be {dtype!r}: use one of {', '.join(SCALAR_DTYPES)}")
        if self.storage not in STORAGES or not isinstance(self.width, int) or self.width < 0:
            raise MismatchError(
                f"vectors cannot be kept as {self.width!r} × {self.storage!r}: use a width of 0 or more and one of "
                f"{', '.join(STORAGES)}"
            )

    def plain(self) -> dict[str, Any]:
        """Return the layout as plain data for JSON."""
        return {"scalars": dict(self.scalars), "width": self.width, "storage": self.storage}


@dataclass(frozen=True)
class Values:
    """Values of one feature for R rows.

    Attributes:
        keys: (R,) of `dataflex.rows.KEY_DTYPE`.
        status: (R,) uint8 of `dataflex.rows.Status`; where it is not OK a store keeps zeros.
        scalars: column name -> (R,).
        vectors: (R, D) float32, or None where there are none or none were asked for.
    """

    keys: np.ndarray
    status: np.ndarray
    scalars: Mapping[str, np.ndarray]
    vectors: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def check(self, layout: Layout) -> None:
        """Refuse values that a store of this layout cannot hold.

        Raises:
            MismatchError: a column is missing, unknown, or of another type or shape than the layout says.
            DataflexError: a row whose status is OK holds NaN or infinity.
        """
        wanted: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "row_key": (KEY_DTYPE, ()),
            "status": (np.dtype(np.uint8), ()),
        }
        wanted |= {name: (np.dtype(dtype), ()) for name, dtype in layout.scalars.items()}
        found = {"row_key": self.keys, "status": self.status, **self.scalars}
        if layout.width:
            wanted["vector"] = (np.dtype(np.float32), (layout.width,))
        if self.vectors is not None:
            found["vector"] = self.vectors
        if wanted.keys() != found.keys():
            raise MismatchError(f"values have columns {sorted(found)}, the store has {sorted(wanted)}")
        for name, (dtype, tail) in wanted.items():
            column = found[name]
            if column.dtype != dtype or column.shape != (len(self), *tail):
                raise MismatchError(
                    f"column {name} is {column.dtype}{list(column.shape)}, the store takes {dtype}{[len(self), *tail]}"
                )
        usable = self.status == Status.OK
        for name, column in found.items():
            if column.dtype.kind != "f":
                continue
            finite = np.asarray(np.isfinite(column).all(axis=tuple(range(1, column.ndim))))
            if not finite[usable].all():
                row = int(np.flatnonzero(usable & ~finite)[0])
                raise DataflexError(
                    f"column {name} of row {row} (key {self.keys[row].tobytes().hex()}) is not finite although its "
                    f"status is OK; such a row needs status {Status.NONFINITE.name}"
                )
