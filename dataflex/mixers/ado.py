"""Adaptive data optimization: domains are drawn by how fast their loss still falls. K domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dataflex.components.params import Parameters
from dataflex.errors import ConfigError
from dataflex.mixers.base import MixContext, NativeMixer, normalised
from dataflex.mixers.power_law import PowerLaw, fit

BLOCK = 10  # steps that are one point of a fit, as the authors' code takes every tenth
POINTS = 5  # below that, three parameters are a guess
LEAST_EXPONENT = 0.05  # the authors' bound where speeds are compared


class Ado(NativeMixer):
    """Domains whose loss a power law says will fall fastest; the part of the loss that no data removes counts nothing.

    Each domain's training loss is L(n) = irreducible + scale * n^-exponent. Learning speed s = exponent *
    (L(n) - irreducible) / n, preference rho ~ prior * s * h^credit, h what was drawn of late, and the proportions are
    `mean_share` of the mean of rho over the run, to which the steps before the first fit count as the prior, and the
    rest of rho itself.
    Source: ADO (arXiv 2410.11820) and its authors' code. Deviations: n and h count supervised tokens; points are means
    over 10 steps in place of a filtered loss; a point without tokens of a domain is left out, not repeated; a step
    without any finite loss changes nothing; the first fit comes `fit_interval` steps after those ignored, when there
    are points; the code's additional (1 - h)^0.5, which the paper does not have, is left out; a domain too rare to be
    fitted has the mean speed of the others.
    """

    watches: ClassVar[bool] = True
    interval: ClassVar[int] = 1
    idle_by: ClassVar[tuple[str, ...]] = ("ignore_steps", "fit_interval")

    class Params(Parameters):
        """Parameters of `ado`."""

        ignore_steps: int = Field(1000, ge=0, description="optimizer steps that no fit looks at")
        fit_interval: int = Field(1000, ge=1, description="steps from them to the first fit, and between fits")
        smoothing: float = Field(0.9, ge=0, lt=1, description="of what was drawn of late, per step")
        credit: float = Field(0.5, ge=0, description="power of what was drawn of late; the paper's s")
        mean_share: float = Field(0.9, ge=0, le=1, description="weight of the running mean; 1 minus the paper's gamma")
        floor: float = Field(0.01, ge=0, lt=1, description="least preference, before they are normalised again")
        counts: Literal["all", "own"] = Field(
            "all", description="what n counts: tokens of all domains, as the authors' code does, or the domain's own"
        )

    def __init__(self, params: Params):
        super().__init__(params)
        self._laws: list[PowerLaw | None] = []
        self._fitted = 0  # step of the last fit
        self._seen = self._drawn = self._mean = np.zeros(0)
        self._block_steps, self._block = 0, np.zeros((2, 0))  # loss, tokens
        self._history: list[dict[str, list[Any]]] = []  # n (K,), loss (K,) None where a domain was not seen
        self._preference = np.zeros(0)

    @property
    def idle_steps(self) -> int:
        """Steps before the first fit, which also needs enough points."""
        return self.params.ignore_steps + max(self.params.fit_interval, POINTS * BLOCK)

    def check(self, names: Sequence[str], unit: str) -> list[str]:
        """Return what is wrong with the parameters for domains of these names, whatever the unit."""
        if self.params.floor * len(names) < 1:
            return []
        return [f"floor: found {self.params.floor} for {len(names)} domains; expected less than {1 / len(names):.4g}"]

    def mix(self, model: Any, step_id: int, *, context: MixContext, **kwargs: Any) -> np.ndarray:
        """Take the losses since the last update into the history and return the next proportions.

        Raises:
            ConfigError: the parameters do not fit the domains.
            DataflexError: no token had a loss since the last update.
        """
        if problems := self.check(context.domains.names, context.domains.unit):
            raise ConfigError("\n".join(problems))
        if not len(self._seen):
            count = len(context.domains)
            self._laws = [None for _ in range(count)]
            self._seen, self._block = np.zeros(count), np.zeros((2, count))
            self._drawn = self._mean = context.initial
        if context.update == 0 and context.statistics.steps == 0:
            return context.initial
        if not context.statistics.has_losses("ado", context.step):
            return context.proportions
        self._observe(context)
        if context.step >= max(self._fitted, self.params.ignore_steps) + self.params.fit_interval:
            self._fitted = context.step
            self._fit()
        if not any(self._laws):
            return context.initial
        return self._shares(context)

    def _observe(self, context: MixContext) -> None:
        found = context.statistics
        kept = self.params.smoothing**found.steps  # per step, so that another update_step forgets as fast
        self._drawn = kept * self._drawn + (1 - kept) * found.tokens / found.tokens.sum()
        self._seen = self._seen + found.tokens
        if context.step - found.steps < self.params.ignore_steps:
            return
        self._block = self._block + np.stack([found.loss, found.tokens])
        self._block_steps += found.steps
        if self._block_steps >= BLOCK:
            loss, tokens = self._block
            middle = self._counted(self._seen - tokens / 2)  # the mean loss of a block belongs to its middle
            point = [float(one / t) if t > 0 else None for one, t in zip(loss, tokens, strict=True)]
            self._history.append({"n": middle.tolist(), "loss": point})
            self._block_steps, self._block = 0, np.zeros_like(self._block)

    def _counted(self, tokens: np.ndarray) -> np.ndarray:
        """Return n of the power law, (K,), from the tokens of each domain."""
        return tokens if self.params.counts == "own" else np.full(len(tokens), tokens.sum())

    def _fit(self) -> None:
        for domain in range(len(self._laws)):
            points = [(p["n"][domain], p["loss"][domain]) for p in self._history if p["loss"][domain]]
            if len(points) >= POINTS:
                n, loss = np.array(points).T
                self._laws[domain] = fit(n, loss)

    def _shares(self, context: MixContext) -> np.ndarray:
        p, n = self.params, self._counted(self._seen)
        speeds = np.full(len(n), np.nan)
        for domain, law in enumerate(self._laws):
            if law is not None:
                speeds[domain] = max(law.exponent, LEAST_EXPONENT) * law.reducible(n[domain]) / n[domain]
        speeds = np.where(np.isnan(speeds), np.nanmean(speeds), speeds)
        possible = context.initial > 0  # a domain that the run leaves out stays out
        preference = normalised(context.initial * speeds * self._drawn**p.credit)
        self._preference = normalised(np.where(possible, np.maximum(preference, p.floor), 0.0))
        found = normalised(p.mean_share * self._mean + (1 - p.mean_share) * self._preference)
        # Weighed by steps, as a mean over the run should be, whatever the interval between updates.
        weight = min(context.statistics.steps / (context.step + 1), 1.0)
        self._mean = (1 - weight) * self._mean + weight * self._preference
        return found

    def state(self) -> dict[str, Any]:
        """Return history, fitted parameters and running means as plain data: a resumed run does not fit again."""
        if not len(self._seen):
            return {}
        return {
            "laws": [law and asdict(law) for law in self._laws],
            "fitted": self._fitted,
            "seen": self._seen.tolist(),
            "drawn": self._drawn.tolist(),
            "mean": self._mean.tolist(),
            "block_steps": self._block_steps,
            "block": self._block.tolist(),
            "history": list(self._history),
            "preference": self._preference.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the state of `state()` back.

        Raises:
            ValueError: it is not such a state.
        """
        if not state:
            return
        expected = {"laws", "fitted", "seen", "drawn", "mean", "block_steps", "block", "history", "preference"}
        if set(state) != expected:
            raise ValueError(f"ado: found a state of {sorted(state)}; expected {sorted(expected)}")
        self._laws = [law and PowerLaw(**law) for law in state["laws"]]
        self._fitted, self._block_steps = int(state["fitted"]), int(state["block_steps"])
        self._seen, self._drawn, self._mean = (np.array(state[name]) for name in ("seen", "drawn", "mean"))
        self._block, self._preference = np.array(state["block"]), np.array(state["preference"])
        self._history = list(state["history"])

    def record(self) -> dict[str, Any]:
        """Return the fitted laws (None: not yet), the last preferences, and what was drawn of late."""
        return {
            "laws": [law and asdict(law) for law in self._laws],
            "preference": self._preference.tolist(),
            "drawn": self._drawn.tolist(),
            "points": len(self._history),
        }
