"""The name of a training state before it is reached: what it grew from and everything that led to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.fingerprint import keys_digest

# Arguments of fine-tuning that do not reach the weights.
_SILENT = (
    "plot_loss", "compute_accuracy", "include_effective_tokens_per_second", "early_stopping_steps", "disable_shuffling",
)  # fmt: skip
_TRAINING = (
    "seed", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm",
    "learning_rate", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices", "bf16", "fp16",
    "tf32", "fp8", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel",
    "full_determinism",
)  # fmt: skip


def training_arguments(trainer: Any) -> dict[str, Any]:
    """Return every argument that changes what a step does to the weights, but the schedule of learning rates."""
    args = trainer.args
    tuning = {k: v for k, v in vars(trainer.finetuning_args).items() if k not in _SILENT and "swanlab" not in k}
    deepspeed = args.deepspeed
    if isinstance(deepspeed, str):
        deepspeed = json.loads(Path(deepspeed).read_text("utf-8"))
    return {
        "training": {name: _plain(getattr(args, name, None)) for name in _TRAINING},
        "fine-tuning": {name: _plain(value) for name, value in tuning.items()},
        "deepspeed": deepspeed,
        "device": args.device.type,
    }


def lineage(trainer: Any, parent: Any, keys: np.ndarray, first: int, steps: int) -> dict[str, Any] | None:
    """Describe the state after `steps` more steps; its digest is the lineage.

    Args:
        trainer: the `RoundTrainer`, before it trains.
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


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)
