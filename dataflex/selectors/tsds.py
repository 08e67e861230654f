"""TSDS: rows are drawn by probabilities that target rows hand to their nearest rows in the pool (optimal transport).

N training rows.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from dataflex.components.params import ExistingFile
from dataflex.errors import CoverageError, MismatchError
from dataflex.rows import Rows
from dataflex.selectors.base import Beginning, Context, Need, Selection
from dataflex.selectors.composed import Composed, Composition
from dataflex.selectors.near import Compared
from dataflex.selectors.parts.array_file import load_array
from dataflex.selectors.parts.choice import Choice, KnnKde, KnnUniform
from dataflex.selectors.parts.representation import Part, part
from dataflex.selectors.parts.sampling import logs, sample
from dataflex.selectors.parts.vectors import EmbeddingVectors


class Tsds(Composed):
    """Draws rows near the targets, spread as far as `alpha` and `C` say, near duplicates sharing one row's chance.

    Source: TSDS, arXiv 2410.11303; see `dataflex.selectors.parts.transport`. Deviations: distances are between unit
    vectors, and so C is 1 by default (5 in the official code); exact neighbours; drawn without replacement unless
    asked, from the run's seed.
    """

    class Params(Part):
        """Parameters of `tsds`."""

        representation: Compared = Field(EmbeddingVectors(), description="what is near: embeddings or gradients")
        alpha: float = Field(0.6, ge=0, le=1, description="1: the nearest row alone; 0: spread as far as max_K")
        C: float = Field(1.0, gt=0, description="length that distances are compared with; about 1 suits unit vectors")
        max_K: int = Field(5000, ge=2, description="neighbours of a target row, at most a tenth of the pool")
        density: Literal["kde", "uniform"] = Field(
            "kde", description="kde: near duplicates share a chance; uniform: not"
        )
        sigma: float = Field(0.75, ge=0, description="kde: distance from which on rows are no near duplicates")
        kde_K: int = Field(1000, ge=1, description="kde: neighbours that count, at most a tenth of the pool")
        replacement: bool = Field(False, description="whether a row may be drawn again within an update")
        probs_path: ExistingFile | None = Field(
            None, description="precomputed: .npy of one probability per row (N,); nothing is computed then"
        )
        cache_dir: str | None = Field(
            None, description="root of the stores where neither dataflex.store nor DATAFLEX_HOME is set"
        )

    def composition(self, params: Params) -> Composition:
        """Return the parts."""
        rule: Choice = part(KnnKde, params) if params.density == "kde" else part(KnnUniform, params)
        return Composition(representation=params.representation, similarity="cosine", within="max", rule=rule)

    def needs(self) -> list[Need]:
        """Return the representation's features, none where the probabilities are given."""
        return [] if self.params.probs_path else super().needs()

    def prepare(self, beginning: Beginning) -> None:
        """Check the given probabilities, if there are any, against the training set.

        Raises:
            MismatchError: the file does not hold one probability per training row.
            CoverageError: an update needs more rows than can be drawn.
        """
        if self.params.probs_path is None:
            super().prepare(beginning)
            return
        able = int(np.isfinite(self._given(beginning.rows)).sum())
        needed = min(1, beginning.largest) if self.params.replacement else beginning.largest
        if able < needed:
            raise CoverageError(
                f"{self.params.probs_path}: {beginning.largest} rows wanted at one update, found {able} with "
                "supervised tokens and a probability above 0; lower update_step or the batch size, or set replacement: "
                "true"
            )

    def select(self, model: object, step_id: int, num_samples: int, *, context: Context, **kwargs: object) -> Selection:
        """Draw from the plan, or from the given probabilities."""
        if self.params.probs_path is None:
            return super().select(model, step_id, num_samples, context=context)
        scores = self._given(context.rows)
        rng = context.rng("draw", context.update)
        # -inf has no logarithm; as the weight 0 such a row is never drawn either.
        rows = sample(logs(np.maximum(scores, 0)), context.rows.keys, num_samples, rng, self.params.replacement)
        return Selection(rows, scores[rows], np.full(len(rows), -1, np.int32), scores)  # ages: nothing was computed

    def _given(self, rows: Rows) -> np.ndarray:
        """Return the given probability of every row, (N,) float64; -inf where it cannot be drawn."""
        path = str(self.params.probs_path)
        p = load_array(path)
        if p.shape != (len(rows),) or p.dtype.kind != "f" or not np.isfinite(p).all() or p.min(initial=0) < 0:
            raise MismatchError(
                f"{path}: found {p.dtype} {list(p.shape)}; expected {len(rows)} finite numbers of 0 or more, one per "
                "training row"
            )
        return np.where((rows.supervised > 0) & (p > 0), p.astype(np.float64), -np.inf)
