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


def lineage(trainer: DirectedTrainer, parent: Any, keys: np.ndarray, first: int, steps: int) -> dict[str, Any] | None:
    """Describe the state after `steps` more steps; its digest is the lineage.

    Args:
        trainer: before it trains.
        parent: identity of the state at step `first`, plain data.
        keys: (steps x global batch,) row keys in training order.
        first: steps done before.
        steps: steps to come.

    Returns:
        Plain data, or None where the learning rates follow from what training measures.
    """
    args = trainer.args
    rates = trainer.learning_rates(first, steps)
    if rates is None:
        return None
    return {
        "parent": parent,
        "rows": keys_digest(keys),
        "learning rates": rates,
        "batch": {
            "per device": args.per_device_train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "processes": args.world_size,
        },
        **training_arguments(trainer),
    }
