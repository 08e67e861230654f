"""LESS: choose the rows whose training step points where the targets' gradients point."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dataflex.components.compatibility import accepted
from dataflex.selectors.composed import Aggregation, Composed, Composition, over_sets
from dataflex.selectors.parts.representation import Acts, part
from dataflex.selectors.parts.similarity import Compared
from dataflex.selectors.parts.vectors import GradientVectors, TargetFields


class Less(Composed):
    """Score = aggregate over target sets of the mean cosine between a row's step and the set's gradients.

    Online (no `checkpoints`): the gradients of the live model at every update. Offline: a learning-rate weighted sum
    over given checkpoints, the same at every update.

    Source: LESS, arXiv 2402.04333, definition 3.1: sum over checkpoints first, then the mean within a target set, then
    the maximum over sets; the mean of cosines, as in the official code (not the cosine to the mean). Deviations: target
    sets may differ in size; the online form has one term, whose weight does not matter. Round-robin over sets in place
    of the maximum does as well or a little better in arXiv 2602.14696.

    `target_direction: precond_only` compares the row's step with the step, momentum left out, that the target itself
    would make: its gradient divided, element by element, by Adam's root of the second moment. So both sides are
    measured in the units that Adam steps in, and elements whose gradients are large for every example no longer
    dominate the target's. What is compared is then the likeness of two steps; with the plain gradient the product is
    the first-order change of the target's loss. Source: the optimizer state correction of both sides in TrackStar,
    arXiv 2410.17413. Deviations: no correction by a Hessian; the training side keeps its momentum unless
    `adam_variant: precond_only` takes it out. (Influence Distillation, arXiv 2505.19051, divides the training side.)
    """

    class Params(Compared, TargetFields):
        """Parameters of `less`."""

        only: ClassVar[Acts] = {**TargetFields.only, **Compared.only}

        aggregation: Aggregation = Field(
            "max", description="over target sets: best set, mean of sets, or sets taking turns"
        )
        save_interval: int = accepted("save_interval", 16, ge=1)
        cache_dir: str | None = Field(
            None, description="root of the stores where neither dataflex.store nor DATAFLEX_HOME is set"
        )

    def composition(self, params: Params) -> Composition:
        """Return the parts."""
        return Composition(
            representation=part(GradientVectors, params),
            similarity=params.similarity,
            ridge=params.ridge,
            **over_sets(params.aggregation),
        )
