"""The loss of a run's first step, held against what guessing would cost."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import Trainer

from dataflex import distributed
from dataflex.sanity import loss_warning

log = logging.getLogger(__name__)


class FirstStepJudged(Trainer):
    """Mixin: put before all other trainer classes in the bases.

    A new model is expected to guess, so with `is_new` nothing is said.
    """

    is_new = False
    _is_warned = False
    _first: torch.Tensor | float = 0.0
    _parts = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Train on a micro-batch, and look at the loss when the first optimizer step of all is complete."""
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == 0 and not self.is_new:
            self._first, self._parts = self._first + loss.detach(), self._parts + 1
            if self._parts == self.current_gradient_accumulation_steps:
                means = distributed.gather(float(self._first))
                self.judge_loss(sum(means) / len(means), "the first step")
        return loss

    def judge_loss(self, mean: float, where: str) -> None:
        """Warn, once in a run, if a mean loss in nats per supervised token is that of a model that guesses."""
        config: Any = self.model.config  # type: ignore[union-attr]
        vocabulary = getattr(config.get_text_config(), "vocab_size", None)  # a model's own code may call it otherwise
        if self.is_new or self._is_warned or not vocabulary or (found := loss_warning(mean, vocabulary, where)) is None:
            return
        self._is_warned = True
        if distributed.is_main():
            log.warning("%s", found)
