"""Representations that are one number per row and look at no target: losses and what is made of them.

N training rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from pydantic import Field

from dataflex.features.spec import BASE, LossSpec
from dataflex.rows import Status
from dataflex.selectors.base import Context, Need, View
from dataflex.selectors.parts.representation import Numbers


class Loss(Numbers):
    """The cross-entropy of a row's supervised tokens."""

    kind: Literal["loss"] = "loss"
    measure: Literal["mean", "sum", "perplexity"] = Field(
        "mean", description="nats per supervised token; nats per row; exp(mean)"
    )
    model: Literal["base", "live"] = Field("live", description="base: before any training; live: at the update")

    def needs(self) -> list[Need]:
        """Need the loss."""
        return [Need(LossSpec(), "train", BASE if self.model == "base" else None)]

    def values(self, context: Context) -> tuple[np.ndarray, np.ndarray]:
        """Return the measure; an infinite perplexity counts as not judged."""
        view = context.features(LossSpec(), state=self.needs()[0].state)
        total = losses(view, mean=self.measure != "sum")
        with np.errstate(over="ignore"):
            return (np.exp(total) if self.measure == "perplexity" else total), view.ages


class DeltaLoss(Numbers):
    """How much a row's mean loss has changed since a baseline; positive is learned."""

    kind: Literal["delta_loss"] = "delta_loss"
    baseline: str = Field(
        BASE, description="base: the model before any training; or a checkpoint folder, such as a reference model's"
    )
    score: Literal["delta", "relative_delta", "excess"] = Field(
        "delta",
        description="delta: l0 - l; relative_delta: (l0 - l) / l0; excess: l - l0, the reducible loss if the baseline "
        "was trained on clean data",
    )

    def needs(self) -> list[Need]:
        """Need the loss at the baseline and now."""
        return [Need(LossSpec(), "train", self.baseline), Need(LossSpec(), "train")]

    def values(self, context: Context) -> tuple[np.ndarray, np.ndarray]:
        """Return the score."""
        before, view = context.features(LossSpec(), state=self.baseline), context.features(LossSpec())
        first, now = losses(before), losses(view)
        formulas: dict[str, Callable[[], np.ndarray]] = {
            "delta": lambda: first - now,
            "relative_delta": lambda: np.divide(first - now, first, out=np.full_like(first, np.nan), where=first != 0),
            "excess": lambda: now - first,
        }
        return formulas[self.score](), view.ages


class InstructionDifficulty(Numbers):
    """IFD: perplexity of the response given the prompt, over its perplexity alone.

    Source: arXiv 2308.12032, 2402.00530 (a small model ranks as well). Deviation: alone, the response's first token has
    nothing before it and is not predicted, so it is left out of both perplexities. The official code counts it in the
    first alone, which for short responses decides: the ratio then says how surprising that one token is, and `most`
    drops whole sources.
    """

    kind: Literal["ifd"] = "ifd"
    model: Literal["base", "live"] = Field("base", description="base: before any training; live: at the update")
    most: float = Field(1.0, gt=0, description="rows at or above are left out: the prompt does not help them")
    first_token: Literal["drop", "keep"] = Field(
        "drop", description="keep: the response's first token counts where the prompt is given, as in the official code"
    )

    def needs(self) -> list[Need]:
        """Need the loss with the prompt and without."""
        state = BASE if self.model == "base" else None
        given = LossSpec(first_token=self.first_token)
        return [Need(given, "train", state), Need(LossSpec(given="nothing"), "train", state)]

    def values(self, context: Context) -> tuple[np.ndarray, np.ndarray]:
        """Return the ratio, NaN where the row is left out."""
        views = [context.features(need.spec, state=need.state) for need in self.needs()]
        with np.errstate(over="ignore"):
            ratio = np.exp(losses(views[0]) - losses(views[1]))  # each perplexity alone could overflow
        return np.where(ratio < self.most, ratio, np.nan), views[0].ages


def losses(view: View, mean: bool = True) -> np.ndarray:
    """Return each row's loss in nats, per supervised token or summed, (N,) float64; NaN where there is none."""
    tokens, total = view.scalar("tokens"), view.scalar("loss_sum").astype(np.float64)
    usable = (view.status == Status.OK) & (tokens > 0) & np.isfinite(total)
    return np.divide(total, tokens if mean else 1, out=np.full(len(total), np.nan), where=usable)
