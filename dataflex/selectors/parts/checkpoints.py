"""Weights of checkpoints in a sum over them. C checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataflex.errors import ConfigError


def checkpoint_weights(checkpoints: Sequence[str], given: Sequence[float] | None) -> np.ndarray:
    """Return the weight of each checkpoint, (C,), summing to one.

    The default is the mean logged learning rate of the steps since the checkpoint before, as in the paper; dividing by
    their sum does not change a ranking.

    Raises:
        ConfigError: a checkpoint has no log of learning rates, or all of them are 0.
    """
    if given is not None:
        return np.asarray(given) / sum(given)
    means, before = [], 0
    for folder in checkpoints:
        path = Path(folder) / "trainer_state.json"
        try:
            state = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not readable ({error}); give dataflex.params.weights") from error
        step = state["global_step"]
        rates = [
            e["learning_rate"] for e in state["log_history"] if "learning_rate" in e and before < e["step"] <= step
        ]
        if not rates:
            raise ConfigError(
                f"{path}: no learning rate logged for steps {before + 1} to {step}; give dataflex.params.weights, or "
                "name the checkpoints in the order of their steps"
            )
        means.append(float(np.mean(rates)))
        before = step
    if not sum(means) > 0:
        raise ConfigError(f"{checkpoints[0]}: every learning rate logged is 0; give dataflex.params.weights")
    return np.asarray(means) / sum(means)
