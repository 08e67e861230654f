"""What multiplies the loss of examples: the weights of a weighter, or those of domains.

A factor is relative to the plain loss: 1 everywhere leaves that as it is. B examples of a micro-batch of this rank, T
tokens, M examples of a group, K domains, N training rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dataflex.distributed import all_gather_rows, rank
from dataflex.trainers.micro_batch import MicroBatch
from dataflex.weighters.base import Examples, Group, NativeWeighter
from dataflex.weighters.relative import effective_size


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

    def report(self) -> dict[str, float]:
        """Return what a training log should say of the steps since the last time; waits for the device."""
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


class ByWeighter:
    """A weighter as a factor: groups are put together over all ranks, and each rank takes its part of the weights.

    Args:
        weighter: gives the weights.
        size: examples of a micro-batch of one rank, at most.
        acts_from: optimizer step from which it acts.
        before: called with the steps done before every step on which it acts.
        beside: rows (M,) -> the factor (M,) that each of them has besides in this step, such as its domain's.
    """

    def __init__(
        self,
        weighter: NativeWeighter,
        size: int,
        acts_from: int = 0,
        before: Callable[[int], None] | None = None,
        beside: Callable[[Tensor], Tensor] | None = None,
    ):
        self.weighter, self._size, self._from, self._before = weighter, size, acts_from, before
        self._beside = beside
        self.needs_losses_ahead = weighter.params.normalisation == "batch"
        self._parts: list[Tensor] = []
        self._sums: Tensor | None = None
        self._largest: Tensor | None = None

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
        return weights * batch.items * batch.rank_scale / (tokens * self._usable * batch.micro_batches)

    def report(self) -> dict[str, float]:
        """Return mean, maximum, and effective sample size of the weights: 1, 1 and 1 of a plain loss.

        `weight_mean` and `weight_ess`, (sum w)^2 / sum w^2 over the number of examples, are means over groups.
        """
        if self._sums is None or self._largest is None:
            return {}
        groups, mean, share = self._sums.tolist()
        found = {"weight_mean": mean / groups, "weight_max": float(self._largest), "weight_ess": share / groups}
        self._sums = self._largest = None
        return found

    def _weights(self, parts: Sequence[Examples]) -> Tensor:
        """Return this rank's weights, (micro-batches x size,), padded where a micro-batch is smaller."""
        padded = [self._padded(part) for part in parts]
        mine = torch.cat(padded)
        gathered = all_gather_rows(mine)
        everyone = gathered.reshape(-1, mine.shape[1])
        is_row = everyone[:, 0] >= 0
        losses = torch.where(is_row & (everyone[:, 2] > 0), everyone[:, 1] / everyone[:, 2].clamp(min=1), torch.nan)
        step = self._counts.step
        group = Group(
            everyone[:, 0].long(),
            losses,
            everyone[:, 3],
            step,
            step - self._from,
            self._counts.total,
            len(gathered) * len(parts),
        )
        weights = self.weighter.weights(group)
        usable = group.usable.sum().clamp(min=1)
        self._usable = usable / len(parts)
        found = torch.stack([weights.new_ones(()), weights.sum() / usable, effective_size(weights) / usable])
        self._sums = found if self._sums is None else self._sums + found
        self._largest = weights.max() if self._largest is None else self._largest.maximum(weights.max())
        if self._beside is not None:
            weights = weights * _scale(weights, self._beside(group.rows), group.usable)
        return weights.reshape(len(gathered), -1)[rank()]

    def _padded(self, part: Examples) -> Tensor:
        signal = self.weighter.signal(part)
        if signal is None:
            signal = torch.full_like(part.losses, torch.nan)
        columns = [part.rows.double(), part.losses, part.tokens.double(), signal.double()]
        table = torch.full((self._size, 4), -1.0, dtype=torch.float64, device=part.losses.device)
        table[: len(part.rows)] = torch.stack(columns, dim=1)
        return table


def _scale(weights: Tensor, others: Tensor, usable: Tensor) -> Tensor:
    """Return what gives products the mean that independent factors would have, mean(w) mean(d) / mean(w d), a scalar.

    Each factor keeps the plain loss's scale by itself. Where both favour the same examples their product does not: the
    step would be longer, as under a higher learning rate.

    Args:
        weights: (M,) of a weighter, 0 where not usable.
        others: (M,) the factor beside it.
        usable: (M,) bool, examples that the means are over.
    """
    others = others.where(usable, 0.0)
    together = (weights * others).sum() * usable.sum()
    return (weights.sum() * others.sum() / together.where(together > 0, 1.0)).where(together > 0, 1.0)


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
        return self.of(batch.rows)

    def of(self, rows: Tensor) -> Tensor:
        """Return the factor of each row's domain in the step that has begun, (M,) float64."""
        if self._weights is None:
            return torch.ones(len(rows), dtype=torch.float64, device=rows.device)
        return self._weights[self._domains[rows]]

    def report(self) -> dict[str, float]:
        """Return nothing: the mixer's own log has its weights."""
        return {}
