"""How many optimizer steps a run takes, and how they divide into rounds. Pure arithmetic.

Legend: W `warmup_step`, U `update_step`, T `update_times`, N training rows, B global batch (rows per optimizer step).
A run repeats a flex epoch: W warm-up steps, then updates of U steps each.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

MOST_STEPS = 10_000_000
"""Optimizer steps of a run, at most: its rounds are kept in memory, 200 bytes each."""


@dataclass(frozen=True)
class Round:
    """Optimizer steps whose rows are decided at once.

    Attributes:
        number: position in the run, from 0.
        kind: "warmup": rows drawn without a method; "update": rows chosen by it.
        first_step: optimizer steps of the run before this round.
        steps: optimizer steps in this round, at least 1.
        epoch: flex epoch, from 0.
        update: number of the update within the flex epoch, from 1; 0 for the warm-up.
    """

    number: int
    kind: Literal["warmup", "update"]
    first_step: int
    steps: int
    epoch: int
    update: int


@dataclass(frozen=True)
class Schedule:
    """The keys from which the number of steps follows.

    Attributes:
        warmup_step: W, warm-up steps at the head of every flex epoch; 0 for none.
        update_step: U, steps from one update to the next; 0: one selection holds for the rest of the flex epoch.
        update_times: T, updates per flex epoch; 0 or less: a flex epoch is one pass over N rows, updated throughout.
        train_step: the exact number of steps of the run; 0 to let it follow from the others.
        num_train_epochs: flex epochs, not necessarily whole.
        spans_run: one flex epoch is the whole run, so there is one warm-up at its head; where T counts the updates,
            there is one such epoch whatever `num_train_epochs` says.
    """

    warmup_step: int = 0
    update_step: int = 0
    update_times: int = 1
    train_step: int = 0
    num_train_epochs: float = 1.0
    spans_run: bool = False

    @property
    def counts_updates(self) -> bool:
        """Whether a flex epoch is W + U*T steps, whatever the size of the dataset."""
        return self.update_step > 0 and self.update_times > 0

    @property
    def needs_rows(self) -> bool:
        """Whether the total follows from the size of the dataset."""
        return self.train_step <= 0 and not self.counts_updates

    def flex_steps(self, rows: int | None = None, batch: int | None = None) -> int:
        """Return the steps of one flex epoch.

        Args:
            rows: N.
            batch: B.

        Raises:
            ValueError: the answer depends on N and B, and they are not given.
        """
        if self.spans_run:
            return self.total(rows, batch)
        if self.counts_updates:
            return self.warmup_step + self.update_step * self.update_times
        if self.update_step <= 0 and self.train_step > 0:
            return self.train_step
        return self._pass(rows, batch)

    def _pass(self, rows: int | None, batch: int | None) -> int:
        """Return the steps of one pass over the data."""
        if rows is None or batch is None:
            raise ValueError("the length of an epoch follows from the number of rows and the global batch")
        return math.ceil(rows / batch)

    def shown_epoch(self, rows: int, batch: int) -> int:
        """Return the steps of an epoch as logs show it: a flex epoch, or a pass over the data if that spans the run."""
        return self._pass(rows, batch) if self.spans_run else self.flex_steps(rows, batch)

    def total(self, rows: int | None = None, batch: int | None = None) -> int:
        """Return the optimizer steps of the run; arguments and exceptions as for `flex_steps`."""
        if self.train_step > 0:
            return self.train_step
        if self.spans_run and self.counts_updates:
            return self.warmup_step + self.update_step * self.update_times
        if self.spans_run:
            return math.ceil(self.num_train_epochs * self._pass(rows, batch))
        return math.ceil(self.num_train_epochs * self.flex_steps(rows, batch))

    def rounds(self, rows: int | None = None, batch: int | None = None) -> list[Round]:
        """Return the rounds in order: they cover steps 0 to `total` without gap or overlap, the last one cut there."""
        total, epoch_steps = self.total(rows, batch), self.flex_steps(rows, batch)
        found: list[Round] = []
        for epoch, begin in enumerate(range(0, total, epoch_steps)):
            end = min(begin + epoch_steps, total)
            starts = range(begin + self.warmup_step, end, self.update_step if self.update_step > 0 else epoch_steps)
            # `starts` stops before `end`, which closes the last round: no round is empty.
            cuts = [*([begin] if self.warmup_step > 0 else []), *starts, end]
            for first, after in itertools.pairwise(cuts):
                update = 0 if first < begin + self.warmup_step else 1 + starts.index(first)
                kind: Literal["warmup", "update"] = "update" if update else "warmup"
                found.append(Round(len(found), kind, first, after - first, epoch, update))
        return found

    def describe(self, rows: int | None = None, batch: int | None = None) -> str:
        """Say in one line how many steps there are and why."""
        if self.counts_updates:
            parts = f"{_count(self.update_times, 'update')} x {self.update_step}"
            if self.warmup_step > 0:
                parts = f"{self.warmup_step} warm-up + {parts}"
        else:
            after = (
                f"an update every {self.update_step} steps" if self.update_step > 0 else "one selection for the rest"
            )
            parts = f"{self.warmup_step} warm-up, then {after}" if self.warmup_step > 0 else after
        if self.train_step > 0:
            return f"{_count(self.train_step, 'optimizer step')} (train_step): {parts}"
        epochs = f"{_count(self.num_train_epochs, 'epoch')} x ({parts})"
        if self.spans_run and self.counts_updates:
            epochs = parts
        if self.needs_rows and (rows is None or batch is None):
            return f"ceil({self.num_train_epochs:g} x ceil(rows / global batch)) optimizer steps = {epochs}"
        return f"{_count(self.total(rows, batch), 'optimizer step')} = {epochs}"


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"
