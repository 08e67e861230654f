"""Values as they are stored, before decoding. R rows, D numbers per vector, C items of its codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataflex.stores.rounding import decode
from dataflex.stores.values import Layout, Values


@dataclass(frozen=True)
class Encoded:
    """Values of R rows as they are stored: codes (R, C) and scale (R,) of `dataflex.stores.rounding`."""

    keys: np.ndarray
    status: np.ndarray
    scalars: dict[str, np.ndarray]
    codes: np.ndarray | None
    scale: np.ndarray | None

    def take(self, rows: np.ndarray | slice) -> Encoded:
        """Return some of the rows: positions (r,), a mask (R,) or a slice, which copies nothing."""
        return Encoded(
            self.keys[rows],
            self.status[rows],
            {name: column[rows] for name, column in self.scalars.items()},
            None if self.codes is None else self.codes[rows],
            None if self.scale is None else self.scale[rows],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Encoded]) -> Encoded:
        """Return the rows of all parts, which hold the same columns."""
        if len(parts) == 1:  # `np.concatenate` would copy it
            return parts[0]
        codes = [part.codes for part in parts if part.codes is not None]
        scales = [part.scale for part in parts if part.scale is not None]
        return cls(
            np.concatenate([part.keys for part in parts]),
            np.concatenate([part.status for part in parts]),
            {name: np.concatenate([part.scalars[name] for part in parts]) for name in parts[0].scalars},
            np.concatenate(codes) if codes else None,
            np.concatenate(scales) if scales else None,
        )

    def decoded(self, layout: Layout) -> Values:
        """Return the rows of a store of this layout as a reader sees them, vectors as float32."""
        vectors = None if self.codes is None else decode(self.codes, self.scale, layout.storage, layout.width)
        return Values(self.keys, self.status, self.scalars, vectors)
