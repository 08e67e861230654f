"""The loss of an optimizer step as a weighted sum of token losses, and what is observed of it on the way.

A plain step is the sum over its tokens of loss / N, N the supervised tokens that Transformers counts. Here every
example has a factor on its tokens: 1 everywhere gives the plain step, whatever the batch size, the accumulation and the
number of processes. Losses are those of the training forward; within a step nothing is synchronised with the host.

B examples of a micro-batch of this rank, T tokens, M examples of a group, K domains, G micro-batches, W processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dataflex.distributed import all_gather_rows, rank, world
from dataflex.errors import DataflexError
from dataflex.features.evaluation import evaluation
from dataflex.features.loss import token_losses
from dataflex.fingerprint import IGNORE_INDEX
from dataflex.mixers.base import Statistics
from dataflex.weighters.base import Examples, Group, NativeWeighter

ROWS = "dataflex_rows"
"""Column of the training set, and key of a batch: the position of each example in the training set."""


@dataclass(frozen=True)
class MicroBatch:
    """What the training forward of one micro-batch gave; `losses` carries the gradient.

    Attributes:
        rows: (B,) int64.
        losses: (B, T) token losses, 0 where there is no target.
        targets: (B, T) int64, label of the next token; negative where there is none.
        states: (B, T, H) last hidden states without gradient, if they are wanted.
        inputs: what the model was fed, without labels.
        items: what this rank's sum of token losses is divided by: the step's tokens on all ranks, or on this one; for
            a model whose plain loss is a mean of means, those of this micro-batch times the number of micro-batches.
        micro_batches: G of this step.
        apart: W if `items` is the number of this rank, so that Transformers takes the mean over ranks; 1 if their sum.
    """

    rows: Tensor
    losses: Tensor
    targets: Tensor
    states: Tensor | None
    inputs: Mapping[str, Tensor]
    items: Tensor
    micro_batches: int
    apart: int

    @property
    def is_target(self) -> Tensor:
        """(B, T) bool."""
        return self.targets >= 0

    @property
    def examples(self) -> Examples:
        """The same per example, without gradient."""
        sums = self.losses.detach().sum(dim=1, dtype=torch.float64)
        mask = self.inputs.get("attention_mask") if self.states is not None else None
        return Examples(self.rows, sums, self.is_target.sum(dim=1), self.states, None if mask is None else mask.bool())


class Factor(Protocol):
    """Something that multiplies the loss of examples."""

    needs_losses_ahead: bool
    """Whether it has to know the losses of all micro-batches of a step before the first one is trained on."""

    def begin(self, ahead: Sequence[MicroBatch], counts: StepCounts) -> None:
        """Prepare for a step. Collective.

        Args:
            ahead: the losses of the step's micro-batches by a forward pass without gradient, if they are needed.
            counts: of the step.
        """
        ...

    def factors(self, batch: MicroBatch, number: int) -> Tensor:
        """Return the factor of each example, (B,), of micro-batch `number` of the step. Collective."""
        ...


@dataclass(frozen=True)
class StepCounts:
    """What is known of a step before its first forward pass.

    Attributes:
        rows: for each micro-batch of this rank, (B,) positions in the training set.
        targets: for each micro-batch, (B,) int64 supervised tokens of each example.
        step: optimizer steps done.
        total: optimizer steps of the run.
    """

    rows: Sequence[Tensor]
    targets: Sequence[Tensor]
    step: int
    total: int


class Observer:
    """Sums by domain of what the training forward gives, on the device until they are collected.

    Args:
        domains: (N,) int, domain of each training row.
        count: K.
        device: of the model.
        reference: micro-batch -> (B, T) losses of the same tokens under a reference model; or None. A token without a
            finite one counts as one without a finite loss.
    """

    def __init__(
        self,
        domains: np.ndarray,
        count: int,
        device: torch.device,
        reference: Callable[[MicroBatch], Tensor] | None = None,
    ):
        self.domains = torch.from_numpy(np.asarray(domains, np.int64)).to(device)
        self._count, self._reference = count, reference
        self._sums = torch.zeros(6, count, dtype=torch.float64, device=device)

    def observe(self, batch: MicroBatch) -> None:
        """Add a micro-batch."""
        domain = self.domains[batch.rows]
        losses = batch.losses.detach().double()
        finite = torch.isfinite(losses) & batch.is_target
        reference = None if self._reference is None else self._reference(batch).double()
        if reference is not None:
            finite &= torch.isfinite(reference)
        sums = torch.where(finite, losses, 0.0).sum(dim=1)
        counts = finite.sum(dim=1).double()
        self._sums[0].index_add_(0, domain, counts)
        self._sums[1].index_add_(0, domain, sums)
        here = torch.zeros(2, self._count, dtype=torch.float64, device=sums.device)
        here[0].index_add_(0, domain, counts)
        here[1].index_add_(0, domain, sums)
        self._sums[2] += here[0] > 0
        self._sums[3] += torch.where(here[0] > 0, here[1] / here[0].clamp(min=1), 0.0)
        if reference is not None:
            excess = torch.where(finite, (losses - reference).clamp(min=0), 0.0).sum(dim=1)
            self._sums[4].index_add_(0, domain, excess)
        self._sums[5].index_add_(0, domain, batch.is_target.sum(dim=1).double() - counts)

    def collect(self, steps: int) -> Statistics:
        """Return the sums of all ranks since the last time, added in the order of the ranks. Collective."""
        total = all_gather_rows(self._sums).sum(dim=0).cpu().numpy()
        self._sums.zero_()
        return Statistics(steps, *total)


@dataclass
class Weighing:
    """What a trainer asks about the loss of its steps.

    Attributes:
        factors: their product is the factor of an example.
        observers: see every micro-batch of the training forward.
        wants_states: whether the last hidden states are captured.
        acts_from: optimizer step from which the factors act; observers always do.
    """

    factors: Sequence[Factor]
    observers: Sequence[Observer] = ()
    wants_states: bool = False
    acts_from: int = 0

    def begin(self, trainer: Any, batches: Sequence[Mapping[str, Any]], items: Any) -> None:
        """Prepare for the micro-batches of a step. Collective."""
        self._items, self._count, self._next = items, len(batches), 0
        self._apart = 1 if trainer.args.average_tokens_across_devices else world()
        # For models that read images, and some of others' code, the plain step is the mean of its micro-batches' means.
        self._by_micro_batch = not trainer.model_accepts_loss_kwargs
        self.is_active = trainer.state.global_step >= self.acts_from
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

    def _ahead(self, trainer: Any, batches: Sequence[Mapping[str, Any]]) -> Iterator[MicroBatch]:
        """Yield the losses of a step's micro-batches under the weights that it begins with."""
        for batch in batches:
            inputs = trainer._prepare_inputs(dict(batch))
            rows, labels = inputs.pop(ROWS), inputs.pop("labels")
            with evaluation(trainer.model), torch.no_grad(), self.captured(trainer) as states:
                output = trainer.model_wrapped(**inputs)
            yield self._micro_batch(output.logits, labels, rows, states, inputs)

    def _micro_batch(
        self, logits: Tensor, labels: Tensor, rows: Tensor, states: list[Tensor], inputs: Mapping[str, Tensor]
    ) -> MicroBatch:
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        losses = token_losses(logits, targets)
        if self._by_micro_batch:
            items = (targets >= 0).sum().clamp(min=1) * self._count * (world() // self._apart)
        else:
            items = torch.as_tensor(self._items, device=losses.device)
        last = states[-1] if states else None
        return MicroBatch(rows, losses, targets, last, inputs, items, self._count, self._apart)

    def loss(
        self, logits: Tensor, labels: Tensor, rows: Tensor, states: list[Tensor], inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """Return this rank's part of the loss of the next micro-batch, a scalar with gradient. Collective."""
        batch = self._micro_batch(logits, labels, rows, states, inputs)
        number, self._next = self._next, self._next + 1
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

    def captured(self, trainer: Any) -> AbstractContextManager[list[Tensor]]:
        """Collect the last hidden states meanwhile, if they are wanted."""
        return capturing(trainer.model) if self.wants_states else nullcontext([])


@contextmanager
def capturing(model: Any) -> Iterator[list[Tensor]]:
    """Collect what enters a model's output embedding meanwhile: its last hidden states.

    Raises:
        DataflexError: it has no output embedding.
    """
    states: list[Tensor] = []
    head = model.get_output_embeddings()
    if head is None:
        raise DataflexError("the model has no output embedding; the last hidden states cannot be read")
    handle = head.register_forward_pre_hook(lambda _, given: states.append(given[0].detach()))
    try:
        yield states
    finally:
        handle.remove()


class ByWeighter:
    """A weighter as a factor: groups are put together over all ranks, and each rank takes its part of the weights.

    Args:
        weighter: gives the weights.
        size: examples of a micro-batch of one rank, at most.
        acts_from: optimizer step from which it acts.
        before: called with the steps done before every step on which it acts.
    """

    def __init__(
        self,
        weighter: NativeWeighter,
        size: int,
        acts_from: int = 0,
        before: Callable[[int], None] | None = None,
    ):
        self.weighter, self._size, self._from, self._before = weighter, size, acts_from, before
        self.needs_losses_ahead = weighter.params.normalisation == "batch"
        self._parts: list[Tensor] = []

    def begin(self, ahead: Sequence[MicroBatch], counts: StepCounts) -> None:
        """Weigh all examples of the step together, if that is asked for."""
        self._counts = counts
        if self._before is not None:
            self._before(counts.step)
        if self.needs_losses_ahead:
            weights = self._weights([batch.examples for batch in ahead])
            self._parts = list(weights.split(self._size))

    def factors(self, batch: MicroBatch, number: int) -> Tensor:
        """Return this rank's weights, as the reduction has them."""
        size = len(batch.rows)
        weights = self._parts[number][:size] if self.needs_losses_ahead else self._weights([batch.examples])[:size]
        if self.weighter.params.reduction == "token":
            return weights
        tokens = batch.examples.tokens.clamp(min=1)
        # The mean over examples in place of that over tokens, each micro-batch by the examples that it has.
        return weights * batch.items * batch.apart / (tokens * self._usable * batch.micro_batches)

    def _weights(self, parts: Sequence[Examples]) -> Tensor:
        """Return this rank's weights, (micro-batches x size,), padded where a micro-batch is smaller."""
        padded = [self._padded(part) for part in parts]
        mine = torch.cat(padded)
        gathered = all_gather_rows(mine)
        everyone = gathered.reshape(-1, mine.shape[1])
        is_row = everyone[:, 0] >= 0
        losses = torch.where(is_row & (everyone[:, 2] > 0), everyone[:, 1] / everyone[:, 2].clamp(min=1), torch.nan)
        step = self._counts.step
        group = Group(everyone[:, 0].long(), losses, everyone[:, 3], step, step - self._from, self._counts.total)
        weights = self.weighter.weights(group)
        self._usable = group.usable.sum().clamp(min=1) / len(parts)
        return weights.reshape(len(gathered), -1)[rank()]

    def _padded(self, part: Examples) -> Tensor:
        signal = self.weighter.signal(part)
        if signal is None:
            signal = torch.full_like(part.losses, torch.nan)
        columns = [part.rows.double(), part.losses, part.tokens.double(), signal.double()]
        table = torch.full((self._size, 4), -1.0, dtype=torch.float64, device=part.losses.device)
        table[: len(part.rows)] = torch.stack(columns, dim=1)
        return table


class ByDomain:
    """Weights of domains as a factor.

    Args:
        domains: (N,) domain of each training row.
        weights: returns the weights in force, (K,), or None for a plain loss.
        form: `domain_mean`: the loss is sum_i w_i times the mean over domain i's tokens, with the w_i of the domains
            that the step has normalised; `token`: the mean over tokens, weighed by their domains. Both stand on the
            scale of the plain loss, so that weights in the shares of the tokens, or equal ones, give exactly that: in
            stage pt Transformers divides by every row's first token too, which is no target, and so does this.
        before: told the losses of the step before it is trained on, so that the weights may follow from them.
    """

    def __init__(
        self,
        domains: Tensor,
        weights: Callable[[], np.ndarray | None],
        form: str,
        before: Callable[[Sequence[MicroBatch]], None] | None = None,
    ):
        self._domains, self._given, self._form, self._before = domains, weights, form, before
        self.needs_losses_ahead = before is not None

    def begin(self, ahead: Sequence[MicroBatch], counts: StepCounts) -> None:
        """Count the step's tokens by domain, over all ranks."""
        if self._before is not None:
            self._before(ahead)
        given = self._given()
        self._weights: Tensor | None = None
        if given is None:
            return
        weights = torch.from_numpy(np.asarray(given)).to(self._domains.device)
        tokens = torch.zeros_like(weights)
        for rows, targets in zip(counts.rows, counts.targets, strict=True):
            tokens.index_add_(0, self._domains[rows], targets.double())
        tokens = all_gather_rows(tokens).sum(dim=0)
        share = tokens / tokens.sum().clamp(min=1)
        if self._form == "domain_mean":
            present = torch.where(tokens > 0, weights, 0.0)
            self._weights = present / present.sum() / torch.where(tokens > 0, share, 1.0)
        else:
            self._weights = weights / (weights * share).sum()

    def factors(self, batch: MicroBatch, number: int) -> Tensor:
        """Return the factor of each example's domain."""
        if self._weights is None:
            return torch.ones(len(batch.rows), dtype=torch.float64, device=batch.rows.device)
        return self._weights[self._domains[batch.rows]]
