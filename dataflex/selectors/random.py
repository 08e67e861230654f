"""Random selection: the baseline that every other method has to beat."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dataflex.selectors.base import Context, Need, Selection
from dataflex.selectors.rules import top_k


class Random:
    """A new draw at every update."""

    class Params(BaseModel):
        """Parameters of `random`."""

        model_config = ConfigDict(frozen=True, extra="forbid")

        seed: int | None = Field(None, ge=0, description="seed of the draws; default: the run's seed")
        replacement: bool = Field(False, description="draw with replacement within an update")
        cache_dir: str | None = Field(None, description="accepted for compatibility; nothing is cached")

    def __init__(self, params: Params):
        self.params = params

    def needs(self) -> list[Need]:
        """Need nothing."""
        return []

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Selection:
        """Draw `num_samples` of the rows that have supervised tokens."""
        rng = context.rng("random", self.params.seed or 0, context.update)
        usable = np.flatnonzero(context.rows.supervised > 0)
        if self.params.replacement:
            return Selection(usable[rng.integers(len(usable), size=num_samples)])
        scores = np.full(len(context.rows), -np.inf)
        scores[usable] = rng.random(len(usable))
        return Selection(top_k(scores, context.rows.keys, num_samples))
