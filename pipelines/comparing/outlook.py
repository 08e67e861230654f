"""How much there is still to run, and how long that takes by what has finished."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dataflex.config.idle import known_steps
from dataflex.pipelines.comparing.trials import Trial

log = logging.getLogger(__name__)


class Outlook:
    """What is left of a comparison; logged as it begins, and whenever a run has finished.

    Args:
        todo: the runs that are to be made; of these the trainings count.
        found: records of those that are finished.
        jobs: runs at a time.
    """

    def __init__(self, todo: Sequence[Trial], found: Iterable[Mapping[str, Any]], jobs: int):
        self._left, self._jobs, self._is_whole = [trial for trial in todo if trial.verb == "train"], jobs, True
        self._took: dict[str, list[float]] = {}
        trained = {(r["arm"], r["target"], r["seed"], r["target_seed"]): r for r in found if r["steps"]}
        for record in trained.values():
            wall, own = record.get("wall_seconds"), record["seconds"] + (record.get("choice_seconds") or 0.0)
            self._took.setdefault(record["arm"], []).append(wall or own)
            self._is_whole = self._is_whole and wall is not None
        self._say()

    def finished(self, trial: Trial, seconds: float, is_whole: bool = True) -> None:
        """Note that a run has ended well, and how long it took; not whole, if it was begun before that."""
        if trial.verb != "train":
            return
        self._left = [each for each in self._left if each is not trial]
        self._took.setdefault(trial.arm.name, []).append(seconds)
        self._is_whole = self._is_whole and is_whole
        self._say()

    def _say(self) -> None:
        if self._left:
            log.info("%s", self)

    def __str__(self) -> str:
        """Say it in a line."""
        steps = [_steps(trial) for trial in self._left]
        total = f", {sum(each or 0 for each in steps):,} optimizer steps" if all(x is not None for x in steps) else ""
        text = f"to train: {len(self._left)}{total}"
        if not self._took:
            return f"{text}; how long that takes is told when the first has finished"
        means = {arm: float(np.mean(values)) for arm, values in self._took.items()}
        other = float(np.mean(list(means.values())))
        hours = sum(means.get(trial.arm.name, other) for trial in self._left) / 3600
        unknown = len({trial.arm.name for trial in self._left} - means.keys())
        by = f"by what has finished: {sum(map(len, self._took.values()))}"
        by += f"; methods that nothing has finished of, taken for as long as the others: {unknown}" if unknown else ""
        at_once = f", {hours / self._jobs:.2g} h with {self._jobs} at a time" if self._jobs > 1 else ""
        about = "about" if self._is_whole else "at least"  # else starting and measuring are not in all of it
        return f"{text}, {about} {hours:.2g} h one after another{at_once} ({by})"


def _steps(trial: Trial) -> int | None:
    """Return the steps that a run trains, its choice included; None if they follow from its rows."""
    settings = trial.settings
    own = known_steps(settings.keys, settings.schedule, settings.llamafactory)
    before = None if trial.choice is None else trial.choice.settings
    is_warmed_up = before is not None and any(need.state is None for need in before.needs)
    return own if own is None or before is None or not is_warmed_up else own + before.schedule.warmup_step
