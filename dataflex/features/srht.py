"""Subsampled randomised Hadamard transform: the least error per number kept, at four times the time of sjlt.

n rows of the batch, m elements of a block, p elements of a tile, K numbers kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dataflex.features.entries import order, stream, words
from dataflex.features.spec import Projection


class Srht:
    """Subsampled randomised Hadamard transform of each tile of 2^16 elements of a parameter.

    A tile of p elements (p a power of two, padded with zeros) is multiplied by random signs and transformed. If p > K,
    K distinct coordinates are kept and scaled by sqrt(p / K); else all p go to distinct columns. Random signs per tile
    and column keep the tiles' contributions uncorrelated. Tiles bound the scratch memory whatever the parameter's size;
    a parameter of one tile is the textbook transform.

    Source: Ailon, Chazelle, SICOMP 2009; Tropp, AADA 2011 (arXiv 1011.1595).
    """

    tile = 1 << 16

    def __init__(self, projection: Projection, sizes: Mapping[str, int]) -> None:
        self.width = projection.dim
        self._seed, self._sizes = projection.seed, sizes
        self._samples: dict[tuple[str, int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def zeros(self, n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (n, K)."""
        return torch.zeros(n, self.width, device=device, dtype=dtype)

    def add(self, y: Tensor, name: str, start: int, values: Tensor) -> None:
        """Add a block; see `projection.Projector`. Cheapest when blocks are whole tiles or more."""
        n, m = values.shape
        signs = stream(self._seed, "srht-sign", name)
        for base in range(start - start % self.tile, start + m, self.tile):
            length = min(self.tile, self._sizes[name] - base)
            low, high = max(start, base), min(start + m, base + length)
            sign = 1 - 2 * (words(signs, torch.arange(low, high, device=values.device)) & 1)
            padded = torch.zeros(n, 1 << (length - 1).bit_length(), device=values.device, dtype=values.dtype)
            padded[:, low - base : high - base] = values[:, low - start : high - start] * sign
            rows, columns, scale = self._sample(name, base, padded.shape[1], values.device)
            y.index_add_(1, columns, _hadamard(padded)[:, rows] * scale.to(values.dtype))

    def values(self, y: Tensor) -> Tensor:
        """Return (n, K)."""
        return y

    def _sample(self, name: str, base: int, p: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        key = (name, base, device)
        if key not in self._samples:
            role, k = f"{name}@{base}", self.width
            kept = order(stream(self._seed, "srht-sample", role), max(p, k), device)[: min(p, k)]
            every = torch.arange(len(kept), device=device)
            sign = (1 - 2 * (words(stream(self._seed, "srht-column", role), every) & 1)).double()
            self._samples[key] = (kept, every, sign * math.sqrt(p / k)) if p > k else (every, kept, sign)
        return self._samples[key]


def _hadamard(x: Tensor) -> Tensor:
    """Return the orthonormal Walsh-Hadamard transform of the last dimension, a power of two up to 2^16.

    H of size a b is the Kronecker product of those of a and b: two small matrix products, faster than butterflies.
    """
    size = x.shape[1]
    a = 1 << (size.bit_length() // 2)
    left, right = _hadamard_matrix(size // a, x), _hadamard_matrix(a, x)
    return (left @ x.view(-1, size // a, a) @ right).reshape(-1, size)


def _hadamard_matrix(size: int, like: Tensor) -> Tensor:
    matrix = like.new_ones(1, 1)
    block = like.new_tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    while len(matrix) < size:
        matrix = torch.kron(matrix, block)
    return matrix
