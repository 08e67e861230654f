"""How a run is directed: what a trainer asks of whoever decides about its rows and its losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dataflex.schedule import Round, Schedule
from dataflex.trainers.rounds import DecidedRound
from dataflex.trainers.weighing import Weighing

if TYPE_CHECKING:  # the trainer imports this
    from torch import Tensor

    from dataflex.trainers.trainer import DataflexTrainer


class Stopped(Exception):
    """Leaves LLaMA-Factory's workflow after the director ended the run before its last step."""


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

    begin: Callable[[DataflexTrainer, str | None], Director]
    schedule: Schedule | None = None
    interrupts: bool = False
