"""A selector put together from parts: representation, similarity, aggregation over targets, rule.

Every method that judges rows by cached features is one of these, under its own name and with its own parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from dataflex.errors import ConfigError
from dataflex.selectors.base import Context, Need, Selection, View
from dataflex.selectors.choice import NEIGHBOURLY, Choice, RoundRobin, TopK
from dataflex.selectors.judgement import Judgement
from dataflex.selectors.numbers import DeltaLoss, InstructionDifficulty, Loss
from dataflex.selectors.representation import Numbers, Part, Vectors
from dataflex.selectors.similarity import Similarity, Within, set_scores, target_vectors, unit
from dataflex.selectors.vectors import EmbeddingVectors, GradientVectors, PolicyVectors

Representation = Annotated[
    GradientVectors | PolicyVectors | EmbeddingVectors | Loss | DeltaLoss | InstructionDifficulty,
    Field(discriminator="kind"),
]


class Composition(Part):
    """The parts of a method."""

    representation: Representation = Field(GradientVectors(), description="what rows are judged by")
    similarity: Similarity = Field("cosine", description="of a training row's vector and a target row's")
    within: Within = Field("mean", description="over the rows of a target set")
    across: Literal["max", "mean"] = Field("max", description="over target sets")
    rule: Choice = Field(TopK(), description="from scores to rows")

    @model_validator(mode="after")
    def _fits(self) -> Composition:
        looks_around = isinstance(self.rule, NEIGHBOURLY) or (
            isinstance(self.rule, RoundRobin) and self.rule.over == "rows"
        )
        if isinstance(self.representation, Numbers) and isinstance(self.rule, (*NEIGHBOURLY, RoundRobin)):
            raise ValueError(f"a rule other than {self.rule.kind} with {self.representation.kind}: it has no targets")
        if looks_around and isinstance(self.representation, Vectors) and len(self.representation.terms()) > 1:
            raise ValueError(f"one checkpoint with the rule {self.rule.kind}: neighbours are those of one model state")
        if looks_around and self.similarity == "whitened_cosine":
            raise ValueError(f"a similarity other than whitened_cosine with the rule {self.rule.kind}")
        return self


class Composed:
    """Judges rows by a representation and chooses by a rule."""

    Params: type[Part] = Composition

    def __init__(self, params: Any):
        self.params = params
        self.parts = self.composition(params)

    def composition(self, params: Any) -> Composition:
        """Return the parts that a method's own parameters stand for.

        Raises:
            ConfigError: they do not fit each other.
        """
        assert isinstance(params, Composition)
        return params

    def needs(self) -> list[Need]:
        """Return the representation's features."""
        return self.parts.representation.needs()

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Selection:
        """Judge every row and choose.

        Raises:
            ConfigError: the representation is compared with targets, and there are none.
            CoverageError: a target set has no usable row, or too few rows can be chosen.
        """
        return self.parts.rule.select(self.judge(context), num_samples)

    def judge(self, context: Context) -> Judgement:
        """Return what is known of every row. Collective."""
        representation = self.parts.representation
        if isinstance(representation, Numbers):
            values, ages = representation.values(context)
            return Judgement(context, values, ages)
        if not context.targets:
            raise ConfigError("eval_dataset: found none; the method needs target rows: set eval_dataset or val_size")
        return self._compared(context, representation)

    def _compared(self, context: Context, representation: Vectors) -> Judgement:
        """Sum the terms' similarities to every target set, then join the sets."""
        terms, parts = representation.terms(), self.parts
        sets = np.zeros((len(context.rows), len(context.targets)))
        ages = np.zeros(len(context.rows), dtype=np.int32)
        for term, weight in zip(terms, representation.term_weights(), strict=True):
            view = context.features(term.train, state=term.state)
            targets = {name: context.features(term.target, name, term.state) for name in context.targets}
            sets += weight * set_scores(view, targets, parts.similarity, parts.within)
            ages = np.maximum(ages, view.ages)
        scores = sets.max(axis=1) if parts.across == "max" else sets.mean(axis=1)
        if len(terms) > 1 or parts.similarity == "whitened_cosine":
            return Judgement(context, scores, ages, sets)
        nearest, vectors = neighbourhood(view, targets, parts.similarity)
        return Judgement(context, scores, ages, sets, nearest=nearest, vectors=vectors)


def neighbourhood(
    view: View, targets: dict[str, View], similarity: Similarity
) -> tuple[Callable[[int], tuple[np.ndarray, np.ndarray]], Callable[[np.ndarray], np.ndarray]]:
    """Return the functions of `Judgement.nearest` and `Judgement.vectors`.

    Distances are Euclidean, between unit vectors for cosines, where the order is that of the cosines. For inner
    products, which have no distance, what is returned in their place is the largest product less each.
    """
    queries = np.concatenate([target_vectors(target, name, similarity) for name, target in targets.items()])
    if similarity == "cosine":
        queries = unit(queries)[0]

    def nearest(k: int) -> tuple[np.ndarray, np.ndarray]:
        metric: Any = {"cosine": "cosine", "inner_product": "ip", "l2": "l2"}[similarity]
        scores, rows = view.nearest(queries.astype(np.float32), k, metric)
        if similarity == "l2":
            return np.sqrt(np.maximum(scores, 0)), rows
        if similarity == "cosine":
            return np.sqrt(np.maximum(2 - 2 * scores, 0)), rows
        return scores.max(initial=0) - scores, rows

    def vectors(rows: np.ndarray) -> np.ndarray:
        found = np.zeros((len(rows), queries.shape[1]))
        place = np.full(len(view.status), -1)
        place[rows] = np.arange(len(rows))
        for at, block in view.blocks():
            mine = place[at] >= 0
            found[place[at[mine]]] = block[mine]
        return unit(found)[0] if similarity == "cosine" else found

    return nearest, vectors
