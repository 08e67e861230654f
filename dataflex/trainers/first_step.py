"""The loss of a run's first step, held against what guessing would cost."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from transformers import Trainer

from dataflex import distributed
from dataflex.signs import loss_warning

log = logging.getLogger(__name__)


class FirstStepJudged(Trainer):
    """Mixin: put before LLaMA-Factory's trainer class in the bases.

    A new model is expected to guess, so with `is_new` nothing is said.
    """

    is_new = False
    _is_warned = _is_lost = False
    _first: torch.Tensor | float = 0.0
    _parts = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Train on a micro-batch, and look at the loss when the first optimizer step of all is complete."""
        loss = self._train_on(*args, **kwargs)
        if self.state.global_step == 0 and not self.is_new:
            self._first, self._parts = self._first + loss.detach(), self._parts + 1
            if self._parts == self.current_gradient_accumulation_steps:
                means = distributed.gather(float(self._first))
                self.judge_loss(sum(means) / len(means), "the first step")
        return loss

    def _train_on(self, *args: Any, **kwargs: Any) -> Any:
        """Train on a micro-batch; what replaces Transformers' own step overrides this, so that every loss is seen."""
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and warn once if a loss or a gradient is no number: Transformers shows such a loss as 0.

        Under fp16 the first gradients are infinite until the loss is scaled right, and such steps are left out.
        """
        lost = [name for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0.0))]
        if lost and not self.args.fp16 and not self._is_lost and distributed.is_main():
            log.warning(
                "step %d: %s is %s, so the weights are of no use from here on. Begin anew with a lower learning rate, "
                "and look at the dtype and the data",
                self.state.global_step, lost[0], logs[lost[0]],
            )  # fmt: skip
        self._is_lost = self._is_lost or bool(lost)
        super().log(logs, *args, **kwargs)

    def judge_loss(self, mean: float, where: str) -> None:
        """Warn, once in a run, if a mean loss in nats per supervised token is that of a model that guesses."""
        config: Any = self.model.config  # type: ignore[union-attr]
        vocabulary = getattr(config.get_text_config(), "vocab_size", None)  # a model's own code may call it otherwise
        if self.is_new or self._is_warned or not vocabulary or (found := loss_warning(mean, vocabulary, where)) is None:
            return
        self._is_warned = True
        if distributed.is_main():
            log.warning("%s", found)
