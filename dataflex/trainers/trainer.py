"""What is added to a Transformers trainer: rows decided round by round, complete checkpoints, exact resumption.

The training loop is Transformers' own. The loader it is given spans the whole run as one epoch, so that rounds may
have any length; the epoch that people see is set after each step.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy, rotate_checkpoints

from dataflex import distributed
from dataflex.errors import ConfigError
from dataflex.schedule import Round, Schedule
from dataflex.trainers.checkpoints import mark_complete
from dataflex.trainers.rounds import DecidedRound, RoundLoader


class Stopped(Exception):
    """Leaves LLaMA-Factory's workflow after the director ended the run before its last step."""


class Director(Protocol):
    """Decides what a run trains on; every method is called on every rank."""

    schedule: Schedule

    def begin(self, trainer: RoundTrainer, checkpoint: str | None) -> str | None:
        """Prepare for training from `checkpoint` (None: from the start); return the folder to start from."""
        ...

    def decide(self, trainer: RoundTrainer, round: Round) -> DecidedRound | None:
        """Return the round's rows, or None to stop before it."""
        ...

    def saved(self, trainer: RoundTrainer, checkpoint: str) -> dict[str, Any]:
        """Add to a checkpoint what belongs in it; return what its mark records."""
        ...

    def finish(self, trainer: RoundTrainer, stopped: bool) -> None:
        """Conclude after training."""
        ...


class RoundTrainer(Trainer):
    """Mixin: put before LLaMA-Factory's trainer class in the bases.

    Args:
        director: decides the rows.
        row_sets: training rows and target sets (`dataflex.llamafactory.rows.RowSets`).
        model_args: LLaMA-Factory's model arguments.
        kwargs: what LLaMA-Factory's workflow passes to its trainer.

    Raises:
        ConfigError: an argument cannot be reconciled with rounds.
    """

    def __init__(self, *, director: Director, row_sets: Any, model_args: Any, **kwargs: Any):
        args = kwargs["args"]
        if args.auto_find_batch_size:
            raise ConfigError(
                "auto_find_batch_size: found true; expected false: a round's rows are decided for one batch size. "
                "Set per_device_train_batch_size and gradient_accumulation_steps."
            )
        self.director = director
        self.row_sets = row_sets
        self.model_arguments = model_args
        self.global_batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        args.max_steps = director.schedule.total(rows=len(row_sets.train), batch=self.global_batch)
        args.ignore_data_skip = True  # the loader starts at the step itself
        self.rounds = director.schedule.rounds(rows=len(row_sets.train), batch=self.global_batch)
        super().__init__(**kwargs)
        self.add_callback(_EpochShown(director.schedule.flex_steps(rows=len(row_sets.train), batch=self.global_batch)))

    def get_train_dataloader(self) -> Any:
        """Return the loader of the whole run."""
        self._stopped = False
        return RoundLoader(self, self.rounds, self._decide)

    def _decide(self, round: Round) -> DecidedRound | None:
        with same_random_state():
            decided = self.director.decide(self, round)
        if decided is None:
            self._stopped = self.control.should_training_stop = True
        return decided

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; raises `Stopped` when the director ended the run early."""
        if self.args.world_size > 1 and self.args.device.type == "cpu":
            _accept_cpu_index()
        start = self.director.begin(self, resume_from_checkpoint)
        output = super().train(start, *args, **kwargs)
        self.director.finish(self, self._stopped)
        if self._stopped:
            raise Stopped
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate without moving the random state, so that evaluating more often trains the same weights."""
        with same_random_state():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, mark the checkpoint complete, and only then remove those beyond `save_total_limit`."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        run = self._get_output_dir(trial)  # type: ignore[attr-defined]
        folder = os.path.join(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        info = self.director.saved(self, folder)
        distributed.barrier()
        if self.args.should_save:
            mark_complete(folder, info)
            rotate_checkpoints(
                output_dir=run,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def snapshot(self, folder: str) -> str:
        """Write a resumable checkpoint of the current step under `folder` and return its path. Collective."""
        kept = self.args.output_dir, self.args.save_total_limit, self.args.save_only_model
        self.args.output_dir, self.args.save_total_limit, self.args.save_only_model = folder, None, False
        try:
            with same_random_state():
                self._save_checkpoint(self.model, trial=None)
        finally:
            self.args.output_dir, self.args.save_total_limit, self.args.save_only_model = kept
        return os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def learning_rates(self, first: int, steps: int) -> list[float] | None:
        """Return the learning rates of a span of steps before any is taken, None if they follow from measured losses.

        LLaMA-Factory's own scheduler is stepped over an optimizer of one number.
        """
        if self.args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            return None
        number = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([number], lr=self.args.learning_rate)
        kept = self.lr_scheduler, self._created_lr_scheduler
        self.lr_scheduler = None
        try:
            scheduler: Any = self.create_scheduler(self.args.max_steps, optimizer)
        finally:
            self.lr_scheduler, self._created_lr_scheduler = kept
        rates = []
        for step in range(first + steps):
            if step >= first:
                rates.append(float(scheduler.get_last_lr()[0]))
            optimizer.step()
            scheduler.step()
        return rates


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


@contextlib.contextmanager
def same_random_state() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's random state as it was found."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@functools.cache
def _accept_cpu_index() -> None:
    """Let `torch.load` map to `cpu:0`, the device that Transformers names when several CPU processes resume."""
    torch.serialization.register_package(
        5, lambda _: None, lambda storage, place: storage if place == "cpu:0" else None
    )
