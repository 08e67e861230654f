"""Random projections of gradients too long to keep: y = R g, (P,) -> (K,), with E[R^T R] = I.

Every entry of R is a pure function of (seed, canonical parameter name, element, column), so the result does not depend
on block size, parameter order, batch, world size or device, and shards may be projected apart and added. `add` takes
any run of consecutive elements of one parameter; R is never held as a matrix.

Shapes: n rows of the batch, m elements of a block, P elements of all parameters, K numbers kept.

sjlt: s = `sparsity` non-zeros ±1/sqrt(s) per element, one in each of s bands of columns. With s = 1 and K even, adding
  neighbouring columns gives exactly the projection to K/2. Source: Kane, Nelson, JACM 2014; s = 1 is the count sketch.
rademacher: dense, entries ±1/sqrt(K). The signs of the first K' columns do not depend on K.
srht: see `Srht`. identity: K = P, parameters in the order of their names.
For unit a and b, <Ra, Rb> is unbiased for <a, b> and its standard deviation is about 1/sqrt(K) for sjlt, rademacher
and srht.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from dataflex.errors import ConfigError
from dataflex.features.rademacher import Rademacher
from dataflex.features.sjlt import Sjlt
from dataflex.features.spec import MAX_COLUMNS, Projection
from dataflex.features.srht import Srht


class Projector(Protocol):
    """Adds gradients into a sketch, block by block."""

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
    if projection.dim > MAX_COLUMNS:
        raise ConfigError(f"projection.dim is {projection.dim}; at most {MAX_COLUMNS} are possible")
    if projection.type == "srht":
        return Srht(projection, sizes)
    if projection.type == "rademacher":
        return Rademacher(projection)
    if projection.sparsity > projection.dim:
        raise ConfigError(f"projection.sparsity is {projection.sparsity}, more than projection.dim = {projection.dim}")
    return Sjlt(projection.seed, projection.dim, projection.sparsity, sizes)


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
