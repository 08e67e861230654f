"""One loader for the whole run: a DataLoader per round, each decided when its first batch is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from dataflex.schedule import Round


@dataclass(frozen=True)
class DecidedRound:
    """The rows of one round.

    Attributes:
        round: which round of the schedule.
        rows: (R,) int64 positions in the training set, in training order; R = round.steps x global batch.
        scores: (R,) float64 score of each row, NaN where the method gives none.
        ages: (R,) int32 updates since the features behind the score were computed, -1 where there are none.
        info: plain data for the journal: method, counts, seconds.
    """

    round: Round
    rows: np.ndarray
    scores: np.ndarray
    ages: np.ndarray
    info: dict[str, Any] = field(default_factory=dict)


class RoundLoader:
    """Iterates over the micro-batches of this rank from the trainer's current step to the end of the run.

    A step's rows are dealt so that micro-batch `j` of rank `r` holds rows `(j * world + r) * B` to `+ B` of the step:
    the rows of a step depend on the global batch alone.

    Args:
        trainer: gives dataset, collator, arguments and, when iteration begins, the step to begin at.
        rounds: all rounds of the run, in order.
        decide: returns a round's rows, or None to end the run before it.
    """

    def __init__(self, trainer: Any, rounds: list[Round], decide: Callable[[Round], DecidedRound | None]):
        self.dataset = trainer.train_dataset
        self._trainer = trainer
        self._rounds = rounds
        self._decide = decide

    def __len__(self) -> int:
        """Return the run's micro-batches per rank, those already trained included."""
        return sum(r.steps for r in self._rounds) * int(self._trainer.args.gradient_accumulation_steps)

    def __iter__(self) -> Iterator[Any]:
        """Yield collated micro-batches on the CPU; the trainer moves them to its device."""
        step = self._trainer.state.global_step
        for round in self._rounds:
            if round.first_step + round.steps <= step:
                continue
            decided = self._decide(round)
            if decided is None:
                return
            yield from self._loader(decided, skip=max(0, step - round.first_step))

    def _loader(self, decided: DecidedRound, skip: int) -> DataLoader[Any]:
        args = self._trainer.args
        batches = micro_batches(
            decided.rows, decided.round.steps, args.gradient_accumulation_steps, args.world_size, args.process_index
        )
        workers = args.dataloader_num_workers
        return DataLoader(
            self.dataset,
            batch_sampler=batches[skip * args.gradient_accumulation_steps :],
            collate_fn=self._trainer.data_collator,
            num_workers=workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
            # Its own generator: a loader draws a seed when it is opened, which must not move the dropout stream.
            generator=torch.Generator().manual_seed(args.seed + decided.round.number),
        )


def micro_batches(rows: np.ndarray, steps: int, accumulation: int, world: int, rank: int) -> list[list[int]]:
    """Deal a round's rows to one rank's micro-batches, in the order in which it trains on them."""
    parts: np.ndarray = rows.reshape(steps * accumulation, world, -1)[:, rank]
    return [[int(row) for row in part] for part in parts]
