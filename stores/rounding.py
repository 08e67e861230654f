"""Rounding of vectors to the type that a store keeps. R rows, D numbers each.

float16 and int8 carry one float32 `scale` per row, the largest magnitude in it, so that neither can overflow and a
gradient of norm 1e-6 loses no more than one of norm 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

STORAGES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "int8": np.dtype("i1")}


def encode(vectors: np.ndarray, storage: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return codes (R, D) and scale (R,) float32, None for float32, of finite (R, D) float32 vectors."""
    if storage == "float32":
        return np.ascontiguousarray(vectors, dtype=np.float32), None
    scale = np.maximum(vectors.max(axis=1), -vectors.min(axis=1))  # `abs` would make a copy of all R x D numbers
    unit = np.divide(vectors, scale[:, None], out=np.zeros_like(vectors), where=scale[:, None] > 0)
    if storage == "int8":  # 127, not 128, which int8 has on its negative side only
        np.rint(np.multiply(unit, np.float32(127), out=unit), out=unit)
    return unit.astype(STORAGES[storage]), scale


def factor(scale: np.ndarray | None, storage: str) -> np.ndarray | None:
    """Return the (R,) float32 that codes are multiplied by, or None where they are the values."""
    return None if scale is None else scale / np.float32(127 if storage == "int8" else 1)


def decode(codes: np.ndarray, scale: np.ndarray | None, storage: str) -> np.ndarray:
    """Return (R, D) float32 vectors."""
    out = np.empty(codes.shape, np.float32)
    by = factor(scale, storage)
    if by is None:
        np.copyto(out, codes)
    else:
        np.multiply(codes, by[:, None], out=out)
    return out
