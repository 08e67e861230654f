"""The loss of an optimizer step as a weighted sum of token losses, and what is observed of it on the way.

A plain step is the sum over its tokens of loss / N, N the supervised tokens that Transformers counts. Here every
example has a factor on its tokens: 1 everywhere gives the plain step, whatever the batch size, the accumulation and the
number of processes. Losses are those of the training forward; once a step begins nothing waits for the device.
Where the head is not trained, logits are formed of supervised tokens alone (`dataflex.features.head`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dataflex.distributed import world
from dataflex.features.cross_entropy import token_losses
from dataflex.features.head import Head, find_head, supervised
from dataflex.features.inference import evaluation
from dataflex.fingerprint import IGNORE_INDEX
from dataflex.live.live_trainer import LiveTrainer
from dataflex.trainers.factors import Factor, StepCounts
from dataflex.trainers.micro_batch import ROWS, MicroBatch, capturing
from dataflex.trainers.observer import Observer


@dataclass
class Weighing:
    """What a trainer asks about the loss of its steps.

    Attributes:
        factors: their product is the factor of an example.
        observers: see every micro-batch of the training forward.
        wants_states: whether the last hidden states are captured.
        acts_from: optimizer step from which the factors act; observers always do.
        prefetch: told the rows of a step's micro-batches, each (B,), before any of them goes through the model.
    """

    factors: Sequence[Factor]
    observers: Sequence[Observer] = ()
    wants_states: bool = False
    acts_from: int = 0
    prefetch: Callable[[Sequence[Tensor]], None] | None = None
    _head: Head | None = field(default=None, repr=False)
    _head_is_sought: bool = field(default=False, repr=False)

    def begin(self, trainer: LiveTrainer, batches: Sequence[Mapping[str, Any]], items: Any) -> None:
        """Prepare for the micro-batches of a step. Collective."""
        self._items, self._count, self._next = items, len(batches), 0
        self._rank_scale = 1 if trainer.args.average_tokens_across_devices else world()
        # For models that read images, and some of others' code, the plain step is the mean of its micro-batches' means.
        self._by_micro_batch = not trainer.model_accepts_loss_kwargs
        self.is_active = trainer.state.global_step >= self.acts_from
        if self.prefetch is not None:
            self.prefetch([batch[ROWS] for batch in batches])
        self._seek_head(trainer)
        mine = [] if self._head is None else batches
        self._supervised = [supervised(_targets(batch["labels"])).to(trainer.args.device) for batch in mine]
        if not self.is_active or not self.factors:
            return
        device = trainer.args.device
        targets = [(batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1).to(device) for batch in batches]
        rows = [batch[ROWS].to(device) for batch in batches]
        counts = StepCounts(rows, targets, trainer.state.global_step, trainer.state.max_steps)
        ahead: list[MicroBatch] = []
        if any(factor.needs_losses_ahead for factor in self.factors):
            ahead = list(self._ahead(trainer, batches))
        for factor in self.factors:
            factor.begin(ahead, counts)

    def _ahead(self, trainer: LiveTrainer, batches: Sequence[Mapping[str, Any]]) -> Iterator[MicroBatch]:
        """Yield the losses of a step's micro-batches under the weights that it begins with."""
        for number, batch in enumerate(batches):
            inputs = trainer._prepare_inputs(dict(batch))
            rows, labels = inputs.pop(ROWS), inputs.pop("labels")
            with evaluation(trainer.model), torch.no_grad(), self.captured(trainer) as states:
                output = trainer.model_wrapped(**inputs)
                batch_ahead = self._micro_batch(number, output.logits, labels, rows, states, inputs)
            yield batch_ahead

    def _seek_head(self, trainer: LiveTrainer) -> None:
        """Find out, once, whether the head can be run apart from the model; sharded weights are not at hand there."""
        if self._head_is_sought:
            return
        self._head_is_sought = True
        if trainer.is_fsdp_enabled:
            return

        def run(tokens: list[int]) -> Any:
            ids = torch.tensor([tokens], device=trainer.args.device)
            with evaluation(trainer.model), torch.no_grad():
                return trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids))

        head = find_head(trainer.model, run)
        self._head = None if head is None or head.is_trained else head

    def _micro_batch(
        self,
        number: int,
        logits: Tensor,
        labels: Tensor,
        rows: Tensor,
        states: list[Tensor],
        inputs: Mapping[str, Tensor],
    ) -> MicroBatch:
        targets = _targets(labels)
        if self._head is None:
            losses = token_losses(logits, targets)
        else:
            losses = self._head.losses(states[-1], targets, self._supervised[number])
        if self._by_micro_batch:
            items = (targets >= 0).sum().clamp(min=1) * self._count * (world() // self._rank_scale)
        else:
            items = torch.as_tensor(self._items, device=losses.device)
        last = states[-1].detach() if self.wants_states else None
        return MicroBatch(rows, losses, targets, last, inputs, items, self._count, self._rank_scale)

    def loss(
        self, logits: Tensor, labels: Tensor, rows: Tensor, states: list[Tensor], inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """Return this rank's part of the loss of the next micro-batch, a scalar with gradient. Collective."""
        number, self._next = self._next, self._next + 1
        batch = self._micro_batch(number, logits, labels, rows, states, inputs)
        for observer in self.observers:
            observer.observe(batch)
        if not (self.is_active and self.factors):
            return batch.losses.sum() / batch.items
        factor = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
        for each in self.factors:
            factor = factor * each.factors(batch, number)
        # Zero by leaving out, not by the product: what is left out may be NaN.
        kept = torch.where(factor[:, None] > 0, batch.losses, 0.0)
        return ((kept * factor[:, None].to(kept.dtype)).sum() / batch.items).to(kept.dtype)

    def report(self) -> dict[str, float]:
        """Return what a training log should say of the steps since the last time; waits for the device."""
        return {name: value for factor in self.factors for name, value in factor.report().items()}

    @contextmanager
    def captured(self, trainer: LiveTrainer, whole: bool = False) -> Iterator[list[Tensor]]:
        """Collect the last hidden states meanwhile, if they are wanted or the head is to be run apart.

        Args:
            trainer: whose model it is.
            whole: somebody else reads the logits of this pass.
        """
        if self._head is not None and not whole:
            with self._head.apart() as states:
                yield states
        elif self.wants_states:
            with capturing(trainer.model) as states:
                yield states
        else:
            yield []


def _targets(labels: Tensor) -> Tensor:
    """Return the label of the next token, (B, T); of labels (B, T)."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
