"""What a weighter is given and what it returns.

A weight is relative to the plain loss: equal weights of 1 give exactly that.

B examples of a micro-batch of one rank, up to T tokens each, hidden size H; M examples of a group, which is a
micro-batch of all ranks together, or all of an optimizer step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import pad

from dataflex.errors import ConfigError
from dataflex.features.loss import token_losses
from dataflex.features.need import Need
from dataflex.fingerprint import IGNORE_INDEX
from dataflex.rows import Rows


class WeighterParams(BaseModel):
    """Parameters that every weighter has."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    normalisation: Literal["micro_batch", "batch"] = Field(
        "micro_batch",
        description="examples that are weighed against each other: those of a micro-batch on all ranks; or of the "
        "whole optimizer step, which takes a forward pass more",
    )
    reduction: Literal["token", "example"] = Field(
        "token",
        description="token: weights multiply token losses, so equal ones give the plain loss; example: they multiply "
        "the examples' mean losses, whatever their lengths",
    )


@dataclass(frozen=True)
class Examples:
    """One micro-batch of this rank, as the training forward saw it; nothing here carries a gradient.

    Attributes:
        rows: (B,) int64, positions in the training set.
        losses: (B,) float64, sum of token losses in nats.
        tokens: (B,) int64, supervised tokens.
        states: (B, T, H), last hidden states, for a weighter that wants them.
        mask: (B, T) bool, real tokens; with `states`.
    """

    rows: Tensor
    losses: Tensor
    tokens: Tensor
    states: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Group:
    """Examples that are weighed against each other, of all ranks, in one order on all of them.

    Attributes:
        rows: (M,) int64, positions in the training set.
        losses: (M,) float64, mean loss per supervised token; NaN where there is no token, or the loss is not finite.
        signal: (M,) float64, what `NativeWeighter.signal` gave; NaN without one.
        step: optimizer steps done.
        since: optimizer steps done since the weighter began to act.
        total: optimizer steps of the run.
    """

    rows: Tensor
    losses: Tensor
    signal: Tensor
    step: int
    since: int
    total: int

    @property
    def usable(self) -> Tensor:
        """(M,) bool, examples that have a loss."""
        return torch.isfinite(self.losses)


class NativeWeighter(ABC):
    """A weighter written for DataFlex: its parameters are a model beside it, called `Params`.

    Attributes:
        wants_states: whether `signal` reads the last hidden states.
        needs_targets: whether it holds examples against the target rows.
    """

    wants_states: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = False

    class Params(WeighterParams):
        """Parameters."""

    def __init__(self, params: Any):
        self.params = params

    def needs(self) -> Sequence[Need]:
        """Return the stored features of the training rows that `prepare` will be given."""
        return ()

    def prepare(self, values: Mapping[Need, Any], *, rows: Rows) -> None:  # noqa: B027 - most take none
        """Take the features that were declared. Called once, before the first step.

        Args:
            values: need -> `dataflex.features.need.View` of the training rows.
            rows: the training rows.

        Raises:
            DataflexError: the values are not what the weighter can use.
        """

    def signal(self, examples: Examples) -> Tensor | None:
        """Return one number per example of this rank, (B,) float64, that the group is weighed by, or None."""
        return None

    @abstractmethod
    def weights(self, group: Group) -> Tensor:
        """Return the weight of each example, (M,) float64: 0 where it is not usable; no host synchronisation."""

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from: plain data, floats exact."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the state of `state()` back."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, found {sorted(state)}")


class Weighter:
    """Base of weighters written against the documented interface: override `get_weighted_loss`, or `training_step`."""

    def __init__(self, **kwargs: Any):
        pass

    def get_weighted_loss(self, losses: Tensor, *, ctx: Any, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return a scalar from the examples' mean losses (B,), which carry gradients.

        Args:
            losses: (B,) mean loss per supervised token of each example of this rank's micro-batch; 0 without any.
            ctx: the trainer.
            model: the model as the trainer wraps it.
            inputs: the micro-batch.

        Raises:
            ConfigError: the class overrides neither this nor `training_step`.
        """
        raise ConfigError(
            f"{type(self).__name__}: found neither get_weighted_loss nor training_step; expected one of them, which "
            "says how the losses of a micro-batch are weighted"
        )

    def training_step(
        self, ctx: Any, model: Any, inputs: Any, num_items_in_batch: Any = None, use_weighter: bool = False
    ) -> Tensor:
        """Run a micro-batch forward and backward; return its part of the step's loss, without gradient.

        The plain loss of a step is the mean over its tokens; the weighted one is the mean over micro-batches and ranks
        of what `get_weighted_loss` returns. The two agree for a mean over examples that are equally long.

        Args:
            ctx: the trainer.
            model: the model as the trainer wraps it.
            inputs: the micro-batch as it was loaded.
            num_items_in_batch: the step's tokens divided by its micro-batches: what `ctx.compute_loss` has to be given
                for its result, divided by the micro-batches, to be this one's part of the plain loss.
            use_weighter: False during warm-up, whose loss is the plain one.
        """
        model.train()
        if callable(getattr(ctx.optimizer, "train", None)):  # an optimizer without a schedule has two modes
            ctx.optimizer.train()
        inputs = ctx._prepare_inputs(inputs)

        def weigh(logits: Tensor, labels: Tensor) -> Tensor:
            losses = self._per_sample_loss_from_logits(logits, labels)
            return self.get_weighted_loss(losses, ctx=ctx, model=model, inputs=inputs)

        with ctx.compute_loss_context_manager():
            if use_weighter:
                loss = ctx.loss_by(weigh, model, inputs)
            else:
                loss = ctx.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss = loss / ctx.args.gradient_accumulation_steps
        ctx.accelerator.backward(loss)
        return loss.detach()  # type: ignore[no-any-return]

    def _per_sample_loss_from_logits(self, logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
        """Return each example's mean loss per supervised token, (B,), with gradient; 0 without any.

        Args:
            logits: (B, T, V), of which nothing can be read after the backward pass (`token_losses`).
            labels: (B, T), not yet shifted.
            ignore_index: label of a token that is no target.
        """
        targets = pad(labels[:, 1:], (0, 1), value=ignore_index)
        targets = targets.masked_fill(targets == ignore_index, IGNORE_INDEX)
        losses = token_losses(logits, targets)
        return losses.sum(dim=1) / (targets >= 0).sum(dim=1).clamp(min=1)
