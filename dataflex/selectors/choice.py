"""Rules as parts of a method: each turns a judgement of the rows into k of them."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from dataflex.errors import CoverageError
from dataflex.selectors.base import Selection
from dataflex.selectors.interleave import interleaved
from dataflex.selectors.judgement import Judgement
from dataflex.selectors.representation import Part
from dataflex.selectors.rules import ranking, round_robin, top_k
from dataflex.selectors.sampling import band_weights, sample, window_weights
from dataflex.selectors.transport import Transport, clipped, kernel_density, knn_kde, knn_uniform

log = logging.getLogger(__name__)


class Rule(Part):
    """Base of rules."""

    def choose(self, judged: Judgement, k: int) -> np.ndarray:
        """Return k rows, best first.

        Raises:
            CoverageError: fewer than k can be chosen.
        """
        raise NotImplementedError

    def select(self, judged: Judgement, k: int) -> Selection:
        """Return the rows with what the journal records of them."""
        rows = self.choose(judged, k)
        pool = np.where(np.isfinite(judged.scores), judged.scores, -np.inf)
        return Selection(rows, pool[rows], judged.ages[rows], pool)


class TopK(Rule):
    """The best scores."""

    kind: Literal["top_k"] = "top_k"
    order: Literal["high", "low"] = Field("high", description="which end of the scores is taken")

    def choose(self, judged: Judgement, k: int) -> np.ndarray:
        """Return the k best by (-score, tie, row key, position)."""
        scores = judged.scores if self.order == "high" else -judged.scores
        return top_k(scores, judged.context.rows.keys, k, judged.ties)


class RoundRobin(Rule):
    """Targets take turns, each with its best row that is not taken yet; no target dominates."""

    kind: Literal["round_robin"] = "round_robin"
    over: Literal["sets", "rows"] = Field("sets", description="who takes turns: target sets, or single target rows")
    repeat: bool = Field(
        False, description="over rows: begin with the nearest at every update; else go on with the next-nearest"
    )

    def choose(self, judged: Judgement, k: int) -> np.ndarray:
        """Return the next k rows of the walk; when the pool has been walked through, the walk begins again."""
        if self.over == "sets":
            assert judged.sets is not None
            return round_robin(judged.sets, judged.context.rows.keys, k, judged.ties)
        assert judged.nearest is not None
        size = len(judged.usable)
        if size < k:
            raise CoverageError(f"{k} rows wanted at one update, found {size} that can be chosen; lower update_step")
        start = 0 if self.repeat else sum(len(rows) for rows in judged.context.history) % size
        walk = self._walk(judged, min(start + k, size))
        return np.concatenate([walk[start : start + k], walk[: max(0, start + k - size)]])

    def _walk(self, judged: Judgement, length: int) -> np.ndarray:
        """Return the first rows of the walk, from as few neighbours of each target as that takes."""
        assert judged.nearest is not None
        width = min(length, len(judged.usable))
        depth = min(width, max(16, -(-2 * width // max(1, self._targets(judged)))))
        while True:
            walk, is_short = interleaved(judged.nearest(depth)[1], length, np.isfinite(judged.scores))
            if not is_short or depth == len(judged.usable):
                return walk
            depth = min(2 * depth, len(judged.usable))

    @staticmethod
    def _targets(judged: Judgement) -> int:
        return sum(len(rows) for rows in judged.context.targets.values())


class Sample(Rule):
    """A draw with probability softmax(score / temperature)."""

    kind: Literal["sample"] = "sample"
    temperature: float = Field(1.0, gt=0, description="towards 0 the best are certain, towards infinity all are alike")
    replacement: bool = Field(False, description="whether a row may be drawn again within an update")

    def choose(self, judged: Judgement, k: int) -> np.ndarray:
        """Draw k rows."""
        weights = np.zeros(len(judged.scores))
        usable = judged.usable
        if len(usable):
            weights[usable] = np.exp((judged.scores[usable] - judged.scores[usable].max()) / self.temperature)
        return drawn(judged, weights, k, self.replacement)


class Bands(Rule):
    """A draw in which one third of the scores is favoured."""

    kind: Literal["bands"] = "bands"
    focus: Literal["low", "medium", "high"] = Field("high", description="the band that is favoured")
    focus_weight: float = Field(5.0, gt=0, description="weight of a row in it; 1 elsewhere")
    quantiles: tuple[float, float] = Field((0.33, 0.66), description="where the bands meet")
    temperature: float = Field(1.0, gt=0, description="weights are raised to 1 / temperature")
    replacement: bool = Field(False, description="whether a row may be drawn again within an update")

    @model_validator(mode="after")
    def _ascend(self) -> Bands:
        if not 0 <= self.quantiles[0] <= self.quantiles[1] <= 1:
            raise ValueError("quantiles that ascend within 0 to 1")
        return self

    def choose(self, judged: Judgement, k: int) -> np.ndarray:
        """Draw k rows."""
        weights = band_weights(judged.scores, self.quantiles, self.focus, self.focus_weight, self.temperature)
        return drawn(judged, weights, k, self.replacement)


class Middle(Rule):
    """An even draw from the scores between two quantiles."""

    kind: Literal["middle"] = "middle"
    quantiles: tuple[float, float] = Field((0.33, 0.66), description="the band, its ends among it")

    @model_validator(mode="after")
    def _ascend(self) -> Middle:
        if not 0 <= self.quantiles[0] < self.quantiles[1] <= 1:
            raise ValueError("quantiles that ascend within 0 to 1")
        return self

    def choose(self, judged: Judgement, k: int) -> np.ndarray:
        """Draw k rows."""
        scores = judged.scores
        low, high = np.quantile(scores[judged.usable], self.quantiles) if len(judged.usable) else (0.0, 0.0)
        return drawn(judged, ((scores >= low) & (scores <= high)).astype(np.float64), k, False)


class Window(Rule):
    """A draw from a window over the ranking that moves from the top to the bottom as the updates of an epoch go by."""

    kind: Literal["window"] = "window"
    size: float = Field(0.2, gt=0, le=1, description="width, as a share of the usable rows")
    outside: float = Field(0.025, ge=0, description="weight of a row outside; 1 inside")

    def choose(self, judged: Judgement, k: int) -> np.ndarray:
        """Draw k rows."""
        context = judged.context
        steps = context.updates - 1
        progress = (context.round.update - 1) / steps if steps > 0 else 0.0
        ranks = ranking(judged.scores, context.rows.keys)
        weights = window_weights(judged.scores, ranks, self.size, min(1.0, max(0.0, progress)), self.outside)
        return drawn(judged, weights, k, False)


class _Plan(Rule):
    """Base of the rules that send every target row's mass to its nearest training rows."""

    alpha: float = Field(0.5, ge=0, le=1, description="1: the nearest row alone; 0: spread as far as max_K")
    C: float = Field(5.0, gt=0, description="length that distances are compared with; about 1 suits unit vectors")
    max_K: int = Field(5000, ge=2, description="neighbours of a target row, at most a tenth of the pool")
    replacement: bool = Field(False, description="whether a row may be drawn again within an update")

    def choose(self, judged: Judgement, k: int) -> np.ndarray:
        """Draw k rows from the plan's probabilities."""
        plan = self.plan(judged)
        log.info(
            "transport: a target row's mass goes to %.1f rows on average, %d rows can be drawn",
            plan.neighbourhood,
            plan.support,
        )
        return drawn(judged, plan.p, k, self.replacement)

    def plan(self, judged: Judgement) -> Transport:
        """Return what every training row gets."""
        raise NotImplementedError


class KnnUniform(_Plan):
    """TSDS with an even share for the K nearest of every target row (arXiv 2410.11303)."""

    kind: Literal["knn_uniform"] = "knn_uniform"

    def plan(self, judged: Judgement) -> Transport:
        """Return what every training row gets."""
        assert judged.nearest is not None
        most, _ = clipped(self.max_K, 1, len(judged.usable))
        distances, neighbours = judged.nearest(most)
        return knn_uniform(neighbours, distances, len(judged.scores), self.alpha, self.C)


class KnnKde(_Plan):
    """TSDS in which near duplicates share one row's part (arXiv 2410.11303)."""

    kind: Literal["knn_kde"] = "knn_kde"
    sigma: float = Field(0.75, ge=0, description="distance from which on rows are no near duplicates; 0: none are")
    kde_K: int = Field(1000, ge=1, description="neighbours that count for a density, at most a tenth of the pool")

    def plan(self, judged: Judgement) -> Transport:
        """Return what every training row gets."""
        assert judged.nearest is not None
        assert judged.vectors is not None
        most, counted = clipped(self.max_K, self.kde_K, len(judged.usable))
        distances, neighbours = judged.nearest(most)
        density = kernel_density(judged.vectors(np.unique(neighbours)), self.sigma, counted)
        return knn_kde(neighbours, distances, density, len(judged.scores), self.alpha, self.C)


Choice = Annotated[
    TopK | RoundRobin | Sample | Bands | Middle | Window | KnnUniform | KnnKde, Field(discriminator="kind")
]
NEIGHBOURLY = (KnnUniform, KnnKde)
"""Rules that look at the nearest rows of every target; so does `RoundRobin` over rows."""


def drawn(judged: Judgement, weights: np.ndarray, k: int, replacement: bool) -> np.ndarray:
    """Draw k rows by a generator of the run's seed and the update."""
    context = judged.context
    return sample(weights, context.rows.keys, k, context.rng("draw", context.update), replacement)
