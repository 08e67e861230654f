"""The learning rates of a run, tried before anything is loaded: options may be right one by one and not together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import get_scheduler

from dataflex.errors import ConfigError

_STEPS = 100


def check_schedule(arguments: Mapping[str, Any]) -> None:
    """Take the steps of a short run with its schedule and no model.

    Raises:
        ConfigError: the schedule does not take its options, or gives a rate that is no number.
    """
    options, kind = arguments.get("lr_scheduler_kwargs"), arguments.get("lr_scheduler_type", "linear")
    # A short run tells: options act alike over a hundred steps and over millions.
    given = json.loads(options) if isinstance(options, str) else options or {}
    warmup = arguments.get("warmup_steps") or arguments.get("warmup_ratio") or 0
    warmup = min(math.ceil(warmup * _STEPS if warmup < 1 else warmup), _STEPS)  # a run may warm up for millions
    steps = warmup + _STEPS
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], arguments.get("learning_rate", 5e-5))
    try:
        scheduler = get_scheduler(kind, optimizer, warmup, steps, dict(given))
        measured = (1.0,) if kind in ("reduce_lr_on_plateau", "greedy") else ()  # these go by the loss
        rates = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step(*measured)
            rates.append(optimizer.param_groups[0]["lr"])
        if not all(math.isfinite(rate) for rate in rates):
            raise ValueError("a learning rate is no number")
    # Schedules of Transformers and torch compute with whatever they are given, and raise whatever that meets.
    except Exception as error:
        text = f"{' '.join(str(error).split())} ({type(error).__name__})"
        raise ConfigError(
            f"lr_scheduler_kwargs: found {given or 'nothing'}, which lr_scheduler_type: {kind} does not work with: "
            f"{text}; expected options of this schedule"
        ) from error
