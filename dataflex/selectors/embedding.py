"""Rows whose embeddings are nearest to the targets'."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dataflex.selectors.composed import Aggregation, Composed, Composition, over_sets
from dataflex.selectors.parts.choice import RoundRobin
from dataflex.selectors.parts.representation import part
from dataflex.selectors.parts.similarity import Compared, Within
from dataflex.selectors.parts.vectors import EmbeddingFields, EmbeddingVectors


class Embedding(Composed):
    """Score = similarity of pooled hidden states: one forward pass per row, and no further one for other targets.

    The baseline that gradient methods are compared with in arXiv 2602.14696.
    """

    class Params(Compared, EmbeddingFields):
        """Parameters of `embedding`."""

        within: Within = Field("mean", description="over the rows of a target set")
        aggregation: Aggregation = Field(
            "max", description="over target sets: best set, mean of sets, or sets taking turns"
        )

    def composition(self, params: Params) -> Composition:
        """Return the parts."""
        return Composition(
            representation=part(EmbeddingVectors, params),
            similarity=params.similarity,
            ridge=params.ridge,
            within=params.within,
            **over_sets(params.aggregation),
        )


class RdsPlus(Composed):
    """RDS+: cosine of position-weighted hidden states of the base model, the targets' rows taking turns.

    Source: arXiv 2503.01807. The cheapest strong baseline: no training, no backward pass, reusable for every
    target; best at large pools in arXiv 2602.14696. Deviation: a target row whose nearest row is taken waits for its
    next turn.
    """

    class Params(EmbeddingFields):
        """Parameters of `rds_plus`."""

        pooling: Literal["mean", "last", "position_weighted"] = Field(
            "position_weighted", description="over a row's tokens; token t of L weighs t / sum(1..L)"
        )
        over: Literal["rows", "sets"] = Field(
            "rows", description="who takes turns: every target row; or target sets, each by its nearest row"
        )
        repeat: bool = Field(False, description="over rows: choose the same rows at every update, not the next ones")

    def composition(self, params: Params) -> Composition:
        """Return the parts."""
        return Composition(
            representation=part(EmbeddingVectors, params),
            similarity="cosine",
            within="max",
            rule=part(RoundRobin, params),
        )
