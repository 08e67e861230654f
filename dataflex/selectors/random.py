"""Random selection: the baseline that every other method has to beat."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from dataflex.components.compatibility import accepted
from dataflex.components.params import Parameters
from dataflex.draws import generator
from dataflex.selectors.base import Context, NativeSelector, Selection
from dataflex.selectors.parts.sampling import sample


class Random(NativeSelector):
    """A new draw at every update."""

    class Params(Parameters):
        """Parameters of `random`."""

        seed: int | None = Field(None, ge=0, description="seed of the draws; default: the run's seed")
        replacement: bool = Field(False, description="draw with replacement within an update")
        cache_dir: str | None = accepted("cache_dir", None)

    @property
    def chooses_distinct(self) -> bool:
        """Whether an update holds each row once."""
        return not self.params.replacement

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Selection:
        """Draw `num_samples` of the rows that have supervised tokens.

        Raises:
            CoverageError: there are fewer.
        """
        seed = context.seed if self.params.seed is None else self.params.seed
        rng = generator(seed, "random", context.update)
        logits = np.where(context.rows.supervised > 0, 0.0, -np.inf)
        return Selection(sample(logits, context.rows.keys, num_samples, rng, self.params.replacement))
