"""Random mixing: the baseline that every mixer with a signal has to beat. K domains."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dataflex.components.params import Parameters
from dataflex.draws import generator
from dataflex.mixers.base import MixContext, NativeMixer, normalised


class Random(NativeMixer):
    """New proportions at every update, drawn from a Dirichlet distribution around a prior.

    Concentrations are `strength` * K * prior: with the defaults, every mixture is as likely as any other. RegMix
    (arXiv 2407.01492) draws its swarm so. By default an update comes after 100 steps, as Dynamic MoE mixing has it:
    fewer would average the draws out, and the run would be one on the prior.
    """

    interval: ClassVar[int] = 100

    class Params(Parameters):
        """Parameters of `random`."""

        seed: int | None = Field(None, ge=0, description="seed of the draws; default: the run's seed")
        strength: float = Field(1.0, gt=0, description="large: close to the prior; small: one domain has most")
        prior: Literal["uniform", "natural", "initial"] = Field(
            "uniform", description="mean of the draws; natural: by size; initial: init_mixture_proportions"
        )

    def mix(self, model: Any, step_id: int, *, context: MixContext, **kwargs: Any) -> np.ndarray:
        """Draw proportions, a function of the seed and the update alone."""
        seed = context.seed if self.params.seed is None else self.params.seed
        count = len(context.domains)
        priors = {"uniform": np.full(count, 1 / count), "natural": context.domains.natural, "initial": context.initial}
        prior = priors[self.params.prior]
        drawn = np.zeros(count)
        possible = prior > 0  # the distribution is one over the domains that may occur
        rng = generator(seed, "random mixer", context.update)
        drawn[possible] = rng.dirichlet(self.params.strength * count * prior[possible])
        return normalised(drawn)
