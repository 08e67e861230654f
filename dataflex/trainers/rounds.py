"""One loader for the whole run, whose rounds are decided when their first batch is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer
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
    the rows of a step depend on the global batch alone. One DataLoader serves all rounds; its workers stay, and read
    ahead within a round.

    Args:
        trainer: gives dataset, collator, arguments and, when iteration begins, the step to begin at.
        rounds: all rounds of the run, in order.
        decide: returns a round's rows, or None to end the run before it.
    """

    def __init__(self, trainer: Trainer, rounds: Sequence[Round], decide: Callable[[Round], DecidedRound | None]):
        self.dataset: Any = trainer.train_dataset
        self._trainer = trainer
        self._rounds = rounds
        self._decide = decide

    def __len__(self) -> int:
        """Return the run's micro-batches per rank, those already trained included."""
        return sum(r.steps for r in self._rounds) * int(self._trainer.args.gradient_accumulation_steps)

    def __iter__(self) -> Iterator[Any]:
        """Yield collated micro-batches on the CPU; the trainer moves them to its device."""
        args, step = self._trainer.args, self._trainer.state.global_step
        # Its own generator: a loader draws a seed when it is opened, which must not move the dropout stream.
        batches, draws = _Batches(), torch.Generator()
        loader = self._loader(batches, draws)
        for round in self._rounds:
            if round.first_step + round.steps <= step:
                continue
            decided = self._decide(round)
            if decided is None:
                return
            found = micro_batches(
                decided.rows, decided.round.steps, args.gradient_accumulation_steps, args.world_size, args.process_index
            )
            batches.now = found[max(0, step - round.first_step) * args.gradient_accumulation_steps :]
            draws.manual_seed(args.seed + round.number)
            yield from loader
            if decided.round.steps < round.steps:  # the rows came to an end
                return

    def _loader(self, batches: _Batches, draws: torch.Generator) -> DataLoader[Any]:
        args = self._trainer.args
        workers = args.dataloader_num_workers
        return DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=self._trainer.data_collator,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
            generator=draws,
        )


class _Batches:
    """The micro-batches of the round that is under way."""

    def __init__(self) -> None:
        self.now: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.now)

    def __len__(self) -> int:
        return len(self.now)


def micro_batches(rows: np.ndarray, steps: int, accumulation: int, world: int, rank: int) -> list[list[int]]:
    """Deal a round's rows to one rank's micro-batches, in the order in which it trains on them."""
    parts: np.ndarray = rows.reshape(steps * accumulation, world, -1)[:, rank]
    return [[int(row) for row in part] for part in parts]
