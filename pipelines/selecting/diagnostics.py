"""What one update came to as a whole: the figures by which a person sees whether its choice is sound.

They describe what the update had anyway, scores and vectors, and decide nothing. docs/diagnostics.md says what to make
of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dataflex import distributed
from dataflex.features.need import View
from dataflex.features.spec import FeatureSpec
from dataflex.pipelines.selecting.prefilter import Candidates
from dataflex.rows import Rows, Status
from dataflex.selectors.base import Selection
from dataflex.selectors.parts.similarity import shared_blocks, unit

MOST_ROWS = 16_384
"""Rows whose vectors are read for the common direction, evenly spaced in the pool: its error is below 0.01 then."""


@dataclass(frozen=True)
class Diagnostics:
    """The figures of one update; None, or empty, where a method has no such thing. Correlations are Spearman's.

    Attributes:
        scored: training rows with a finite score.
        score_mean: mean of their scores.
        score_deviation: standard deviation of their scores.
        score_least: lowest score.
        score_most: highest score.
        below_zero: how many scores are below 0.
        length_correlation: of score and tokens of a row.
        norm_correlation: of score and norm of a row's gradient, also where the method takes Adam's step on it; over
            several checkpoints, of the norms' mean.
        common_direction: by kind of feature, the mean cosine of the rows' vectors with their common direction, 0 to 1;
            over several checkpoints, the mean.
        overlap: share of the distinct rows chosen that the last update had chosen as well.
        sources: rows chosen, by dataset.
        candidates: rows that a prefilter let through, its sample of the others among them.
        tail: of them, those of the sample.
        tail_chosen: of these, those that were chosen.
        lost: estimated share of a choice from the whole pool that would have been rows which were left out, 0 to 1.
    """

    scored: int | None = None
    score_mean: float | None = None
    score_deviation: float | None = None
    score_least: float | None = None
    score_most: float | None = None
    below_zero: int | None = None
    length_correlation: float | None = None
    norm_correlation: float | None = None
    common_direction: Mapping[str, float] = field(default_factory=dict)
    overlap: float | None = None
    sources: Mapping[str, int] = field(default_factory=dict)
    candidates: int | None = None
    tail: int | None = None
    tail_chosen: int | None = None
    lost: float | None = None

    def plain(self) -> dict[str, Any]:
        """Return what there is, as plain data; `Diagnostics(**plain)` is the same record."""
        return {name: value for name, value in asdict(self).items() if value is not None and value != {}}

    def metrics(self) -> dict[str, float]:
        """Return what there is as numbers by name, for a training log."""
        found: dict[str, float] = {}
        for name, value in self.plain().items():
            if isinstance(value, dict):
                found |= {f"dataflex/{name}/{part}": number for part, number in value.items()}
            else:
                found[f"dataflex/{name}"] = value
        chosen = sum(self.sources.values())
        return found | {f"dataflex/share/{name}": count / chosen for name, count in self.sources.items()}

    def __str__(self) -> str:
        """Say what there is in one line, sources left out: the line of the round has them."""
        parts = []
        if self.scored:
            below = f", {self.below_zero} below 0" if self.below_zero else ""
            parts.append(
                f"scores of {self.scored} rows: mean {self.score_mean:.3g}, deviation {self.score_deviation:.3g}, "
                f"{self.score_least:.3g} to {self.score_most:.3g}{below}"
            )
        parts += [f"mean cosine with the mean {kind} {share:.2f}" for kind, share in self.common_direction.items()]
        if self.length_correlation is not None:
            parts.append(f"correlation with length {self.length_correlation:.2f}")
        if self.norm_correlation is not None:
            parts.append(f"correlation with the gradient's norm {self.norm_correlation:.2f}")
        if self.overlap is not None:
            parts.append(f"{self.overlap:.0%} of the rows as at the last update")
        if self.candidates is not None:
            parts.append(f"{self.candidates} rows behind the prefilter")
        if self.lost is not None:
            so = f": about {self.lost:.0%} of the choice is lost" if self.lost else ""
            parts.append(f"{self.tail_chosen} of {self.tail} rows drawn from the others were chosen{so}")
        return "; ".join(parts)


def diagnose(
    rows: Rows,
    selection: Selection,
    views: Sequence[tuple[FeatureSpec, View]],
    last: np.ndarray | None,
    norms: np.ndarray | None = None,
) -> Diagnostics:
    """Describe an update. Collective.

    Args:
        rows: the training rows, N.
        selection: what was chosen.
        views: features of all training rows that the update had, each with what it is.
        last: rows of the update before, or None.
        norms: what `gradient_norms` returns, if it was asked already.
    """
    judged = selection.pool if selection.judged is None else selection.judged
    scores = np.full(len(rows), np.nan) if judged is None else np.asarray(judged, dtype=np.float64)
    names, counts = np.unique(rows.dataset[selection.rows], return_counts=True)
    return Diagnostics(
        **_spread(scores[np.isfinite(scores)]),
        length_correlation=rank_correlation(scores, rows.length),
        norm_correlation=rank_correlation(scores, gradient_norms(views, len(rows)) if norms is None else norms),
        common_direction=_directions(views),
        overlap=None if last is None else _rounded(np.isin(np.unique(selection.rows), last).mean()),
        sources={rows.names[name]: count for name, count in zip(names.tolist(), counts.tolist(), strict=True)},
    )


def behind_prefilter(found: Diagnostics, picked: Candidates, chosen: np.ndarray) -> Diagnostics:
    """Add what a prefilter let through, and what its sample of the others says was lost.

    Args:
        found: the record of the update.
        picked: the rows that went on.
        chosen: (k,) positions among them, best first.
    """
    lost, tail = picked.lost(chosen), int(picked.is_tail.sum())
    found = replace(found, candidates=len(picked.rows))
    if lost is None:
        return found
    return replace(found, tail=tail, tail_chosen=int(picked.is_tail[chosen].sum()), lost=_rounded(lost))


def common_direction(view: View) -> float | None:
    """Return the mean cosine of a view's vectors with their common direction, None without any. Collective.

    The common direction is the mean of the vectors, each scaled to length one, so the number is the length of that
    mean: 1 where all point alike, about 1 / sqrt(n) for n vectors that have nothing in common. Rows that are not
    usable, not finite or zero do not enter. In a pool of more than `MOST_ROWS` rows so many stand for all.
    """
    size = len(view.status)
    some = view if size <= MOST_ROWS else view.take(np.arange(MOST_ROWS) * size // MOST_ROWS)
    count, total = 0, np.zeros(1)
    for _, vectors in shared_blocks(some):
        directions, has_length = unit(np.asarray(vectors, dtype=np.float64))
        count, total = count + int(has_length.sum()), total + directions[has_length].sum(axis=0)
    shares = distributed.gather((count, total))
    counted = sum(count for count, _ in shares)
    return float(np.linalg.norm(sum(total for _, total in shares))) / counted if counted else None


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return Spearman's correlation of two columns, (N,) each, over the rows where both are finite.

    Equal values have the mean of their ranks. None with fewer than three such rows, or where a column is constant.
    """
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3:
        return None
    first, second = (_ranks(column[both]) for column in (a, b))
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return _rounded(first @ second / scale) if scale else None


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks less their mean, (n,) float64; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse] - (len(values) + 1) / 2


def _spread(scores: np.ndarray) -> dict[str, Any]:
    if not len(scores):
        return {}
    return {
        "scored": len(scores),
        "score_mean": _rounded(scores.mean()),
        "score_deviation": _rounded(scores.std()),
        "score_least": _rounded(scores.min()),
        "score_most": _rounded(scores.max()),
        "below_zero": int((scores < 0).sum()),
    }


def gradient_norms(views: Sequence[tuple[FeatureSpec, View]], size: int) -> np.ndarray:
    """Return the norm of every row's gradient, (N,) float64, NaN where there is none."""
    found = [
        np.where(view.status == Status.OK, view.scalar(spec.norm_column), np.nan)
        for spec, view in _of_one_kind(views)
        if spec.norm_column is not None
    ]
    return np.stack(found).mean(axis=0, dtype=np.float64) if found else np.full(size, np.nan)


def _directions(views: Sequence[tuple[FeatureSpec, View]]) -> dict[str, float]:
    """Return the share of the common direction by kind of feature. Collective."""
    by_kind: dict[str, list[float]] = {}
    for spec, view in _of_one_kind(views):
        # The other vectors, losses by token, have a width and no direction.
        share = common_direction(view) if spec.has_direction else None
        if share is not None:
            by_kind.setdefault(spec.kind, []).append(share)
    return {kind: _rounded(np.mean(shares)) for kind, shares in by_kind.items()}


def _of_one_kind(views: Sequence[tuple[FeatureSpec, View]]) -> list[tuple[FeatureSpec, View]]:
    """Leave out what a method asks for besides its first feature of a kind: a mean over both would be of neither."""
    first: dict[str, FeatureSpec] = {}
    return [(spec, view) for spec, view in views if first.setdefault(spec.kind, spec) == spec]


def _rounded(value: Any) -> float:
    return float(f"{float(value):.6g}")
