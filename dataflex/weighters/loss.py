"""Weights by the loss under the live model, compared with the range of losses in the group. M examples of a group."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from dataflex.weighters.base import Group, NativeWeighter, WeighterParams
from dataflex.weighters.relative import softmax

if TYPE_CHECKING:  # a run file is checked without torch
    from torch import Tensor

_LEAST_RANGE = 1e-6  # nats; below, losses are equal but for rounding, which must not be stretched to [-delta, delta]


class ByLoss(NativeWeighter):
    """Weighs by softmax(f(h) / r), where h in [-delta, delta] is where the loss lies between the group's ends.

    Source: Sow et al., arXiv 2502.06733; there the weights sum to 1 over the group, here to its number of examples.
    Deviations: an example without a finite loss is in neither range nor weights; `uniform` is the plain loss, while in
    the authors' README it is what is called `exponential` here; the cap and the quantiles are additions.
    """

    class Params(WeighterParams):
        """Parameters of `loss`."""

        strategy: Literal["linupper", "quadratic", "extremes", "exponential", "uniform"] = Field(
            "linupper",
            description="f(h). linupper: min(h + delta, delta), easy examples count less; quadratic: 1 - h^2 / "
            "delta^2, the middle more; extremes: |h|; exponential: h; uniform: the plain loss",
        )
        delta: float = Field(1.0, gt=0, description="h is scaled to [-delta, delta]")
        temperature: float = Field(
            1.0, gt=0, description="r: the smaller, the further weights are apart; 0.4 to 1 in the paper's runs"
        )
        schedule: Literal["constant", "linear", "inverse"] = Field(
            "constant",
            description="r at step t since the weighter began to act: as it is; linear: from initial_temperature "
            "straight down over anneal_steps; inverse: temperature x anneal_steps / t, from infinity at t = 0 on",
        )
        anneal_steps: int = Field(
            0, ge=0, description="linear, inverse: optimizer steps after which r is the temperature"
        )
        initial_temperature: float = Field(100.0, gt=0, description="linear: r at the first step")
        weight_cap: float | None = Field(
            None,
            gt=1,
            description="largest weight, the mean being 1, as 2.0; what is above goes to the other examples",
        )
        range_quantiles: tuple[float, float] = Field(
            (0.0, 1.0), description="quantiles of the group's losses that are the ends; losses beyond count as the ends"
        )

        @model_validator(mode="after")
        def _fits(self) -> ByLoss.Params:
            low, high = self.range_quantiles
            if not 0 <= low < high <= 1:
                raise ValueError("range_quantiles that ascend within 0 to 1")
            if (self.schedule == "constant") != (self.anneal_steps == 0):
                raise ValueError(
                    "anneal_steps of 1 or more with schedule: linear or inverse, and none with schedule: constant"
                )
            given = {
                name for name in type(self).model_fields if getattr(self, name) != type(self).model_fields[name].default
            }
            if self.schedule != "linear" and "initial_temperature" in given:
                raise ValueError("no initial_temperature: it acts with schedule: linear alone")
            idle = given - {"strategy", "normalisation", "reduction"}
            if self.strategy == "uniform" and idle:
                raise ValueError(f"no {', '.join(sorted(idle))} with strategy: uniform, which is the plain loss")
            return self

    params: Params

    @property
    def compares(self) -> bool:
        """True except for uniform weights."""
        return self.params.strategy != "uniform"

    def temperature(self, since: int) -> float:
        """Return r of the next step, `since` steps after the weighter began to act."""
        params = self.params
        if params.schedule == "constant" or since >= params.anneal_steps:
            return params.temperature
        if params.schedule == "linear":
            part = since / params.anneal_steps
            return params.initial_temperature + (params.temperature - params.initial_temperature) * part
        return params.temperature * params.anneal_steps / since if since else float("inf")  # at first all weigh alike

    def weights(self, group: Group) -> Tensor:
        """Return the weights, (M,) float64, mean 1 over the usable examples; all 1 if their losses are equal."""
        params, usable = self.params, group.usable
        if params.strategy == "uniform" or not len(usable):
            return usable.double()
        place = position(group.losses.double(), usable, params.delta, params.range_quantiles)
        functions: dict[str, Callable[[], Tensor]] = {
            "linupper": lambda: (place + params.delta).clamp(max=params.delta),
            "quadratic": lambda: 1 - (place / params.delta).square(),
            "extremes": place.abs,
            "exponential": lambda: place,
        }
        return softmax(
            functions[params.strategy]() / self.temperature(group.since), usable, usable, cap=params.weight_cap
        )


def position(losses: Tensor, usable: Tensor, delta: float, quantiles: tuple[float, float]) -> Tensor:
    """Return where each usable loss lies in their range, (M,) float64: -delta at the low end, delta at the high end.

    A range below 1e-6 nats counts as one of 1e-6, so that noise does not part the weights.
    """
    judged = losses.where(usable, math.nan)
    low, high = (judged.nanquantile(quantile) for quantile in quantiles)
    inside = judged.maximum(low).minimum(high)
    return delta * (2 * inside - low - high) / (high - low).clamp(min=_LEAST_RANGE)
