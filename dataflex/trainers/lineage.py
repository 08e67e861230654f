"""The name of a training state before it is reached: what it grew from and everything that led to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from dataflex.config.arguments import values
from dataflex.fingerprint import keys_digest
from dataflex.trainers.directing import DirectedTrainer


def training_arguments(trainer: DirectedTrainer) -> dict[str, Any]:
    """Return every argument that changes what a step does to the weights, but the schedule of learning rates."""
    holders = trainer.args, trainer.finetuning_args, trainer.model_arguments
    ways = ("model", "drawn", "drawn file", "step", "step file")
    return {"arguments": values(ways, *holders), "device": trainer.args.device.type}


def split_of(trainer: DirectedTrainer) -> dict[str, int]:
    """Return how the global batch is divided: rows of a device, accumulation, processes."""
    args = trainer.args
    return {
        "per device": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        # Of a plan, which is one process, those that the run will have.
        "processes": trainer.global_batch // (args.per_device_train_batch_size * args.gradient_accumulation_steps),
    }


def lineage(
    trainer: DirectedTrainer, parent: Any, keys: np.ndarray, first: int, steps: int, is_exact: bool = False
) -> dict[str, Any] | None:
    """Describe the state after `steps` more steps; its digest is the lineage.

    How the global batch is divided moves the last bits of a step and, with dropout, the masks: the state is one draw of
    the same experiment. What is computed of it later is named by its weights, not by the lineage.

    Args:
        trainer: before it trains.
        parent: identity of the state at step `first`, plain data.
        keys: (steps x global batch,) row keys in training order.
        first: steps done before.
        steps: steps to come.
        is_exact: whether the division of the global batch is a part of the name.

    Returns:
        Plain data, or None where the learning rates follow from what training measures.
    """
    rates = trainer.learning_rates(first, steps)
    if rates is None:
        return None
    return {
        "parent": parent,
        "rows": keys_digest(keys),
        "learning rates": rates,
        "batch": split_of(trainer) if is_exact else {"global": trainer.global_batch},
        **training_arguments(trainer),
    }
