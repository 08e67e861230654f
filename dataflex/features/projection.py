"""Random projections of gradients too long to keep: y = R g, (P,) -> (K,), with E[R^T R] = I.

Every entry of R is a pure function of (seed, canonical parameter name, element, column), so the result does not depend
on block size, parameter order, batch, world size or device, and shards may be projected apart and added. `add` takes
any run of consecutive elements of one parameter; R is never held as a matrix.

Shapes: n rows of the batch, m elements of a block, P elements of all parameters, K numbers kept.

sjlt: s = `sparsity` non-zeros ±1/sqrt(s) per element, one in each of s bands of columns. With s = 1 and K even, adding
  neighbouring columns gives exactly the projection to K/2. Source: Kane, Nelson, JACM 2014; s = 1 is the count sketch.
rademacher, normal: dense, entries ±1/sqrt(K) or N(0, 1/K). The entries of the first K' columns do not depend on K.
srht: see `Srht`. factorized: see `Factorized`. identity: K = P, parameters in the order of their names.
For unit a and b, <Ra, Rb> is unbiased for <a, b> and its standard deviation is about 1/sqrt(K) for sjlt, rademacher,
normal and srht.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from dataflex.errors import ConfigError
from dataflex.features.entries import order, stream, upper, words
from dataflex.features.spec import Projection

_ENTRIES = 1 << 22
"""Random entries made at a time: 32 MiB of 64-bit words."""
_COLUMNS = 1 << 21
"""Room for columns in a dense counter; so a parameter may have 2^42 elements."""


class Projector(Protocol):
    """What adds blocks of gradients into a sketch."""

    width: int

    def zeros(self, n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an empty accumulator for n rows; only `add` and `values` know its layout."""

    def add(self, y: Tensor, name: str, start: int, values: Tensor) -> None:
        """Add elements [start, start + m) of the flattened parameter `name` of each row; values (n, m)."""

    def values(self, y: Tensor) -> Tensor:
        """Return the sketch (n, K) that has gathered in an accumulator."""


def build_projector(projection: Projection, sizes: Mapping[str, int]) -> Projector:
    """Return the projector of one specification.

    Args:
        projection: type, K and seed.
        sizes: canonical parameter name -> number of elements.

    Raises:
        ConfigError: K is larger than a dense counter can hold, or sparsity larger than K.
    """
    if projection.type == "identity":
        return Identity(sizes)
    if projection.dim > _COLUMNS:
        raise ConfigError(f"projection.dim is {projection.dim}; at most {_COLUMNS} are possible")
    if projection.type == "srht":
        return Srht(projection, sizes)
    if projection.type in ("rademacher", "normal"):
        return Dense(projection)
    sparsity = 1 if projection.type == "factorized" else projection.sparsity
    if sparsity > projection.dim:
        raise ConfigError(f"projection.sparsity is {sparsity}, more than projection.dim = {projection.dim}")
    sketch = Sjlt(projection.seed, projection.dim, sparsity, sizes)
    return Factorized(projection, sketch) if projection.type == "factorized" else sketch


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
        """Add a block; see `Projector`."""
        for band in self._table(name, values.device):
            columns = band[start : start + values.shape[1]].long()  # int32 indices are 3x slower here on a CPU
            y.index_add_(1, columns, values, alpha=1 / math.sqrt(self._sparsity))

    def values(self, y: Tensor) -> Tensor:
        """Return (n, K)."""
        return y[:, : self.width] - y[:, self.width :]

    def _table(self, name: str, device: torch.device) -> Tensor:
        """Return (sparsity, elements) int32 of signed columns."""
        key = (name, device)
        if key not in self._tables:
            size, s = self._sizes[name], self._sparsity
            start = stream(self._seed, "sjlt", name)
            table = torch.empty(s, size, dtype=torch.int32, device=device)
            for band in range(s):
                low, high = band * self.width // s, (band + 1) * self.width // s
                for a in range(0, size, _ENTRIES):
                    counter = torch.arange(a, min(a + _ENTRIES, size), device=device) * s + band
                    word = words(start, counter)
                    column = low + ((upper(word) * (high - low)) >> 32)
                    table[band, a : a + _ENTRIES] = column + (word & 1) * self.width
            self._tables[key] = table
        return self._tables[key]


class Dense:
    """Rademacher or normal entries, made again for every block: P K random numbers a batch. The yardstick, not for use."""

    def __init__(self, projection: Projection) -> None:
        self.width = projection.dim
        self._entries = _signs if projection.type == "rademacher" else _normals
        self._seed, self._role = projection.seed, projection.type

    def zeros(self, n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (n, K)."""
        return torch.zeros(n, self.width, device=device, dtype=dtype)

    def add(self, y: Tensor, name: str, start: int, values: Tensor) -> None:
        """Add a block; see `Projector`."""
        key, m = stream(self._seed, self._role, name), values.shape[1]
        step = max(1, _ENTRIES // self.width)
        for a in range(0, m, step):
            rows = torch.arange(start + a, start + min(a + step, m), device=values.device)
            matrix = self._entries(key, rows, self.width).to(values.dtype)
            y.addmm_(values[:, a : a + step], matrix, alpha=1 / math.sqrt(self.width))

    def values(self, y: Tensor) -> Tensor:
        """Return (n, K)."""
        return y


def _signs(key: int, rows: Tensor, columns: int) -> Tensor:
    """Return (m, columns) of ±1: column k is bit k mod 64 of word k // 64 of its row."""
    width = -(-columns // 64)
    word = words(key, rows[:, None] * _COLUMNS + torch.arange(width, device=rows.device))
    # Bits through a table of bytes: eight entries a look-up, 8x faster than shifting words.
    byte = torch.arange(256, device=rows.device)
    table = ((byte[:, None] >> torch.arange(8, device=rows.device)) & 1).float() * 2 - 1
    return table[word.view(torch.uint8).long()].reshape(len(rows), width * 64)[:, :columns]


def _normals(key: int, rows: Tensor, columns: int) -> Tensor:
    """Return (m, columns) of N(0, 1) in float64 by Box-Muller: word w of a row gives columns 2w and 2w + 1."""
    width = -(-columns // 2)
    word = words(key, rows[:, None] * _COLUMNS + torch.arange(width, device=rows.device))
    radius = (-2 * torch.log((upper(word).double() + 1) / 2**32)).sqrt()
    angle = (word & 0xFFFFFFFF).double() * (2 * math.pi / 2**32)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return pairs.reshape(len(rows), width * 2)[:, :columns]


class Identity:
    """The whole gradient, K = P, parameters in the order of their canonical names."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._offsets: dict[str, int] = {}
        self.width = 0
        for name in sorted(sizes):
            self._offsets[name] = self.width
            self.width += sizes[name]

    def zeros(self, n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (n, P)."""
        return torch.zeros(n, self.width, device=device, dtype=dtype)

    def add(self, y: Tensor, name: str, start: int, values: Tensor) -> None:
        """Add a block; see `Projector`."""
        at = self._offsets[name] + start
        y[:, at : at + values.shape[1]] += values

    def values(self, y: Tensor) -> Tensor:
        """Return (n, P)."""
        return y


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
        """Add a block; see `Projector`. Cheapest when blocks are whole tiles or more."""
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


class Factorized:
    """Both factors of a linear layer's gradient projected to `side` numbers, their outer product sketched into K.

    For G = sum_t gy_t x_t^T the features are (P_o gy)(P_i x)^T, with Rademacher P/sqrt(side), or no projection of a
    factor that has at most `side` numbers. G itself is never formed, so this works for the plain gradient only. What is
    not a linear weight is sketched as `Sjlt` does.

    Source: LoGra, arXiv 2405.13954; the sketch of the outer product instead of keeping all of it is ours.
    """

    def __init__(self, projection: Projection, sketch: Sjlt) -> None:
        self.width = projection.dim
        self._seed, self._side, self._sketch = projection.seed, projection.side, sketch
        self._pairs: dict[str, Sjlt] = {}

    def zeros(self, n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (n, 2K)."""
        return self._sketch.zeros(n, device, dtype)

    def add(self, y: Tensor, name: str, start: int, values: Tensor) -> None:
        """Add a block of a parameter that is no linear weight; see `Projector`."""
        self._sketch.add(y, name, start, values)

    def add_linear(self, y: Tensor, name: str, left: Tensor, right: Tensor) -> None:
        """Add the gradient sum_t left_t right_t^T of a weight; left (n, T, rows), right (n, T, cols)."""
        left, right = self._factor(name, "left", left), self._factor(name, "right", right)
        outer = torch.bmm(left.transpose(1, 2), right).flatten(1)
        if name not in self._pairs:
            self._pairs[name] = Sjlt(self._seed, self.width, 1, {f"{name}#factors": outer.shape[1]})
        self._pairs[name].add(y, f"{name}#factors", 0, outer)

    def values(self, y: Tensor) -> Tensor:
        """Return (n, K)."""
        return self._sketch.values(y)

    def _factor(self, name: str, role: str, factor: Tensor) -> Tensor:
        if factor.shape[-1] <= self._side:
            return factor
        rows = torch.arange(factor.shape[-1], device=factor.device)
        matrix = _signs(stream(self._seed, f"factor-{role}", name), rows, self._side)
        return factor @ (matrix.to(factor.dtype) / math.sqrt(self._side))
