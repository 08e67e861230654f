"""DoReMi: domains whose tokens are furthest above a reference model's loss count more in the proxy's loss.

K domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dataflex.components.params import ExistingFolder, Parameters
from dataflex.errors import ConfigError, DataflexError
from dataflex.features.need import Need
from dataflex.mixers.base import LossForm, MixContext, normalised
from dataflex.mixers.reference import REFERENCE_KINDS, Referenced


class Doremi(Referenced):
    """Trains a proxy: rows are drawn by fixed proportions p, and the loss of domain i is weighed by a moving alpha_i.

    After every step, with lambda_i the mean over the domain's tokens of max(loss - reference loss, 0), both before the
    step: alpha <- (1 - eps) * softmax(log alpha + eta * lambda) + eps / K. The outcome is the mean alpha.

    Source: arXiv 2305.10429, algorithm 1; `official` options are those of its repository. Deviations: p is the run
    file's where it gives any; where a step lacks a domain, which the paper leaves open, see `absent`, and the paper's
    loss takes the alpha of the others normalised; without `exact` the loss of a step is weighed by the alpha of the
    steps before it; a token whose loss or reference loss is not finite is left out, and a step of such tokens moves
    nothing.

    Attributes:
        loss_form: how the weights of `loss_weights` act. domain_mean: loss = sum_i weight_i * mean over the tokens of
            domain i; token: loss = sum over tokens of weight * loss / sum over tokens of weight.
    """

    watches = True
    interval = 1
    needs_every_domain = True
    draws = "greedy"

    class Params(Parameters):
        """Parameters of `doremi`."""

        reference_model_path: ExistingFolder = Field(
            description="folder of the reference: a model with its tokenizer, which is the run's, trained on the "
            "domains as they are"
        )
        reweight_eta: float = Field(1.0, gt=0, description="step size of log alpha, per nat of excess loss")
        reweight_eps: float = Field(1e-3, ge=0, lt=1, description="share of the uniform weights: alpha >= eps / K")
        absent: Literal["hold", "zero", "official"] = Field(
            "hold",
            description="excess of a domain that a batch lacks. hold: its last one, 0 before the first; zero: 0; "
            "official: its last one, ln(vocabulary) before the first, which gives one unseen domain nearly all weight",
        )
        loss: Literal["paper", "official"] = Field(
            "paper",
            description="paper: sum of alpha x mean over the domain's tokens; official: mean over all tokens, "
            "weighed by alpha / p",
        )
        average: Literal["paper", "official"] = Field(
            "paper", description="paper: mean of alpha over the steps; official: the uniform start counts as one more"
        )
        reference: Literal["stored", "live"] = Field("stored", description=REFERENCE_KINDS)
        exact: bool = Field(
            False, description="two passes per step: alpha is moved by a batch before it weighs that batch's loss"
        )

    params: Params

    def __init__(self, params: Params):
        super().__init__(params)
        self._proportions = np.zeros(0)
        self._log_alpha = np.zeros(0)
        self._excess = np.zeros(0)
        self._total = np.zeros(0)
        self._updates = 0

    @property
    def looks_ahead(self) -> bool:
        """True with `exact`."""
        return self.params.exact

    def needs(self) -> Sequence[Need]:
        """Need the reference's loss of every token, unless its model stands beside."""
        return self.reference_needs

    @property
    def loss_form(self) -> LossForm:
        """How the weights of `loss_weights` enter the loss."""
        return "domain_mean" if self.params.loss == "paper" else "token"

    def mix(
        self,
        model: Any,
        step_id: int,
        *,
        context: MixContext,
        has_initial: bool = False,
        vocabulary: int | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Move alpha by the statistics, if they hold a step, and return p, which stays.

        Args:
            model: the live model.
            step_id: optimizer steps done.
            context: domains and statistics.
            has_initial: whether the run file gives proportions; uniform ones are taken if not.
            vocabulary: tokens of the tokenizer, for `absent: official`.
            kwargs: as of `NativeMixer.mix`.

        Raises:
            ConfigError: a proportion is 0, or `absent: official` was told no vocabulary.
            DataflexError: there is no loss, or none that can be compared at the beginning.
        """
        if not len(self._log_alpha):
            self._begin(context, has_initial, vocabulary)
        found = context.statistics
        if found.steps and found.has_losses("doremi", context.step):
            self._update(found.mean_excess)
        elif found.steps and not self._updates:
            raise DataflexError(
                f"doremi: found no token with a finite loss under both the model and the reference over {found.steps} "
                f"steps up to step {context.step}; expected losses that can be compared. Look at the losses of "
                f"{self.params.reference_model_path}, and at the precision of the run"
            )
        return self._proportions.copy()

    def loss_weights(self) -> np.ndarray | None:
        """Return alpha, or for the official loss alpha / p with sum 1; None before the first call of `mix`."""
        if not len(self._log_alpha):
            return None
        alpha = np.exp(self._log_alpha)
        return alpha if self.params.loss == "paper" else normalised(alpha / self._proportions)

    def outcome(self) -> np.ndarray | None:
        """Return the mean alpha, the proportions to train the large model on; None before the first step."""
        if not self._updates:
            return None
        start = 1 / len(self._total) if self.params.average == "official" else 0.0
        return normalised(self._total + start)

    def record(self) -> dict[str, Any]:
        """Return alpha, the excess it was moved by, and the share of the drawn rows that count after weighing."""
        if not len(self._log_alpha):
            return {}
        alpha = np.exp(self._log_alpha)
        share = 1 / float((alpha**2 / self._proportions).sum())  # (sum p w)^2 / sum p w^2 of w = alpha / p
        return {"alpha": alpha.tolist(), "excess": self._excess.tolist(), "effective_sample_share": share}

    def state(self) -> dict[str, Any]:
        """Return the weights, the excess held and the average; nothing before the first call of `mix`."""
        if not len(self._log_alpha):
            return {}
        names = ("proportions", "log_alpha", "excess", "total")
        return {name: getattr(self, f"_{name}").tolist() for name in names} | {"updates": self._updates}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the state of `state()` back."""
        if state:
            for name in ("proportions", "log_alpha", "excess", "total"):
                setattr(self, f"_{name}", np.asarray(state[name], dtype=np.float64))
            self._updates = int(state["updates"])

    def _begin(self, context: MixContext, has_initial: bool, vocabulary: int | None) -> None:
        count = len(context.domains)
        uniform = np.full(count, 1 / count)
        proportions = np.asarray(context.initial, dtype=np.float64) if has_initial else uniform
        never = [name for name, share in zip(context.domains.names, proportions, strict=True) if share <= 0]
        if never:
            raise ConfigError(
                f"doremi: found init_mixture_proportions of 0 for {', '.join(never)}; expected more for every domain, "
                "which is never compared with the reference otherwise; raise it, or leave the domain out"
            )
        # Not ln(vocabulary), as the official code has it: with K = 3 and 50,277 tokens one step on a batch without a
        # domain would give that domain 0.9993 of the weight.
        first = 0.0
        if self.params.absent == "official":
            if not vocabulary:
                raise ConfigError(
                    "doremi: absent: official starts from ln(vocabulary), and the size of the vocabulary is not known; "
                    "set absent: hold"
                )
            first = float(np.log(vocabulary))
        self._proportions, self._log_alpha = proportions, np.log(uniform)
        self._excess, self._total = np.full(count, first), np.zeros(count)

    def _update(self, mean_excess: np.ndarray) -> None:
        eps, count = self.params.reweight_eps, len(self._log_alpha)
        otherwise = np.zeros(count) if self.params.absent == "zero" else self._excess
        self._excess = np.where(np.isfinite(mean_excess), mean_excess, otherwise)
        # In logarithms, as exp(eta * excess) of a few nats a step would soon over- or underflow.
        moved = self._log_alpha + self.params.reweight_eta * self._excess
        moved -= np.logaddexp.reduce(moved)
        self._log_alpha = np.logaddexp(np.log1p(-eps) + moved, np.log(eps / count)) if eps else moved
        self._total = self._total + np.exp(self._log_alpha)
        self._updates += 1
