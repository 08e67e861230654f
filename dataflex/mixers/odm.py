"""Online data mixing: a bandit whose arms are the K domains and whose rewards are their training losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from dataflex.components.params import ExistingFolder, Parameters
from dataflex.errors import ConfigError, DataflexError
from dataflex.features.need import Need
from dataflex.features.spec import BASE, LossSpec
from dataflex.mixers.arms import Arms
from dataflex.mixers.base import MixContext
from dataflex.mixers.reference import REFERENCE_KINDS, Referenced
from dataflex.mixers.static import Weights, proportions_of, unknown_names, weight_problems

LOSS_CAP = 16.0
"""Nats: ln of a vocabulary of 500,000, 13.1, and a margin; a higher mean is worse than guessing, and no reward."""


class Odm(Referenced):
    """Domains of high loss more often, and every domain now and then.

    Source: ODM (arXiv 2312.02406). `official`: as the authors' code does it: the moving average of exp(loss), to which
    the proportions are linear, t counts optimizer steps. `paper`: algorithm 1: the moving average of loss over
    proportion, to which the logarithms of the proportions are linear, t counts updates. `exp3`: cumulated, with
    loss / 10 for a reward, as the authors' other updater. A nat between two domains is a factor of 2.7 in `official`;
    `paper` ends close to uniform, since its logarithms are scaled by an exploration rate that vanishes.
    Deviations: a loss above 16 nats counts as 16 in `official`; a domain that was not seen keeps its estimate, and one
    that was never seen has the mean of the others' unless `start` is zeros, where it waits for a draw at the
    exploration rate; a step without any finite loss changes nothing; the loss of a domain is the mean over its tokens
    on all ranks, unless `batches` is single. With a reference, which the paper does not have, rewards are by reducible
    loss, as in RHO (arXiv 2206.07137): noise, whose loss stays high under any model, is no longer drawn most.
    """

    watches: ClassVar[bool] = True
    interval: ClassVar[int] = 1
    draws: ClassVar[Literal["greedy", "random"]] = "random"
    idle_by: ClassVar[tuple[str, ...]] = ("warmup_steps",)

    class Params(Parameters):
        """Parameters of `odm`."""

        variant: Literal["official", "paper", "exp3"] = Field(
            "official", description="official: proportions linear in exp(loss); paper: Gibbs; exp3: cumulated, Gibbs"
        )
        alpha: float = Field(0.9, ge=0, lt=1, description="official, paper: weight of the old estimate at an update")
        warmup_steps: int = Field(0, ge=0, description="optimizer steps of the run on the initial proportions")
        initial_proportions: Weights | None = Field(
            None, description="until then, in domain order or by name; default: init_mixture_proportions, else by size"
        )
        reward_scale: float = Field(
            1.0,
            gt=0,
            description="paper, exp3: factor on the reward; official: it cancels, so a file with it and no variant "
            "means paper",
        )
        min_exploration_rate: float = Field(0.0, ge=0, lt=1, description="least share of a domain; below 1 / K")
        start: Literal["warmup_losses", "zeros"] | None = Field(
            None,
            description="official, paper: estimates begin at the first mean loss known of a domain (warmup_losses), or "
            "at 0. Default: warmup_losses in official, zeros in paper and exp3",
        )
        initial_losses: dict[str, float] | Literal["base"] | None = Field(
            None,
            description="start warmup_losses: nats per token by domain, for those that the warm-up does not see; base: "
            "of the model before any training, from the store",
        )
        batches: Literal["mixed", "single"] = Field(
            "mixed", description="single: a micro-batch has one domain, as in the paper, and counts once; mixed: tokens"
        )

        reference_model_path: ExistingFolder | None = Field(
            None,
            description="folder of a reference model; rewards are then by max(loss - reference loss, 0) of each token, "
            "so that what the reference could not learn either counts nothing",
        )
        reference: Literal["stored", "live"] = Field("stored", description=REFERENCE_KINDS)

        @model_validator(mode="before")
        @classmethod
        def _documented(cls, values: Any) -> Any:
            if isinstance(values, dict) and "reward_scale" in values and "variant" not in values:
                return values | {"variant": "paper"}
            return values

        @model_validator(mode="after")
        def _nothing_in_vain(self) -> Odm.Params:
            if self.variant == "official" and self.reward_scale != 1:
                raise ValueError("no reward_scale with variant official, where it cancels; paper and exp3 use it")
            if self.variant == "exp3" and self.alpha != type(self).model_fields["alpha"].default:
                raise ValueError("no alpha with variant exp3, which adds rewards up; official and paper use it")
            if self.variant == "exp3" and self.start == "warmup_losses":
                raise ValueError("no start: warmup_losses with variant exp3, which adds rewards up from 0")
            if self.initial_losses is not None and not self.starts_known:
                raise ValueError("no initial_losses with estimates that start at zeros; start: warmup_losses uses them")
            if self.reference_model_path is None and self.reference != "stored":
                raise ValueError("reference_model_path beside reference: live")
            if self.reference_model_path is not None and self.batches == "single":
                raise ValueError("batches: mixed with reference_model_path, which compares token by token")
            if self.reference_model_path is not None and self.initial_losses is not None:
                raise ValueError(
                    "no initial_losses with reference_model_path: estimates then begin at what the warm-up's losses "
                    "exceed the reference's by"
                )
            given = self.initial_losses if isinstance(self.initial_losses, dict) else {}
            if any(loss < 0 for loss in given.values()):
                raise ValueError("initial_losses of 0 or more, in nats per token")
            return self

        @property
        def starts_known(self) -> bool:
            """Whether estimates begin at a loss and not at 0."""
            return (self.start or ("warmup_losses" if self.variant == "official" else "zeros")) == "warmup_losses"

    def __init__(self, params: Params):
        super().__init__(params)
        self._arms: Arms | None = None

    @property
    def signals(self) -> tuple[str, ...]:
        """The base model's losses, if the estimates begin at them."""
        return ("base_losses",) if self.params.initial_losses == "base" else ()

    def needs(self) -> Sequence[Need]:
        """Need the base model's losses, if the estimates begin at them, and those of a reference."""
        base = [Need(LossSpec(), "train", BASE)] if self.params.initial_losses == "base" else []
        return [*base, *self.reference_needs]

    @property
    def whole_batches(self) -> bool:
        """Whether all rows of a micro-batch come from one domain."""
        return bool(self.params.batches == "single")

    def check(self, names: Sequence[str], unit: str) -> list[str]:
        """Return what is wrong with the parameters for domains of these names, whatever the unit."""
        problems = weight_problems(self.params.initial_proportions, names, "initial_proportions")
        if isinstance(self.params.initial_losses, dict):
            problems += unknown_names(self.params.initial_losses, names, "initial_losses")
        floor = self.params.min_exploration_rate
        if floor * len(names) >= 1 and len(names) > 1:
            problems.append(
                f"min_exploration_rate: found {floor} for {len(names)} domains, which leaves nothing to distribute; "
                f"expected less than {1 / len(names):.4g}"
            )
        return problems

    @property
    def idle_steps(self) -> int:
        """The steps of its own warm-up and one more, whose losses are the first that move the proportions."""
        return self.params.warmup_steps + 1 if self.params.warmup_steps else 0

    def mix(self, model: Any, step_id: int, *, context: MixContext, **kwargs: Any) -> np.ndarray:
        """Take the losses since the last update as rewards and return the next proportions.

        Raises:
            ConfigError: the parameters do not fit the domains.
            DataflexError: no token had a loss since the last update, or one of a domain with no share had.
        """
        names, p = context.domains.names, self.params
        problems = self.check(names, context.domains.unit)
        if problems:
            raise ConfigError("\n".join(problems))
        arms = self._arms = self._arms or Arms.new(len(names))
        given = p.initial_proportions
        initial = context.initial if given is None else proportions_of(given, names, "initial_proportions")
        if context.update == 0 and context.statistics.steps == 0:
            return initial
        if not context.statistics.has_losses("odm", context.step):
            return context.proportions
        loss = self._losses(context)
        if context.update == 0 or context.step <= p.warmup_steps:  # drawn before this mixer had a say
            arms.warm_up(loss, context.statistics.groups if self.whole_batches else context.statistics.tokens)
        if context.step <= p.warmup_steps:
            return initial
        if not arms.begun:
            self._begin(arms, context)
        if context.update > 0:
            kept, weight = (1.0, 1.0) if p.variant == "exp3" else (p.alpha, 1 - p.alpha)
            arms.take(self._rewards(loss, context), kept, weight)
        return self._shares(arms, context, initial)

    def _losses(self, context: MixContext) -> np.ndarray:
        """Return the losses that rewards are made of, (K,) float64, nats; NaN where a domain was not seen."""
        found = context.statistics
        if self.params.reference_model_path is not None:
            return found.mean_excess
        loss = found.mean_group_loss if self.whole_batches else found.mean_loss
        return np.where(np.isfinite(loss), loss, np.nan)

    def _begin(self, arms: Arms, context: MixContext) -> None:
        arms.begun = True
        if not self.params.starts_known:  # known to be 0: an arm then waits for a draw, as in the authors' code
            arms.known = np.ones(len(arms.known), dtype=bool)
            return
        given = self.params.initial_losses or {}
        if isinstance(given, str):
            known = np.asarray(context.ask["base_losses"](), dtype=np.float64)
        else:
            known = np.array([given.get(name, np.nan) for name in context.domains.names], dtype=np.float64)
        loss = arms.warmup_mean(known)
        arms.known = np.isfinite(loss)
        arms.estimates = np.where(arms.known, self._rewards(loss, context), 0.0)

    def _rewards(self, loss: np.ndarray, context: MixContext) -> np.ndarray:
        """Return the rewards of losses (K,), float64; NaN where the loss is."""
        if self.params.variant == "official":
            return np.exp(np.minimum(loss, LOSS_CAP))
        share, names = context.proportions, context.domains.names
        impossible = [name for name, p, one in zip(names, share, loss, strict=True) if p <= 0 and np.isfinite(one)]
        if impossible:
            raise DataflexError(
                f"odm: found losses of {', '.join(impossible)} whose proportion was 0 up to step {context.step}; "
                "expected none: their reward is divided by it. Give every domain a share in init_mixture_proportions"
            )
        scale = self.params.reward_scale / (10 if self.params.variant == "exp3" else 1)
        return scale * np.divide(loss, share, out=np.full(len(loss), np.nan), where=share > 0)

    def _shares(self, arms: Arms, context: MixContext, initial: np.ndarray) -> np.ndarray:
        count = len(arms.estimates)
        before = arms.epsilon
        t = arms.updates + 1 if self.params.variant == "paper" else context.step
        arms.epsilon = max(
            self.params.min_exploration_rate, min(1 / count, float(np.sqrt(np.log(count) / (count * t))))
        )
        if count == 1:
            arms.epsilon = 0.0
            return np.ones(1)
        known = arms.estimates[arms.known]
        estimates = np.where(arms.known, arms.estimates, known.mean() if len(known) else 0.0)
        if self.params.variant == "official":
            if not estimates.any():  # before any reward, whose share of their sum would be 0/0
                return initial
            weights = estimates
        else:
            weights = np.exp(before * (estimates - estimates.max()))  # with the rate before this one, as in the paper
        found = (1 - count * arms.epsilon) * weights / weights.sum() + arms.epsilon
        return found / found.sum()

    def state(self) -> dict[str, Any]:
        """Return the arms as plain data."""
        return {} if self._arms is None else self._arms.plain()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the state of `state()` back."""
        self._arms = Arms.restored(state) if state else None

    def record(self) -> dict[str, Any]:
        """Return the last rewards (None: not seen), the estimates, the exploration rate and the updates so far."""
        arms = self._arms
        if arms is None:
            return {}
        return {
            "rewards": arms.rewards,
            "estimates": arms.estimates.tolist(),
            "epsilon": arms.epsilon,
            "updates": arms.updates,
        }
