"""The name of a training state before it is reached: what it grew from and everything that led to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from dataflex.fingerprint import keys_digest

# Arguments of fine-tuning that do not reach the weights.
_SILENT = (
    "plot_loss", "compute_accuracy", "include_effective_tokens_per_second", "early_stopping_steps", "disable_shuffling",
    "disable_dropout", "ref_model", "reward_model", "stage",
)  # fmt: skip
_OPTIMIZER = (
    "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "learning_rate",
    "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices",
)  # fmt: skip


def lineage(trainer: Any, parent: Any, keys: np.ndarray, first: int, steps: int) -> dict[str, Any]:
    """Describe the state after `steps` more steps; its digest is the lineage.

    Args:
        trainer: the `RoundTrainer`, before it trains.
        parent: identity of the state at step `first`, plain data.
        keys: (steps x global batch,) row keys in training order.
        first: steps done before.
        steps: steps to come.
    """
    args = trainer.args
    tuning = {k: v for k, v in vars(trainer.finetuning_args).items() if k not in _SILENT and "swanlab" not in k}
    return {
        "parent": parent,
        "rows": keys_digest(keys),
        "learning rates": trainer.learning_rates(first, steps),
        "optimizer": {name: _plain(getattr(args, name, None)) for name in _OPTIMIZER},
        "fine-tuning": {name: _plain(value) for name, value in tuning.items()},
        "batch": {
            "per device": args.per_device_train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "processes": args.world_size,
        },
        "seed": args.seed,
        "deepspeed": _plain(args.deepspeed),
        "numerics": {"bf16": args.bf16, "fp16": args.fp16, "device": args.device.type},
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)
