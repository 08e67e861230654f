"""Sums by domain of the losses that a run is trained on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dataflex.distributed import all_gather_rows
from dataflex.mixers.base import Statistics
from dataflex.trainers.micro_batch import MicroBatch


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
            # The minimum of 0 is taken per token: of domain means it is another, smaller number, and not DoReMi.
            excess = torch.where(finite, (losses - reference).clamp(min=0), 0.0).sum(dim=1)
            self._sums[4].index_add_(0, domain, excess)
        self._sums[5].index_add_(0, domain, batch.is_target.sum(dim=1).double() - counts)

    def collect(self, steps: int) -> Statistics:
        """Return the sums of all ranks since the last time, added in the order of the ranks. Collective."""
        total = all_gather_rows(self._sums).sum(dim=0).cpu().numpy()
        self._sums.zero_()
        return Statistics(steps, *total)
