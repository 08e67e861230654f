"""Gradient scores for a whole pool from the gradients of some rows, carried over by embeddings.

N training rows, R some of them, J target sets.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from dataflex.errors import ConfigError, CoverageError
from dataflex.features.spec import FeatureSpec
from dataflex.rows import Status, by_key
from dataflex.selectors.base import Context, NativeSelector, Need, Selection, View
from dataflex.selectors.parts.choice import RoundRobin, TopK
from dataflex.selectors.parts.judgement import Judgement
from dataflex.selectors.parts.regression import kernel_ridge
from dataflex.selectors.parts.similarity import joined, set_scores, shared_blocks, unit, vectors_of
from dataflex.selectors.parts.vectors import EmbeddingVectors, GradientFields

MOST = 16_384
"""Rows that a regression takes: its kernel is then 2 GB, of which the solver makes a copy."""


class PropagatedFields(GradientFields):
    """Parameters that methods of this kind share."""

    embedding_model_name_or_path: str | None = Field(
        None, description="another encoder (sentence-transformers or causal LM); default: the run's base model"
    )
    embedding_layer: int = Field(-1, description="hidden state that is pooled")
    pooling: Literal["mean", "last", "position_weighted"] = Field("mean", description="over a row's tokens")
    damping: float = Field(0.01, gt=0, description="ridge of the regression, as a share of the kernel's diagonal")
    cache_dir: str | None = Field(
        None, description="root of the stores where neither dataflex.store nor DATAFLEX_HOME is set"
    )


class Propagated(NativeSelector):
    """Base of selectors that compute exact scores for a few rows and carry them over to all others."""

    is_adaptive = True
    Params = PropagatedFields

    def __init__(self, params: Any):
        super().__init__(params)
        self._embedding = EmbeddingVectors(
            pooling=params.pooling,
            layer=params.embedding_layer,
            embedding_model_name_or_path=params.embedding_model_name_or_path,
        ).terms()[0]

    @property
    def chooses_distinct(self) -> bool:
        """An update holds each row once."""
        return True

    @property
    def refreshes(self) -> tuple[str, ...]:
        """Only `full`: the scores that are carried over must all be of one state of the model."""
        return ("full",)

    def needs(self) -> list[Need]:
        """Need the embeddings of all rows and the gradients of the targets; of a few rows gradients are asked for."""
        return [
            Need(self._embedding.train, "train", self._embedding.state),
            Need(self.params.target_spec, "targets"),
        ]

    @property
    def asked(self) -> list[FeatureSpec]:
        """The gradients, which only `select` knows the rows of."""
        return [self.params.train_spec]

    def embeddings(self, context: Context) -> View:
        """Return the view of the training rows' embeddings."""
        return context.features(self._embedding.train, state=self._embedding.state)

    def gradients(self, context: Context, rows: np.ndarray) -> View:
        """Return the view of some rows' gradients. Collective."""
        return context.features(self.params.train_spec, rows=rows)

    def exact(self, context: Context, view: View) -> np.ndarray:
        """Return the mean cosine of some rows' steps to every target set, (R, J); -inf without a gradient. Collective.

        Raises:
            ConfigError: there are no targets.
        """
        if not context.targets:
            raise ConfigError("eval_dataset: found none; the method needs target rows: set eval_dataset or val_size")
        targets = {name: context.features(self.params.target_spec, name) for name in context.targets}
        return set_scores(view, targets, "cosine", "mean")

    def regressed(self, context: Context, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return scores of all rows, (N, J), predicted from those of some; -inf without an embedding. Collective.

        Raises:
            CoverageError: none of the rows has a score.
        """
        view = self.embeddings(context)
        known = np.isfinite(scores).all(axis=1)
        if not known.any():
            raise CoverageError(f"none of {len(rows)} rows has a usable gradient, so no score can be carried over")
        vectors = unit(vectors_of(view, rows[known]))[0]
        predict = kernel_ridge(vectors, scores[known], self.params.damping)
        found = [(at, predict(unit(block.astype(np.float64))[0])) for at, block in shared_blocks(view)]
        return joined(found, len(view.status), scores.shape[1])


def candidates(context: Context, view: View) -> np.ndarray:
    """Return the rows with an embedding and supervised tokens, in the order of their keys, (n,)."""
    rows = np.flatnonzero((view.status == Status.OK) & (context.rows.supervised > 0))
    # By key, so that clusters and landmarks do not depend on the order of the pool.
    return rows[by_key(context.rows.keys[rows])]


class InfluenceDistillation(Propagated):
    """Exact cosines for random landmarks, carried over to all rows by kernel ridge regression; target sets take turns.

    Source: arXiv 2505.19051: the training side is Adam's step without momentum, landmarks stay the same for the run.
    Deviations: the cheap vectors are embeddings, not Jacobian-vector products; turns are taken by target sets in the
    order of the run file, not by single target rows in a random one.
    """

    class Params(PropagatedFields):
        """Parameters of `influence_distillation`."""

        adam_variant: Literal["pytorch", "less_reference", "precond_only"] = Field(
            "precond_only", description="as for less; precond_only: without the momentum that all rows share"
        )
        landmarks: int = Field(4096, ge=2, le=MOST, description="rows whose gradients are computed")

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Selection:
        """Score the landmarks, carry over, choose.

        Raises:
            CoverageError: no landmark has a gradient, or too few rows can be chosen.
        """
        able = candidates(context, self.embeddings(context))
        # Named without the update, so that the landmarks are the same rows at every one.
        rows = context.rng("landmarks").permutation(able)[: self.params.landmarks]
        sets = self.regressed(context, rows, self.exact(context, self.gradients(context, rows)))
        judged = Judgement(context, sets.max(axis=1), np.zeros(len(sets), np.int32), sets)
        return (RoundRobin() if sets.shape[1] > 1 else TopK()).select(judged, num_samples)
