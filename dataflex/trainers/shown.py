"""What is shown while a run trains: phase, steps, loss, the time left; and the log that its numbers go to."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dataflex import display, distributed

log = logging.getLogger(__name__)

OURS = "dataflex/"
"""What the names of our numbers begin with in a training's log."""
LOG = "trainer_log.jsonl"
"""LLaMA-Factory's own log of a training, which its callback writes losses to."""


class Shown(TrainerCallback):
    """The bar of a training, in place of Transformers' own."""

    def __init__(self) -> None:
        self._task: display.Task | None = None
        self._what = "training"
        self._losses: list[float] = []

    def phase(self, what: str) -> None:
        """Say what the training is at."""
        self._what = what
        if self._task is not None:
            self._task.update(what=what)

    def close(self) -> None:
        """Show nothing any more."""
        if self._task is not None:
            display.end(self._task)
            self._task = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to show."""
        self._task = display.begin(self._what, state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show how far it is."""
        if self._task is not None:
            self._task.total = state.max_steps
            self._task.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        if self._task is not None and logs and "loss" in logs:
            self._losses = [*self._losses[:1], logs["loss"]]
            self._task.update(note=f"loss {logs['loss']:.4g}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show nothing any more, and say what it came to."""
        self.close()
        if self._losses and distributed.is_main():
            first, *last = self._losses
            log.info("trained to step %d: loss %.4g%s", state.global_step, first, f" to {last[0]:.4g}" if last else "")


class OwnNumbers(TrainerCallback):
    """Writes what methods know into LLaMA-Factory's own log, whose callback keeps losses alone."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append a line with our numbers, if there are any."""
        numbers = {name: value for name, value in (logs or {}).items() if name.startswith(OURS)}
        if not numbers or not args.should_save:
            return
        line = {"current_steps": state.global_step, "total_steps": state.max_steps, **numbers}
        path = Path(args.output_dir) / LOG
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
