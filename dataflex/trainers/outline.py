"""A trainer before there is a model: everything that a run's decisions follow from, and nothing that could train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.trainer_callback import TrainerState

from dataflex.rows import RowSets
from dataflex.schedule import Round, Schedule
from dataflex.trainers.trainer import DataflexTrainer


@dataclass(frozen=True)
class Prepared:
    """A run whose rows are there, and whose model is not loaded yet.

    Attributes:
        sets: the rows.
        tokenizer: with the template's changes.
        model_args: LLaMA-Factory's.
        data_args: LLaMA-Factory's.
        training_args: LLaMA-Factory's.
        finetuning_args: LLaMA-Factory's.
        trainer: the class that would train.
    """

    sets: RowSets
    tokenizer: Any
    model_args: Any
    data_args: Any
    training_args: Any
    finetuning_args: Any
    trainer: type[DataflexTrainer]

    def outline(self, schedule: Schedule | None, processes: int, rows: int | None = None) -> DataflexTrainer:
        """Return the trainer of so many processes, without a model, an optimizer or a loader.

        Args:
            schedule: of a run whose rows are decided; None: their order is LLaMA-Factory's.
            processes: that will train.
            rows: in the training set, where those at hand stand for more.
        """
        made, args = self.trainer.__new__(self.trainer), self.training_args
        made.args, made.model_arguments, made.finetuning_args = args, self.model_args, self.finetuning_args
        made.processing_class, made.row_sets = self.tokenizer, self.sets
        made.train_dataset = self.sets.module["train_dataset"]
        made.state = TrainerState()
        made.lr_scheduler, made._created_lr_scheduler = None, False
        made.global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        if schedule is not None:
            made.rounds = take_rounds(args, schedule, rows or len(self.sets.train), made.global_batch)
        return made


def take_rounds(args: Any, schedule: Schedule, rows: int, batch: int) -> Sequence[Round]:
    """Return the rounds of a schedule, and set the steps of the run in its training arguments.

    Args:
        args: Transformers' training arguments.
        schedule: the schedule.
        rows: in the training set.
        batch: rows of an optimizer step.
    """
    args.max_steps = schedule.total(rows=rows, batch=batch)
    args.ignore_data_skip = True  # the loader starts at the step itself
    return schedule.rounds(rows=rows, batch=batch)
