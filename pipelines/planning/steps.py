"""How many optimizer steps a run takes, on how many rows, and which of them are behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dataflex.checkpoints.marks import step_of
from dataflex.config.settings import Settings
from dataflex.pipelines.run import Run
from dataflex.trainers.resumption import Resumption


@dataclass(frozen=True)
class Steps:
    """The steps of a run.

    Attributes:
        total: optimizer steps.
        warmup: of them, those before the method acts.
        updates: times that the method decides.
        global_batch: rows of a step, over all processes.
        processes: that train.
        done: steps behind which the run goes on, from a checkpoint in its folder.
        rows: that are trained on, with repetition.
    """

    total: int
    warmup: int
    updates: int
    global_batch: int
    processes: int
    done: int
    rows: int

    def steps_left(self, kept: int) -> int:
        """Return the steps that are still to be taken, if the state behind `kept` of them is kept."""
        return max(0, self.total - max(self.done, kept))

    def plain(self, mean: float) -> dict[str, Any]:
        """Return the steps as plain data.

        Args:
            mean: tokens of a row.
        """
        return {
            "steps": self.total,
            "warmup_steps": self.warmup,
            "updates": self.updates,
            "global_batch": self.global_batch,
            "processes": self.processes,
            "rows_trained": self.rows,
            "tokens_trained": round(self.rows * mean),
            "done": self.done,
        }


def steps_of(run: Run, settings: Settings, args: Any, processes: int, factor: float) -> Steps:
    """Return the steps of a run.

    Args:
        run: the run.
        settings: its run file.
        args: its training arguments.
        processes: that train.
        factor: rows that each row looked at stands for.
    """
    batch, done = run.trainer.global_batch, _done(settings)
    if settings.train_type in ("dynamic_select", "dynamic_mix"):
        rounds = run.rounds
        total, rows = args.max_steps, args.max_steps * batch
        warm = sum(round.steps for round in rounds if round.kind == "warmup")
        return Steps(total, warm, len(run.updates), batch, processes, done, rows)
    # Transformers' own count: the last batches of an epoch make a step of their own.
    count = round(len(run.rows) * factor)
    each = args.per_device_train_batch_size * processes
    batches = count // each if args.dataloader_drop_last else math.ceil(count / each)
    of_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * of_epoch)
    passes = total / of_epoch
    rows = (
        round(passes * min(count, batches * each)) if args.max_steps <= 0 else min(total * batch, round(passes * count))
    )
    warm = min(settings.keys.warmup_step, total) if settings.train_type == "dynamic_weight" else 0
    return Steps(total, warm, 0, batch, processes, done, rows)


def _done(settings: Settings) -> int:
    """Return the step that the run goes on from, by what its folder has."""
    is_static = settings.train_type == "static"
    found = Resumption.of(settings.llamafactory, takes_unmarked=is_static).arguments().get("resume_from_checkpoint")
    named = settings.llamafactory.get("resume_from_checkpoint")
    folder = found or (named if isinstance(named, str) else None)
    return step_of(folder) if folder else 0
