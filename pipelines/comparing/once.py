"""Rows that are chosen once, and a fresh model that is trained on them: `dataflex compare --once`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataflex.config.idle import known_steps
from dataflex.config.settings import Settings
from dataflex.errors import ConfigError
from dataflex.pipelines.comparing.arms import SPECIAL, Arm

CHOSEN = "chosen.parquet"
"""In the folder of a choice: its rows, as `dataflex select` writes them."""
_METHODS_OWN = ("component_name", "dataflex.params", "dataflex.prefilter", "dataflex.refresh")
"""Keys of a method, which the training on its rows has no use for; what is below them is meant too."""


@dataclass(frozen=True)
class Once:
    """What is chosen once, and how long the training on it is.

    Attributes:
        rows: to choose.
        steps: optimizer steps of every training.
        pass_steps: steps of about one pass over the rows, after which their order is drawn anew.
    """

    rows: int
    steps: int
    pass_steps: int

    @classmethod
    def of(cls, rows: int, run: Settings, processes: int) -> Once:
        """Take the steps of the run file for those of each training.

        Raises:
            ConfigError: they follow from the rows of the run; or its method neither selects, mixes nor weights.
        """
        if run.train_type == "static":
            raise ConfigError("--once: found train_type: static; expected a run file with a method, to be varied")
        steps = known_steps(run.keys, run.schedule, run.llamafactory)
        if steps is None:
            raise ConfigError(
                "--once: every model is trained for as many steps as the run, and how many these are follows from its "
                "rows; set train_step"
            )
        arguments = run.llamafactory
        batch = arguments.get("per_device_train_batch_size", 8) * arguments.get("gradient_accumulation_steps", 1)
        return cls(rows, steps, math.ceil(rows / (batch * processes)))

    def chooses(self, arm: Arm, settings: Settings) -> bool:
        """Say whether an arm chooses rows: mixers, weighters and the whole pool are trained as without `--once`."""
        is_special = arm.name in SPECIAL and arm.mirrors is None
        return settings.train_type == "dynamic_select" and arm.is_trained and not is_special

    def training(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of the training on chosen rows: no warm-up, passes over the rows, each in a new order."""
        kept = {k: v for k, v in keys.items() if not any(k == own or k.startswith(f"{own}.") for own in _METHODS_OWN)}
        schedule = {"warmup_step": 0, "update_step": self.pass_steps, "update_times": 1, "train_step": self.steps}
        # `random` stands for `static` where the run file is checked: the file of rows is not there yet.
        method = {"train_type": "dynamic_select", "component_name": "random", "dataflex.params": {}}
        return {**kept, **schedule, **method, "dataflex.prefilter": None, "dataflex.refresh": {"policy": "full"}}
