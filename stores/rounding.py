"""Rounding of vectors to the type that a store keeps. R rows, D numbers each, C items of a row's codes.

All but float32 carry one float32 `scale` per row, so that none can overflow and a gradient of norm 1e-6 loses no more
than one of norm 1:

- float16, int8, int4: the scale is the row's largest magnitude. A number is its code × scale, divided by 127 for int8
  (codes -127 to 127), by 7 for int4 (codes -7 to 7).
- int1: the scale is the row's mean magnitude, and a number is scale or -scale, by its sign; a zero counts as positive.
  Of all vectors of these signs that is the nearest in least squares, so what is lost is orthogonal to what is kept:
  of rows whose numbers are spread alike, inner products with, and distances to, a vector that was not rounded keep
  their order. Of normally spread numbers 2/π of an inner product and sqrt(2/π) of a cosine is left.

int4 and int1 are packed from the low bits of a byte to its high ones: number 2i of a row is the low half of byte i, as
two's complement, and 2i + 1 the high half; of int1, number 8i + j is bit j of byte i, set where it is negative. Bits
past the last number are zero, and so are all bits of a row of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

_NUMBERS = 1 << 16  # rounded at a time: 256 KiB of float32, which stay in the processor's cache


@dataclass(frozen=True)
class Storage:
    """How a storage type keeps numbers.

    Attributes:
        dtype: of an item in a data file.
        most: the code of a number as large as the scale.
        together: numbers in an item.
    """

    dtype: np.dtype[Any]
    most: int = 1
    together: int = 1

    def items(self, width: int) -> int:
        """Return C of rows of D numbers."""
        return -(-width // self.together)

    def bytes(self, width: int) -> int:
        """Return the bytes of a row's codes."""
        return self.items(width) * self.dtype.itemsize


STORAGES = {
    "float32": Storage(np.dtype("<f4")),
    "float16": Storage(np.dtype("<f2")),
    "int8": Storage(np.dtype("i1"), most=127),  # not 128, which int8 has on its negative side only
    "int4": Storage(np.dtype("u1"), most=7, together=2),
    "int1": Storage(np.dtype("u1"), together=8),
}

_BYTES = np.arange(256, dtype=np.uint8)[:, None]
_CODES = {  # byte -> the codes in it
    2: ((_BYTES >> np.array([0, 4], np.uint8) & 15) ^ 8).astype(np.float32) - 8,
    8: 1 - 2 * np.unpackbits(_BYTES, axis=1, bitorder="little").astype(np.float32),
}


def encode(vectors: np.ndarray, storage: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return codes (R, C) and scale (R,) float32, None for float32, of finite (R, D) float32 vectors."""
    kind = STORAGES[storage]
    if storage == "float32":
        return np.ascontiguousarray(vectors, dtype=np.float32), None
    if storage == "int1":
        return np.packbits(vectors < 0, axis=1, bitorder="little"), _mean_magnitude(vectors)
    scale = np.maximum(vectors.max(axis=1), -vectors.min(axis=1))  # `abs` would make a copy of all R x D numbers
    codes = np.empty((len(vectors), kind.items(vectors.shape[1])), kind.dtype)
    for rows in _parts(len(vectors), vectors.shape[1]):
        part, by = vectors[rows], scale[rows, None]
        unit = np.divide(part, by, out=np.zeros_like(part), where=by > 0)
        if kind.most > 1:
            np.rint(np.multiply(unit, np.float32(kind.most), out=unit), out=unit)
        codes[rows] = _halves(unit.astype(np.int8)) if storage == "int4" else unit.astype(kind.dtype)
    return codes, scale


def factor(scale: np.ndarray | None, storage: str) -> np.ndarray | None:
    """Return the (R,) float32 that codes are multiplied by, or None where they are the values."""
    return None if scale is None else scale / np.float32(STORAGES[storage].most)


def decode(codes: np.ndarray, scale: np.ndarray | None, storage: str, width: int) -> np.ndarray:
    """Return (R, D) float32 vectors."""
    out = np.empty((len(codes), width), np.float32)
    by = factor(scale, storage)
    if by is None:
        np.copyto(out, codes)
        return out
    together = STORAGES[storage].together
    for rows in _parts(len(codes), width):
        part = codes[rows] if together == 1 else _apart(codes[rows], together, width)
        np.multiply(part, by[rows, None], out=out[rows])
    return out


def unpacked(codes: np.ndarray, storage: str, width: int) -> np.ndarray:
    """Return codes a number each, (R, D): decoded vectors but for the `factor` of each row. Packed ones as float32."""
    together = STORAGES[storage].together
    if together == 1:
        return codes
    out = np.empty((len(codes), width), np.float32)
    for rows in _parts(len(codes), width):
        out[rows] = _apart(codes[rows], together, width)
    return out


def _apart(codes: np.ndarray, together: int, width: int) -> np.ndarray:
    """Return the numbers of packed codes; NumPy makes eight bytes of each byte for that, so only of some at a time."""
    return np.take(_CODES[together], codes, axis=0).reshape(len(codes), -1)[:, :width]


def _mean_magnitude(vectors: np.ndarray) -> np.ndarray:
    scale = np.empty(len(vectors), np.float32)
    for rows in _parts(*vectors.shape):
        # A copy in float64, so that a row's sum does not depend on how NumPy buffers a conversion: rows have names by
        # the bytes that they become.
        scale[rows] = np.abs(vectors[rows]).astype(np.float64).mean(axis=1)
    return scale


def _halves(codes: np.ndarray) -> np.ndarray:
    """Return codes (R, D) int8 of -8 to 7, two to a byte, (R, C) uint8."""
    found = np.bitwise_and(codes[:, ::2], 15).view(np.uint8)
    found[:, : codes.shape[1] // 2] |= codes[:, 1::2].astype(np.uint8) << 4
    return found


def _parts(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _NUMBERS // width)
    return (slice(start, start + step) for start in range(0, rows, step))
