"""Projection of a linear layer's two factors instead of their product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dataflex.features.dense import random_signs
from dataflex.features.entries import stream
from dataflex.features.sjlt import Sjlt
from dataflex.features.spec import Projection


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
        """Add a block of a parameter that is no linear weight; see `projection.Projector`."""
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
        matrix = random_signs(stream(self._seed, f"factor-{role}", name), rows, self._side)
        return factor @ (matrix.to(factor.dtype) / math.sqrt(self._side))
