"""Weights of mean 1 over the examples of a group that have a loss; M examples, no host synchronisation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a run file is checked without torch
    from torch import Tensor


def mean_one(weights: Tensor, usable: Tensor) -> Tensor:
    """Scale weights (M,) so that their mean over the usable examples is 1; all 0 where they sum to 0.

    Args:
        weights: (M,) float64, 0 or more, 0 where not usable.
        usable: (M,) bool, examples that the mean is over; one whose weight is 0 counts.
    """
    total = weights.sum()
    return weights * usable.sum() / total.where(total > 0, 1.0)


def softmax(scores: Tensor, judged: Tensor, usable: Tensor, cap: float | None = None) -> Tensor:
    """Return weights proportional to exp(score) with mean 1 over the usable examples, (M,) float64.

    Args:
        scores: (M,) float64; read where judged.
        judged: (M,) bool, usable examples that have a score; the others have weight 0.
        usable: (M,) bool, examples that the mean is over.
        cap: largest weight, above 1; what is above is spread over the other judged examples by their weights, as often
            as it takes. None, or a cap that the mean cannot be reached under: no limit.
    """
    if not len(scores):
        return scores.double()
    logits = scores.double().where(judged, -math.inf)
    # Tensors all along: an `if` on a value would make the host wait for the GPU at every step.
    top = logits.max()
    logits = logits - top.where(top.isfinite(), 0.0)
    weights = mean_one(logits.exp(), usable)
    return weights if cap is None else _capped(logits, weights, usable.sum(), cap)


def effective_size(weights: Tensor) -> Tensor:
    """Return (sum w)^2 / sum w^2, a scalar: how many examples of equal weight are worth as much; 0 of no weight."""
    squares = weights.square().sum()
    return weights.sum().square() / squares.where(squares > 0, 1.0)


def _capped(logits: Tensor, weights: Tensor, total: Tensor, cap: float) -> Tensor:
    """Water-filling in closed form: the k highest get the cap, the rest share what is left, for the least k that fits.

    In logarithms, as the rest may be too small to be told from 0 beside the highest.
    """
    ranked, order = logits.sort(descending=True)
    number = ranked.new_ones(len(ranked)).cumsum(0) - 1
    rest = ranked.flip(0).logcumsumexp(0).flip(0)  # of those from the k-th on
    scale = (total - cap * number).clamp(min=0).log() - rest
    fits = (scale + ranked <= math.log(cap)) & rest.isfinite()
    k = fits.int().argmax(0, keepdim=True)
    filled = (ranked + scale.gather(0, k)).exp().clamp(max=cap).where(number >= k, cap)
    return filled.scatter(0, order, filled).where((weights.max() > cap) & fits.any(), weights)
