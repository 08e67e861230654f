"""What the steps of a training take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback


class Pace(TrainerCallback):
    """Counts steps and their seconds, evaluations and checkpoints between them included.

    Attributes:
        steps: that were taken by this process.
        seconds: that they took.
    """

    def __init__(self) -> None:
        self.steps, self.seconds, self._since = 0, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step, from the end of the one before."""
        now = time.monotonic()
        self.steps, self.seconds, self._since = self.steps + 1, self.seconds + now - self._since, now

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Stop the clock for something that is no step."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - begun
