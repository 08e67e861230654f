"""The gradient of a prompt's expected reward, out of responses and what each of them is worth.

C responses to a prompt, R prompts, K numbers per projected gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from dataflex.features.engine import FeatureEngine
from dataflex.features.spec import GradientSpec, Projection
from dataflex.fingerprint import IGNORE_INDEX
from dataflex.rows import Status

Estimator = Literal["vanilla", "loo_baseline", "rejection", "hard_rejection", "topk"]

_SLACK = 1e-5  # of hard_rejection, as in the official code
_AT_A_TIME = 512  # responses whose gradients are held together


def response_weights(estimator: Estimator, rewards: np.ndarray, reference: float = np.nan, k: int = 10) -> np.ndarray:
    """Return the weight of each response, (C,) float64; 0 for all where there is nothing to learn.

    vanilla: R_c; a constant added to all rewards adds noise, though nothing to the expectation.
    loo_baseline: R_c minus the mean of the other rewards: the same expectation, and such a constant does not act.
    rejection: R_c / n for the n responses with R_c > 0. hard_rejection: for those that are no worse than the
    reference. topk: as rejection, among the k best; ties go to the earlier.

    Args:
        estimator: the rule.
        rewards: (C,) float64; NaN for a response that could not be scored, which is left out.
        reference: reward of the reference answer, for hard_rejection; NaN where it could not be scored.
        k: for topk.

    Source: NICE, PMLR 267:63662, whose sums over responses are kept: no division by C for vanilla, division by the
    number of responses kept for the others. Deviations: loo_baseline is not in the paper; where no response is kept,
    the reference is not put in their place.
    """
    weights = np.zeros(len(rewards))
    scored = np.flatnonzero(~np.isnan(rewards))
    found = rewards[scored]
    if estimator == "vanilla":
        weights[scored] = found
    elif estimator == "loo_baseline":
        if len(found) > 1 and np.ptp(found) > 0:  # else 0, and not what is left of it by rounding
            weights[scored] = found - (found.sum() - found) / (len(found) - 1)
    else:
        if estimator == "hard_rejection":
            kept = scored[found > reference - _SLACK]  # none, where the reference is NaN
        elif estimator == "rejection":
            kept = scored[found > 0]
        else:
            best = np.argsort(-found, kind="stable")[:k]
            kept = np.sort(scored[best[found[best] > 0]])
        weights[kept] = rewards[kept] / max(1, len(kept))
    return weights


def policy_gradients(
    engine: FeatureEngine,
    prompts: Sequence[np.ndarray],
    responses: Sequence[Sequence[np.ndarray]],
    weights: Sequence[np.ndarray],
    projection: Projection,
    normalisation: Literal["sum", "mean"] = "sum",
) -> tuple[np.ndarray, np.ndarray]:
    """Return sum_c w_c grad(-log pi(y_c | x)) of each prompt, projected, (R, K) float32, and its status, (R,) uint8.

    The engine gives the projected gradient of a response's mean loss; projection is linear, so the weighted sum of
    those is exact. Responses without weight or without a token are not run; equal ones are run once. A prompt that is
    left without a response has no signal: its status is NO_LABELS and its vector zero.

    Args:
        engine: of the model that the gradient is of.
        prompts: R times token ids (t,), not empty.
        responses: for each prompt, C times token ids (t,).
        weights: for each prompt, (C,).
        projection: how gradients are projected.
        normalisation: sum over a response's tokens, or their mean.
    """
    merged: dict[tuple[int, bytes], float] = {}
    for row, (texts, factors) in enumerate(zip(responses, weights, strict=True)):
        for ids, factor in zip(texts, factors.tolist(), strict=True):
            if len(ids) and factor:
                key = (row, ids.astype(np.int64).tobytes())
                # The engine's gradient is of the mean over the response's tokens; times their number it is of the sum.
                merged[key] = merged.get(key, 0.0) + factor * (len(ids) if normalisation == "sum" else 1)
    jobs = [(row, np.frombuffer(raw, np.int64), factor) for (row, raw), factor in merged.items() if factor]
    status = np.full(len(prompts), Status.NO_LABELS, dtype=np.uint8)
    status[[row for row, _, _ in jobs]] = Status.OK
    total: np.ndarray | None = None
    spec = GradientSpec(projection=projection)
    for start in range(0, max(1, len(jobs)), _AT_A_TIME):
        some = jobs[start : start + _AT_A_TIME]
        (found,) = engine.compute([_example(prompts[row], ids) for row, ids, _ in some], [spec])
        assert found.vectors is not None
        if total is None:
            total = np.zeros((len(prompts), found.vectors.shape[1]))
        for (row, _, factor), vector, state in zip(some, found.vectors, found.status, strict=True):
            if state != Status.OK:
                status[row] = Status.NONFINITE
            total[row] += factor * vector.astype(np.float64)  # weights of both signs: much of the sum cancels
    assert total is not None
    status[~np.isfinite(total).all(axis=1)] = Status.NONFINITE
    return np.where(status[:, None] == Status.OK, total, 0.0).astype(np.float32), status


def _example(prompt: np.ndarray, response: np.ndarray) -> dict[str, np.ndarray]:
    """Join prompt and response into one example for the engine, with labels on the response alone."""
    labels = np.concatenate([np.full(len(prompt), IGNORE_INDEX), response])
    return {"input_ids": np.concatenate([prompt, response]), "labels": labels}
