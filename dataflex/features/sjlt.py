"""Sparse random projections: the count sketch and its denser relatives.

n rows of the batch, m elements of a block, K numbers kept, s = `sparsity` non-zeros per element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dataflex.features.entries import CHUNK, stream, upper, words


class Sjlt:
    """Sparse Johnson-Lindenstrauss: linear time, one int32 per element and non-zero kept in memory.

    A column and its sign are one number in [0, 2K): the accumulator has a half for each sign, which saves the pass that
    would multiply by signs. On a GPU the additions are atomic, hence equal only up to the order of rounding.
    """

    def __init__(self, seed: int, dim: int, sparsity: int, sizes: Mapping[str, int]) -> None:
        self.width = dim
        self._seed, self._sparsity, self._sizes = seed, sparsity, sizes
        self._tables: dict[tuple[str, torch.device], Tensor] = {}

    def zeros(self, n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (n, 2K)."""
        return torch.zeros(n, 2 * self.width, device=device, dtype=dtype)

    def add(self, y: Tensor, name: str, start: int, values: Tensor) -> None:
        """Add a block; see `projection.Projector`."""
        for band in self._table(name, values.device):
            columns = band[start : start + values.shape[1]].long()  # int32 indices are 3x slower here on a CPU
            y.index_add_(1, columns, values)  # a factor would be 4x slower, hence in `values`

    def values(self, y: Tensor) -> Tensor:
        """Return (n, K)."""
        return (y[:, : self.width] - y[:, self.width :]) / math.sqrt(self._sparsity)

    def _table(self, name: str, device: torch.device) -> Tensor:
        """Return (sparsity, elements) int32 of signed columns."""
        key = (name, device)
        if key not in self._tables:
            size, s = self._sizes[name], self._sparsity
            start = stream(self._seed, "sjlt", name)
            table = torch.empty(s, size, dtype=torch.int32, device=device)
            for band in range(s):
                low, high = band * self.width // s, (band + 1) * self.width // s
                for a in range(0, size, CHUNK):
                    # The element and the band are the counter, so a table is the same made in any chunks.
                    counter = torch.arange(a, min(a + CHUNK, size), device=device) * s + band
                    word = words(start, counter)
                    column = low + ((upper(word) * (high - low)) >> 32)
                    table[band, a : a + CHUNK] = column + (word & 1) * self.width
            self._tables[key] = table
        return self._tables[key]
