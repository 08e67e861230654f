"""A selector put together from parts: representation, similarity, aggregation over targets, rule.

Every method that judges rows by cached features is one of these, under its own name and with its own parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from dataflex.errors import ConfigError, CoverageError
from dataflex.features.spec import FeatureSpec
from dataflex.rows import Status
from dataflex.selectors.base import REFRESHES, Beginning, Context, NativeSelector, Need, Selection, View
from dataflex.selectors.parts.choice import NEIGHBOURLY, Choice, RoundRobin, TopK
from dataflex.selectors.parts.judgement import Judgement
from dataflex.selectors.parts.numbers import DeltaLoss, InstructionDifficulty, Loss
from dataflex.selectors.parts.representation import Numbers, Vectors
from dataflex.selectors.parts.similarity import (
    Compared,
    Similarity,
    Within,
    require_whitenable,
    set_scores,
    target_vectors,
    unit,
)
from dataflex.selectors.parts.streamed import OfView, Streamed
from dataflex.selectors.parts.turns import Comparison
from dataflex.selectors.parts.vectors import EmbeddingVectors, GradientVectors, PolicyVectors

log = logging.getLogger(__name__)

Representation = Annotated[
    GradientVectors | PolicyVectors | EmbeddingVectors | Loss | DeltaLoss | InstructionDifficulty,
    Field(discriminator="kind"),
]


Aggregation = Literal["max", "mean", "round_robin"]
"""Over target sets: the best set, the mean of sets, or sets taking turns."""


def over_sets(aggregation: Aggregation) -> dict[str, Any]:
    """Return the fields of a `Composition` that an aggregation stands for."""
    rule = RoundRobin() if aggregation == "round_robin" else TopK()
    return {"across": "mean" if aggregation == "mean" else "max", "rule": rule}


class Composition(Compared):
    """The parts of a method."""

    representation: Representation = Field(GradientVectors(), description="what rows are judged by")
    within: Within = Field("mean", description="over the rows of a target set")
    across: Literal["max", "mean"] = Field("max", description="over target sets")
    rule: Choice = Field(TopK(), description="from scores to rows")

    @model_validator(mode="after")
    def _fits(self) -> Composition:
        if isinstance(self.representation, Numbers) and isinstance(self.rule, (*NEIGHBOURLY, RoundRobin)):
            raise ValueError(f"a rule other than {self.rule.kind} with {self.representation.kind}: it has no targets")
        unused = self.model_fields_set & {"similarity", "ridge", "within", "across"}
        if isinstance(self.representation, Numbers) and unused:
            raise ValueError(f"no {', '.join(sorted(unused))} with {self.representation.kind}, which has no targets")
        if self.looks_around and isinstance(self.representation, Vectors) and len(self.representation.terms()) > 1:
            raise ValueError(f"one checkpoint with the rule {self.rule.kind}: neighbours are those of one model state")
        if self.looks_around and self.similarity == "whitened_cosine":
            raise ValueError(f"a similarity other than whitened_cosine with the rule {self.rule.kind}")
        return self

    @property
    def looks_around(self) -> bool:
        """Whether the rule asks for the nearest rows of every target."""
        return isinstance(self.rule, NEIGHBOURLY) or (isinstance(self.rule, RoundRobin) and self.rule.over == "rows")


class Composed(NativeSelector):
    """Judges rows by a representation and chooses by a rule.

    Raises:
        ConfigError: the vectors that the parameters ask for are too wide to be whitened.
    """

    Params = Composition

    def __init__(self, params: Any):
        super().__init__(params)
        self.parts = self.composition(params)
        self._require_whitenable(lambda spec: spec.known_width or 0)  # the others' width is asked once there is a model

    def composition(self, params: Any) -> Composition:
        """Put the method together: return the parts that its own parameters stand for.

        Raises:
            ConfigError: they do not fit each other.
        """
        assert isinstance(params, Composition)
        return params

    @property
    def refreshes(self) -> tuple[str, ...]:
        """The refresh policies that it works under: neighbours are searched among vectors as they were computed."""
        is_live = any(need.state is None for need in self.needs())
        taken_back = "rotating" if self.parts.looks_around and is_live else None
        return tuple(policy for policy in REFRESHES if policy != taken_back)

    @property
    def chooses_distinct(self) -> bool:
        """Whether an update holds each row once."""
        return not self.parts.rule.repeats

    def prepare(self, beginning: Beginning) -> None:
        """Check what can be checked before anything is computed.

        Raises:
            ConfigError: checkpoints have no weights, or the model's vectors are too wide to be whitened.
            CoverageError: no update can be filled, whatever the scores are.
        """
        if isinstance(self.parts.representation, Vectors):
            self.parts.representation.term_weights()
        self._require_whitenable(beginning.width)
        self.parts.rule.prepare(beginning)

    def _require_whitenable(self, width: Callable[[FeatureSpec], int]) -> None:
        if self.parts.similarity == "whitened_cosine" and isinstance(self.parts.representation, Vectors):
            for term in self.parts.representation.terms():
                require_whitenable(width(term.train), term.train.kind)

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
        return self._compared(context, representation)

    @staticmethod
    def comparisons(context: Context, representation: Vectors) -> list[Comparison]:
        """Return the training rows beside the target sets that have a usable row, for every term. Collective.

        Raises:
            ConfigError: there are no targets.
            CoverageError: no target set has a usable row.
        """
        if not context.targets:
            raise ConfigError("eval_dataset: found none; the method needs target rows: set eval_dataset or val_size")
        terms = representation.terms()
        views = [{name: context.features(term.target, name, term.state) for name in context.targets} for term in terms]
        names = speaking(context.targets, views)
        return [
            Comparison(context.features(term.train, state=term.state), {name: found[name] for name in names}, weight)
            for term, weight, found in zip(terms, representation.term_weights(), views, strict=True)
        ]

    def _compared(self, context: Context, representation: Vectors) -> Judgement:
        """Sum the terms' similarities to every target set, then join the sets."""
        parts, comparisons = self.parts, self.comparisons(context, representation)
        sets = np.zeros((len(context.rows), len(comparisons[0].targets)))
        for c in comparisons:
            sets += c.weight * set_scores(c.view, c.targets, parts.similarity, parts.within, parts.ridge)
        ages = oldest(comparisons)
        scores = sets.max(axis=1) if parts.across == "max" else sets.mean(axis=1)
        if not parts.looks_around:
            return Judgement(context, scores, ages, sets)
        # A row of zeros has distances to targets, but no cosine, and so is nobody's neighbour under `cosine`.
        view, targets = comparisons[0].view, comparisons[0].targets
        usable = np.isfinite(scores) if parts.similarity == "cosine" else view.status == Status.OK
        nearest, vectors = neighbourhood(view, targets, parts.similarity)
        return Judgement(context, scores, ages, sets, None, nearest, int(usable.sum()), vectors)


def oldest(comparisons: Sequence[Comparison]) -> np.ndarray:
    """Return the ages of the rows' scores, (N,) int32: a score is as old as the oldest feature in it."""
    return np.maximum.reduce([c.view.ages for c in comparisons])


def speaking(names: Iterable[str], views: Sequence[Mapping[str, View]]) -> list[str]:
    """Return the target sets that have a usable row in every view; the others are left out, with a warning.

    Raises:
        CoverageError: there is none.
    """
    silent = [name for name in names if any((view[name].status != Status.OK).all() for view in views)]
    if len(silent) == len(views[0]):
        raise CoverageError(
            f"target sets {', '.join(silent)}: found no usable row; expected supervised tokens and finite values, and "
            "for policy gradients responses whose rewards differ"
        )
    for name in silent:
        log.warning("target set %s has no usable row at this update and is left out", name)
    return [name for name in names if name not in silent]


def neighbourhood(
    view: View, targets: Mapping[str, View], similarity: Similarity
) -> tuple[Callable[[int], tuple[np.ndarray, np.ndarray]], Callable[[np.ndarray], Streamed]]:
    """Return the functions of `Judgement.nearest` and `Judgement.vectors`.

    Distances are Euclidean, between unit vectors for cosines, where the order is that of the cosines. For inner
    products, which have no distance, what is returned in their place is the largest product less each.
    """
    queries = np.concatenate([target_vectors(target, name) for name, target in targets.items()])
    if similarity == "cosine":
        queries = unit(queries)[0]

    # Distances at all, because the rules of transport weigh them; for turns among targets the order would do.
    def nearest(k: int) -> tuple[np.ndarray, np.ndarray]:
        metric: Any = {"cosine": "cosine", "inner_product": "ip", "l2": "l2"}[similarity]
        scores, rows = view.nearest(queries.astype(np.float32), k, metric)
        if similarity == "l2":
            return np.sqrt(np.maximum(scores, 0)), rows
        if similarity == "cosine":
            return np.sqrt(np.maximum(2 - 2 * scores, 0)), rows  # rounding can put a cosine a little above 1
        return scores.max(initial=0) - scores, rows

    def vectors(rows: np.ndarray) -> Streamed:
        return OfView(view.take(rows), is_unit=similarity == "cosine")

    return nearest, vectors
