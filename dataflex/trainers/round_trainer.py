"""A trainer whose rows are decided round by round.

The loader it is given spans the whole run as one epoch, so that rounds may have any length; the epoch that people see
is set after each step.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from dataflex.errors import ConfigError, Interrupted
from dataflex.rows import RowSets
from dataflex.schedule import Round
from dataflex.trainers.directing import Directing, RoundDirector
from dataflex.trainers.outline import take_rounds
from dataflex.trainers.rounds import DecidedRound, RoundLoader
from dataflex.trainers.trainer import DataflexTrainer, same_random_state


class RoundTrainer(DataflexTrainer):
    """Mixin: put before LLaMA-Factory's trainer class in the bases.

    Args:
        directing: has a schedule, and makes a `RoundDirector`.
        row_sets: as for `DataflexTrainer`.
        model_args: as for `DataflexTrainer`.
        kwargs: what LLaMA-Factory's workflow passes to its trainer, and the rest of `DataflexTrainer`.

    Raises:
        ConfigError: an argument cannot be reconciled with rounds.
    """

    director: RoundDirector | None

    def __init__(self, *, directing: Directing, row_sets: RowSets, model_args: Any, **kwargs: Any):
        args, schedule = kwargs["args"], directing.schedule
        assert schedule is not None
        if args.auto_find_batch_size:
            raise ConfigError(
                "auto_find_batch_size: found true; expected false: a round's rows are decided for one batch size. "
                "Set per_device_train_batch_size and gradient_accumulation_steps."
            )
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.rounds = take_rounds(args, schedule, len(row_sets.train), batch)
        super().__init__(directing=directing, row_sets=row_sets, model_args=model_args, **kwargs)
        self.add_callback(_EpochShown(schedule.shown_epoch(len(row_sets.train), batch)))

    def get_train_dataloader(self) -> Any:
        """Return the loader of the whole run."""
        self._stopped = False
        assert self.director is not None
        return RoundLoader(self, self.director.rounds, self._decide)

    def _decide(self, round: Round) -> DecidedRound | None:
        assert self.director is not None
        self.shown.phase("warm-up" if round.kind == "warmup" else f"update {round.update}")
        try:
            with same_random_state(), self.pace.held():
                decided = self.director.decide(round)
        except Interrupted:  # on every rank, between two steps
            if self.stopping.is_due(self.args, self.state):
                self._save_checkpoint(self.model, trial=None)
            raise
        if round.kind == "update":
            self.shown.phase(f"round {round.number}")
        if decided is None:
            self.control.should_training_stop = True
            self._stopped = self.directing.interrupts
        elif decided.round.steps < round.steps:  # the last one: Transformers ends, saves and evaluates as ever
            self.state.max_steps = decided.round.first_step + decided.round.steps
        return decided


class _EpochShown(TrainerCallback):
    """Shows epochs of the schedule; the loop itself sees the whole run as one."""

    def __init__(self, steps: int):
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch before anything is logged or saved, and do what the run file asks for at an epoch's end."""
        state.epoch = state.global_step / self._steps
        if state.global_step % self._steps == 0 and state.global_step < state.max_steps:  # the loop sees to the last
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH
            control.should_save |= args.save_strategy == SaveStrategy.EPOCH
