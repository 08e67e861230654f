"""Rules as parts of a method: each turns a judgement of N rows into k chosen ones. M target rows, K neighbours."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from dataflex import distributed
from dataflex.errors import CoverageError
from dataflex.selectors.base import Beginning, Selection
from dataflex.selectors.parts.interleave import interleaved
from dataflex.selectors.parts.judgement import Judgement
from dataflex.selectors.parts.representation import Part
from dataflex.selectors.parts.rules import ranking, round_robin, top_k
from dataflex.selectors.parts.sampling import band_logits, logs, sample, window_weights
from dataflex.selectors.parts.transport import Transport, clipped, kernel_density, knn_kde, knn_uniform

log = logging.getLogger(__name__)


class Rule(Part):
    """Base of rules."""

    @property
    def repeats(self) -> bool:
        """Whether it may choose a row more than once within an update."""
        return False

    def prepare(self, beginning: Beginning) -> None:
        """Refuse, before anything is computed, a pool from which the rule could never choose.

        Raises:
            CoverageError: the pool, or the number of targets, is too small.
        """

    @abstractmethod
    def select(self, judged: Judgement, k: int) -> Selection:
        """Return k rows, best first, and what the journal records.

        `Selection.pool` is what the rule prefers, larger is better: `refresh: rotating` computes such rows first.

        Raises:
            CoverageError: fewer than k rows can be chosen.
        """


class Draw(Rule):
    """Base of rules that draw."""

    replacement: bool = Field(False, description="whether a row may be drawn again within an update")

    @property
    def repeats(self) -> bool:
        """The parameter `replacement`."""
        return self.replacement

    @abstractmethod
    def logits(self, judged: Judgement) -> np.ndarray:
        """Return the logarithm of every row's weight, (N,); -inf or NaN is never drawn."""

    def select(self, judged: Judgement, k: int) -> Selection:
        """Draw k rows by a generator of the run's seed and the update."""
        context = judged.context
        # A row without a score is never drawn, whatever weight the rule gives it.
        logits = np.where(np.isfinite(judged.scores), self.logits(judged), -np.inf)
        rows = sample(logits, context.rows.keys, k, context.rng("draw", context.update), self.replacement)
        return recorded(judged, rows, logits)


def recorded(judged: Judgement, rows: np.ndarray, preference: np.ndarray) -> Selection:
    """Return a selection of rows (k,), with the preference (N,) of the rule for every row, larger is better."""
    pool = np.where(np.isfinite(judged.scores) & np.isfinite(preference), preference, -np.inf)
    return Selection(rows, judged.scores[rows], judged.ages[rows], pool, judged.scores)


class TopK(Rule):
    """The best scores."""

    kind: Literal["top_k"] = "top_k"
    order: Literal["high", "low"] = Field("high", description="which end of the scores is taken")

    def select(self, judged: Judgement, k: int) -> Selection:
        """Return the k best by (-score, tie, row key, position)."""
        scores = judged.scores if self.order == "high" else -judged.scores
        return recorded(judged, top_k(scores, judged.context.rows.keys, k, judged.ties), scores)


class RoundRobin(Rule):
    """Targets take turns, each with its best row that is not taken yet; no target dominates."""

    kind: Literal["round_robin"] = "round_robin"
    over: Literal["sets", "rows"] = Field("sets", description="who takes turns: target sets, or single target rows")
    repeat: bool = Field(
        False, description="over rows: begin with the nearest at every update; else go on with the next-nearest"
    )

    @model_validator(mode="after")
    def _acts(self) -> RoundRobin:
        if self.over == "sets" and self.repeat:
            raise ValueError("no repeat with over: sets, which begin anew at every update in any case")
        return self

    def select(self, judged: Judgement, k: int) -> Selection:
        """Return the next k rows; when the whole pool has been chosen, it is walked through again."""
        if self.over == "sets":
            assert judged.sets is not None
            rows = round_robin(judged.sets, judged.context.rows.keys, k, judged.ties)
        else:
            rows = self._next(judged, k)
        return recorded(judged, rows, judged.scores)

    def _next(self, judged: Judgement, k: int) -> np.ndarray:
        """Walk through the target rows' neighbours, passing over what this pass through the pool has chosen."""
        size = len(judged.usable)
        if size < k:
            raise CoverageError(f"{k} rows wanted at one update, found {size} that can be chosen; lower update_step")
        taken = np.empty(0, np.int64) if self.repeat else _this_pass(judged.context.history, judged.scores, size)
        walk = self._walk(judged, min(size, len(taken) + k))
        fresh = walk[~np.isin(walk, taken)][:k]
        # Where this pass through the pool ends within the update, the next one begins from the nearest rows again.
        return np.concatenate([fresh, walk[~np.isin(walk, fresh)][: k - len(fresh)]])

    def _walk(self, judged: Judgement, length: int) -> np.ndarray:
        """Return the first rows of the walk, from as few neighbours of each target as that takes."""
        assert judged.nearest is not None
        # Twice what would be enough if no row were near two targets, then doubled: whole lists would be N x M numbers.
        depth = min(judged.reach, max(16, -(-2 * length // max(1, self._targets(judged)))))
        while True:
            walk, is_short = interleaved(judged.nearest(depth)[1], length, np.isfinite(judged.scores))
            if not is_short or depth == judged.reach:
                return walk
            depth = min(2 * depth, judged.reach)

    @staticmethod
    def _targets(judged: Judgement) -> int:
        return sum(len(rows) for rows in judged.context.targets.values())


class Sample(Draw):
    """A draw with probability softmax(score / temperature)."""

    kind: Literal["sample"] = "sample"
    temperature: float = Field(1.0, gt=0, description="towards 0 the best are certain, towards infinity all are alike")

    def logits(self, judged: Judgement) -> np.ndarray:
        """Return score / temperature."""
        return judged.scores / self.temperature


class Bands(Draw):
    """A draw in which one third of the scores is favoured."""

    kind: Literal["bands"] = "bands"
    focus: Literal["low", "medium", "high"] = Field("high", description="the band that is favoured")
    focus_weight: float = Field(5.0, gt=0, description="weight of a row in it; 1 elsewhere")
    quantiles: tuple[float, float] = Field((0.33, 0.66), description="where the bands meet")
    temperature: float = Field(1.0, gt=0, description="weights are raised to 1 / temperature")

    @model_validator(mode="after")
    def _ascend(self) -> Bands:
        if not 0 <= self.quantiles[0] <= self.quantiles[1] <= 1:
            raise ValueError("quantiles that ascend within 0 to 1")
        return self

    def logits(self, judged: Judgement) -> np.ndarray:
        """Return the logarithms of the bands' weights."""
        return band_logits(judged.scores, self.quantiles, self.focus, self.focus_weight, self.temperature)


class Middle(Draw):
    """An even draw from the scores between two quantiles."""

    kind: Literal["middle"] = "middle"
    quantiles: tuple[float, float] = Field((0.33, 0.66), description="the band, its ends among it")

    @model_validator(mode="after")
    def _ascend(self) -> Middle:
        if not 0 <= self.quantiles[0] < self.quantiles[1] <= 1:
            raise ValueError("quantiles that ascend within 0 to 1")
        return self

    def logits(self, judged: Judgement) -> np.ndarray:
        """Return 0 within the band."""
        scores = judged.scores
        low, high = np.quantile(scores[judged.usable], self.quantiles) if len(judged.usable) else (0.0, 0.0)
        return np.where((scores >= low) & (scores <= high), 0.0, -np.inf)


class Window(Draw):
    """A draw from a window over the ranking that moves from the top to the bottom as the updates of an epoch go by."""

    kind: Literal["window"] = "window"
    size: float = Field(0.2, gt=0, le=1, description="width, as a share of the usable rows")
    outside: float = Field(0.025, ge=0, description="weight of a row outside; 1 inside")

    def logits(self, judged: Judgement) -> np.ndarray:
        """Return the logarithms of the window's weights."""
        context = judged.context
        steps = context.updates - 1
        progress = (context.round.update - 1) / steps if steps > 0 else 0.0
        ranks = ranking(judged.scores, context.rows.keys)
        weights = window_weights(judged.scores, ranks, self.size, min(1.0, max(0.0, progress)), self.outside)
        if len(ranks) and not (weights == 1).any() and 0 < self.outside != 1 and distributed.is_main():
            log.warning(
                "update %d: no row lies in the window, so all are drawn alike: it is %.1f rows wide, and %d of %d "
                "rows have a score of 0 or more, behind which it ends",
                context.round.update, self.size * len(ranks), int((judged.scores[ranks] >= 0).sum()), len(ranks),
            )  # fmt: skip
        return logs(weights)


class _Plan(Draw):
    """Base of the rules that send every target row's mass to its nearest training rows."""

    alpha: float = Field(0.5, ge=0, le=1, description="1: the nearest row alone; 0: spread as far as max_K")
    C: float = Field(1.0, gt=0, description="length that distances are compared with; about 1 suits unit vectors")
    max_K: int = Field(5000, ge=2, description="neighbours of a target row, at most a tenth of the pool")

    def prepare(self, beginning: Beginning) -> None:
        """Refuse too few rows, and without replacement a choice of more than can be neighbours of target rows."""
        # Before any feature is computed: `clipped` and the product depend on counts alone.
        if not beginning.largest:
            return
        most, _ = clipped(self.max_K, 1, beginning.eligible)
        queries = sum(len(rows) for rows in beginning.targets.values())
        if not self.replacement and queries * most < beginning.largest:
            raise CoverageError(
                f"{beginning.largest} rows wanted at one update, found at most {queries * most} that {queries} target "
                f"rows with {most} neighbours each can reach; lower update_step or the batch size, raise max_K (at "
                "most a tenth of the pool acts), or set replacement: true"
            )

    def logits(self, judged: Judgement) -> np.ndarray:
        """Return the logarithms of the plan's probabilities."""
        plan = self.plan(judged)
        said = "transport: a target row's mass goes to %.1f rows on average, %d rows can be drawn"
        log.info(said, plan.neighbourhood, plan.support)
        return logs(plan.p)

    @abstractmethod
    def plan(self, judged: Judgement) -> Transport:
        """Return the probability of every training row."""


class KnnUniform(_Plan):
    """TSDS with an even share for the K nearest of every target row (arXiv 2410.11303)."""

    kind: Literal["knn_uniform"] = "knn_uniform"

    def plan(self, judged: Judgement) -> Transport:
        """Return the probability of every training row."""
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
        """Return the probability of every training row."""
        assert judged.nearest is not None
        assert judged.vectors is not None
        most, counted = clipped(self.max_K, self.kde_K, len(judged.usable))
        distances, neighbours = judged.nearest(most)
        density = kernel_density(judged.vectors(np.unique(neighbours)), self.sigma, counted)
        return knn_kde(neighbours, distances, density, len(judged.scores), self.alpha, self.C)


def _this_pass(history: Sequence[np.ndarray], scores: np.ndarray, size: int) -> np.ndarray:
    """Return the rows that the present pass through the `size` usable rows has chosen already."""
    # Rows that can no longer be chosen are no part of a pass; every `size` of the others are a pass that is over.
    once = [rows[np.sort(np.unique(rows, return_index=True)[1])] for rows in history]
    chosen = np.concatenate([np.empty(0, np.int64), *once])
    chosen = chosen[np.isfinite(scores[chosen])]
    return chosen[len(chosen) - len(chosen) % size :]


Choice = Annotated[
    TopK | RoundRobin | Sample | Bands | Middle | Window | KnnUniform | KnnKde, Field(discriminator="kind")
]
NEIGHBOURLY = (KnnUniform, KnnKde)
"""Rules that look at the nearest rows of every target; so does `RoundRobin` over rows."""
