"""Groups of examples and weighters over them, without a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dataflex.features.spec import LossSpec
from dataflex.rows import Status
from dataflex.weighters.adapt import Adapt
from dataflex.weighters.base import Group
from dataflex.weighters.feature import ByFeature
from tests.held import Held
from tests.held import pool as rows_of

NAN = math.nan


def group(losses: Sequence[float], signal: Sequence[float] | None = None, since: int = 0, **more: Any) -> Group:
    found = torch.tensor(losses, dtype=torch.float64)
    near = torch.full_like(found, NAN) if signal is None else torch.tensor(signal, dtype=torch.float64)
    rows = torch.tensor(more.get("rows", range(len(losses))), dtype=torch.int64)
    return Group(rows, found, near, since, since, 100)


def adapt(**params: Any) -> Adapt:
    return Adapt(Adapt.Params(**params))


STORED = np.array([3.0, 1.0, 2.0, NAN, 0.0])


def stored(values: np.ndarray = STORED) -> Held:
    status = np.where(np.isnan(values), Status.NONFINITE, Status.OK).astype(np.uint8)
    tokens = np.full(len(values), 4, np.int32)
    return Held(status=status, scalars={"loss_sum": np.nan_to_num(values) * tokens, "tokens": tokens})


def by_feature(values: np.ndarray = STORED, **params: Any) -> ByFeature:
    weighter = ByFeature(ByFeature.Params(feature=LossSpec(), **params))
    (need,) = weighter.needs()
    weighter.prepare({need: stored(values)}, rows=rows_of(len(values)))
    return weighter


def linupper(losses: Sequence[float], r: float) -> list[float]:
    low, high = min(losses), max(losses)
    scores = [min((2 * x - low - high) / (high - low) + 1, 1) for x in losses]
    total = sum(math.exp(s / r) for s in scores)
    return [len(losses) * math.exp(s / r) / total for s in scores]
