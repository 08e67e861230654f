"""LESS: choose the rows whose training step points where the targets' gradients point."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from dataflex import distributed
from dataflex.components.compatibility import accepted
from dataflex.selectors.base import Beginning, Context, Selection
from dataflex.selectors.composed import Aggregation, Composed, Composition, oldest, over_sets
from dataflex.selectors.parts.choice import recorded
from dataflex.selectors.parts.judgement import Judgement
from dataflex.selectors.parts.representation import Acts, part
from dataflex.selectors.parts.similarity import Compared
from dataflex.selectors.parts.turns import rows_in_turn
from dataflex.selectors.parts.vectors import GradientVectors, TargetFields

log = logging.getLogger(__name__)


class Less(Composed):
    """Score = aggregate over target sets of the mean cosine between a row's step and the set's gradients.

    Online (no `checkpoints`): the gradients of the live model at every update. Offline: a learning-rate weighted sum
    over given checkpoints, the same at every update.

    Source: LESS, arXiv 2402.04333, definition 3.1: sum over checkpoints first, then the mean within a target set, then
    the maximum over sets; the mean of cosines, as in the official code (not the cosine to the mean). Deviations: target
    sets may differ in size; the online form has one term, whose weight does not matter. Round-robin over sets in place
    of the maximum does as well or a little better in arXiv 2602.14696.

    `over: rows` lets every target row take turns: the first of every set, then the second, and so on; each takes the
    row most similar to it, summed over checkpoints, that is not taken yet. An update begins anew. Source: the greedy
    round-robin of arXiv 2602.14696 over the rows of one task; that several sets alternate is ours.

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

        only: ClassVar[Acts] = {**TargetFields.only, **Compared.only, "over": ("aggregation", ("round_robin",))}
        added: ClassVar[Mapping[str, Any]] = {"over": "sets"}

        aggregation: Aggregation = Field(
            "max", description="over target sets: best set, mean of sets, or sets taking turns"
        )
        over: Literal["sets", "rows"] = Field(
            "sets", description="round_robin: who takes turns, target sets or single target rows"
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

    def prepare(self, beginning: Beginning) -> None:
        """Check what can be checked before anything is computed; warn of target rows that never have a turn.

        Raises:
            ConfigError: checkpoints have no weights, or the model's vectors are too wide to be whitened.
        """
        super().prepare(beginning)
        targets = sum(len(rows) for rows in beginning.targets.values())
        if self.params.over == "rows" and 0 < beginning.largest < targets and distributed.is_main():
            log.warning(
                "over: rows: %d target rows, and at most %d rows at one update: the first rows of every target set are "
                "heard, the others never have a turn; raise update_step, or let sets take turns",
                targets, beginning.largest,
            )  # fmt: skip

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Selection:
        """Judge every row and choose.

        Raises:
            ConfigError: there are no targets.
            CoverageError: a target set has no usable row, or too few rows can be chosen.
        """
        if self.params.over == "sets":
            return super().select(model, step_id, num_samples, context=context, **kwargs)
        comparisons = self.comparisons(context, part(GradientVectors, self.params))
        rows, scores = rows_in_turn(
            comparisons, context.rows.keys, num_samples, self.params.similarity, self.params.ridge
        )
        return recorded(Judgement(context, scores, oldest(comparisons)), rows, scores)
