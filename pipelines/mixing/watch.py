"""What a mixer sees of the losses of the training, and how mixer and weighter act on them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from dataflex.mixers.base import NativeMixer, Statistics
from dataflex.pipelines.mixing.reference_losses import reference_losses
from dataflex.pipelines.run import Run
from dataflex.pipelines.weighing.director import weighter_factor
from dataflex.trainers.factors import ByDomain, Factor
from dataflex.trainers.micro_batch import MicroBatch
from dataflex.trainers.observer import Observer
from dataflex.trainers.weighing import Weighing

log = logging.getLogger(__name__)


class Watch:
    """The losses of the training by domain, K domains. Making it is collective.

    Args:
        run: the run.
        mixer: its mixer.
        members: K arrays, the rows of each domain.
        acts_from: optimizer step from which a weighter acts.
        ahead: told what is seen of a step before it is trained on, for a mixer that looks ahead.

    Attributes:
        domains: (N,) int64 domain of each training row, -1 for a row of none.
        weighing: what the trainer asks about the losses; None: nothing.
    """

    def __init__(
        self,
        run: Run,
        mixer: NativeMixer,
        members: Sequence[np.ndarray],
        acts_from: int,
        ahead: Callable[[Statistics], None],
    ):
        self._count, self._told, self._until = len(members), ahead, 0
        number = np.full(len(run.rows), -1, np.int64)
        for domain, rows in enumerate(members):
            number[rows] = domain
        reference = reference_losses(run, mixer)
        looks_ahead = mixer.looks_ahead and mixer.loss_form is not None
        self._observer = Observer(number, len(members), run.trainer.args.device, reference)
        self.domains: Tensor = self._observer.domains
        factors: list[Factor] = []
        beside: Callable[[Tensor], Tensor] | None = None
        if mixer.loss_form is not None:
            before = self._ahead if looks_ahead else None
            by_domain = ByDomain(self.domains, mixer.loss_weights, mixer.loss_form, before)
            factors.append(by_domain)
            beside = by_domain.of
        if run.weighter is not None:
            factors.append(weighter_factor(run, run.weighter, acts_from, beside))
        # Where a step's losses are seen before it is trained on, they are not seen again.
        self._is_watching = mixer.watches and not looks_ahead
        self.weighing: Weighing | None = None
        if mixer.watches or factors:
            observers = [self._observer] if self._is_watching else []
            wants_states = run.weighter is not None and run.weighter.wants_states
            prefetch = None if reference is None else reference.prefetch
            self.weighing = Weighing(factors, observers, wants_states, acts_from, prefetch)

    def restore(self, step: int) -> None:
        """Go on from a step."""
        self._until = step

    def seen_until(self, step: int) -> Statistics:
        """Return what all ranks have seen since the last time. Collective."""
        if not self._is_watching or step == self._until:
            return Statistics.zeros(self._count)
        steps, self._until = step - self._until, step
        return self._collected(steps)

    def _ahead(self, batches: Sequence[MicroBatch]) -> None:
        """Tell of the losses of a step before it is trained on. Collective."""
        for batch in batches:
            self._observer.observe(batch)
        self._told(self._collected(1))

    def _collected(self, steps: int) -> Statistics:
        """Return what all ranks have seen of so many steps. Collective."""
        seen = self._observer.collect(steps)
        if seen.nonfinite.any():
            log.warning("%d token losses were NaN or infinite and left out", int(seen.nonfinite.sum()))
        return seen
