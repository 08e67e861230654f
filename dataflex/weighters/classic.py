"""Weighters of the classic interface, which compute the whole loss of a micro-batch.

B examples of a micro-batch, T tokens, V numbers of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from dataflex.components.adapter import adapted
from dataflex.components.classic import Arguments, constructed
from dataflex.errors import ConfigError
from dataflex.fingerprint import IGNORE_INDEX
from dataflex.weighters.base import Group, NativeWeighter, WeighterParams

if TYPE_CHECKING:  # a run file is checked without torch
    from torch import Tensor


class Weighter:
    """Base of weighters of the classic interface: override `get_weighted_loss`, or `training_step`."""

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
        # The last step of an epoch may have fewer micro-batches; the plain loss is divided as its items were.
        parts = ctx.current_gradient_accumulation_steps if use_weighter else ctx.args.gradient_accumulation_steps
        loss = loss / parts
        ctx.accelerator.backward(loss)
        return loss.detach()

    def _per_sample_loss_from_logits(self, logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
        """Return each example's mean loss per supervised token, (B,), with gradient; 0 without any.

        Args:
            logits: (B, T, V), of which nothing can be read after the backward pass (`token_losses`).
            labels: (B, T), not yet shifted.
            ignore_index: label of a token that is no target.
        """
        from torch.nn.functional import pad

        from dataflex.features.cross_entropy import token_losses

        targets = pad(labels[:, 1:], (0, 1), value=ignore_index)
        targets = targets.masked_fill(targets == ignore_index, IGNORE_INDEX)
        losses = token_losses(logits, targets)
        return losses.sum(dim=1) / (targets >= 0).sum(dim=1).clamp(min=1)


class ClassicWeighter(NativeWeighter):
    """A weighter around a class of the classic interface, which may or may not inherit from `Weighter`."""

    __wrapped__: ClassVar[type[Any]]
    Params = Arguments
    declares_needs = False
    acts_alone = True

    def _bind(self, runtime: Mapping[str, Any]) -> None:
        """Construct the class; one without a training step of its own gets that of `Weighter`."""
        made = constructed(self.__wrapped__, self.params, runtime)
        self._made = made if callable(getattr(made, "training_step", None)) else _LossOnly(made)

    def own_step(self, ctx: Any, model: Any, inputs: Any, num_items_in_batch: Any, use_weighter: bool) -> Tensor:
        """Train by the class's own `training_step`."""
        loss: Tensor = self._made.training_step(ctx, model, inputs, num_items_in_batch, use_weighter)
        return loss

    def weights(self, group: Group) -> Tensor:
        """Never asked for: one that acts alone computes the whole loss."""
        raise AssertionError(f"{self.__wrapped__.__name__} acts alone")


class _LossOnly(Weighter):
    """The base's step around a class that does not inherit from it and only has `get_weighted_loss`."""

    def __init__(self, weighter: Any):
        self.get_weighted_loss = weighter.get_weighted_loss  # type: ignore[method-assign]


def adapted_weighter(cls: type[Any]) -> type[NativeWeighter]:
    """Make a user's class a `NativeWeighter`: itself, or a class around it.

    Raises:
        ConfigError: the class gives weights, and its parameters lack those that every weighter has.
    """
    is_native = hasattr(cls, "Params") and hasattr(cls, "weights")
    found: type[NativeWeighter] = adapted(cls, NativeWeighter, None if is_native else ClassicWeighter)
    if not found.acts_alone and not issubclass(found.Params, WeighterParams):
        raise ConfigError(
            f"found Params in {cls.__qualname__} without normalisation and reduction, which every weighter has; "
            "expected a subclass of dataflex.weighters.WeighterParams"
        )
    return found
