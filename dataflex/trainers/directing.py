"""How a run is directed: what a trainer asks of whoever decides about its rows and its losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dataflex.live.live_trainer import LiveTrainer
from dataflex.rows import RowSets
from dataflex.schedule import Round, Schedule
from dataflex.trainers.pace import Pace
from dataflex.trainers.rounds import DecidedRound
from dataflex.trainers.weighing import Weighing


class Stopped(Exception):
    """Leaves LLaMA-Factory's workflow after the director ended the run before its last step."""


class DirectedTrainer(LiveTrainer, Protocol):
    """What a director asks of the trainer (`dataflex.trainers.trainer.DataflexTrainer`) beside the live model."""

    @property
    def row_sets(self) -> RowSets:
        """Training rows and target sets."""
        ...

    @property
    def rounds(self) -> Sequence[Round]:
        """The rounds of the schedule; empty where LLaMA-Factory itself orders the rows."""
        ...

    @property
    def global_batch(self) -> int:
        """Rows of an optimizer step, over all processes."""
        ...

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        ...

    @property
    def train_dataset(self) -> Any:
        """What the trainer is fed."""
        ...

    @property
    def eval_dataset(self) -> Any:
        """What it evaluates on."""
        ...

    @property
    def data_collator(self) -> Any:
        """What makes a batch of examples."""
        ...

    @property
    def lr_scheduler(self) -> Any:
        """The scheduler of learning rates."""
        ...

    @property
    def pace(self) -> Pace:
        """What the steps so far took."""
        ...

    @property
    def last_batch(self) -> Any:
        """The last micro-batch of this process; None before the first."""
        ...

    def learning_rates(self, first: int, steps: int) -> list[float] | None:
        """Return the learning rates of a span of steps before any is taken, None if they follow from losses."""
        ...

    def create_optimizer(self) -> Any:
        """Make the optimizer, as the trainer does before its first step."""
        ...

    def log(self, logs: dict[str, float]) -> None:
        """Show numbers to whoever follows the training."""
        ...

    def snapshot(self, folder: str) -> str:
        """Write a resumable checkpoint of the current step under `folder` and return its path. Collective."""
        ...


class OwnStep(Protocol):
    """A weighter's own training step (`dataflex.weighters.base.NativeWeighter.own_step`)."""

    def __call__(self, ctx: Any, model: Any, inputs: Any, num_items_in_batch: Any, use_weighter: bool) -> Tensor:
        """Train on a micro-batch; return its part of the step's loss, without gradient."""
        ...


class Director(Protocol):
    """Accompanies a training from its beginning on; every method is called on every rank."""

    @property
    def start(self) -> str | None:
        """Folder of the checkpoint that the training starts from; None: it starts anew."""
        ...

    @property
    def weighing(self) -> Weighing | None:
        """What is asked about the losses of the steps; None: nothing, they are LLaMA-Factory's."""
        ...

    @property
    def own_step(self) -> OwnStep | None:
        """The step that the run trains by from `acts_from` on, in place of the trainer's."""
        ...

    @property
    def acts_from(self) -> int:
        """The optimizer step from which `own_step` is told to act."""
        ...

    @property
    def steps_kept(self) -> int:
        """Steps whose end state is kept elsewhere, so that they need no checkpoint."""
        ...

    def saved(self, checkpoint: str) -> dict[str, Any]:
        """Add to a checkpoint what belongs in it; return what its mark records."""
        ...

    def finish(self) -> None:
        """Conclude after training."""
        ...


class RoundDirector(Director, Protocol):
    """Decides what a run trains on."""

    @property
    def rounds(self) -> Sequence[Round]:
        """The rounds that are run, in order."""
        ...

    def decide(self, round: Round) -> DecidedRound | None:
        """Return the round's rows, or None to stop before it."""
        ...


@dataclass(frozen=True)
class Directing:
    """How a run is directed, before there is a trainer.

    Attributes:
        begin: makes the director from the trainer and the checkpoint to go on from, once, before the first step.
        schedule: the rounds of a run whose rows are decided (`RoundDirector`); None: their order is LLaMA-Factory's.
        interrupts: whether the end that the director sets leaves out what LLaMA-Factory does after training.
    """

    begin: Callable[[DirectedTrainer, str | None], Director]
    schedule: Schedule | None = None
    interrupts: bool = False
