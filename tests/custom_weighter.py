"""Weighters of a user's, against the documented interface: a plugin for run files."""

from __future__ import annotations

from typing import Any

import torch

from dataflex.weighters import Weighter, register_weighter


@register_weighter("mean")
class Mean(Weighter):
    """The mean over examples."""

    def get_weighted_loss(
        self, losses: torch.Tensor, *, ctx: Any = None, model: Any = None, inputs: Any = None
    ) -> torch.Tensor:
        assert losses.dim() == 1
        assert losses.requires_grad
        assert len(losses) == len(inputs["labels"])
        assert ctx.model_wrapped is model
        return losses.mean()


@register_weighter("bare")
class Bare:
    """The same without the base."""

    def get_weighted_loss(self, losses: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        assert sorted(kwargs) == ["ctx", "inputs", "model"]
        return losses.mean()


@register_weighter("own_step")
class OwnStep(Weighter):
    """A step of its own."""

    def __init__(self, factor: float = 1.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.factor = factor
        self.weighted: list[bool] = []

    def training_step(
        self, ctx: Any, model: Any, inputs: Any, num_items_in_batch: Any = None, use_weighter: bool = False
    ) -> torch.Tensor:
        model.train()
        inputs = ctx._prepare_inputs(inputs)
        labels = inputs["labels"]
        loss, outputs = ctx.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        losses = self._per_sample_loss_from_logits(outputs.logits, labels)
        assert losses.shape == (len(labels),)
        self.weighted.append(use_weighter)
        if use_weighter:
            loss = loss * self.factor
        loss = loss / ctx.args.gradient_accumulation_steps
        ctx.accelerator.backward(loss)
        return loss.detach()


@register_weighter("neither")
class Neither(Weighter):
    """Overrides nothing."""
