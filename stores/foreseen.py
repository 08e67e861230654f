"""What a store will take on disk, before there is one. R rows, D numbers per vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.contents import contents_of
from dataflex.stores.fragment import serialise
from dataflex.stores.log import Entry
from dataflex.stores.record import seal
from dataflex.stores.root import libraries
from dataflex.stores.values import Layout, Values

_CHUNK, _SUM = 16 << 10, 23
"""Bytes of values that have a digest of their own in a log entry, and the bytes that this takes there."""


class FileSizes:
    """Sizes of the files of a store.

    Args:
        layout: of the store.
    """

    def __init__(self, layout: Layout):
        self._one, self._two = (serialise(layout, _zeros(layout, rows)) for rows in (1, 2))
        self._contents = contents_of(layout, self._one).text()

    def fragment(self, rows: int) -> int:
        """Return the bytes of a data file of R rows and of its log entry, to some bytes in a thousand."""
        data = self._one.size + (rows - 1) * (self._two.size - self._one.size)
        digest = "0" * 64
        status = {status.name.lower(): rows for status in Status}
        entry = Entry(f"g{rows}-{digest[:32]}", digest, data, rows, digest[:32], status, digest[:32], self._contents)
        body, version = entry.document
        return int(data + len(seal(body, version)) + data // _CHUNK * _SUM)


def recipe_bytes(kind: str, recipe: Mapping[str, Any], layout: Layout) -> int:
    """Return the bytes of the document that a new store begins with."""
    return len(seal({"kind": kind, "recipe": recipe, "layout": layout.plain(), "libraries": libraries()}))


def _zeros(layout: Layout, rows: int) -> Values:
    scalars = {name: np.zeros(rows, dtype) for name, dtype in layout.scalars.items()}
    vectors = np.zeros((rows, layout.width), np.float32) if layout.width else None
    return Values(np.zeros(rows, KEY_DTYPE), np.zeros(rows, np.uint8), scalars, vectors)
