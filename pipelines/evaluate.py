"""`dataflex evaluate`: measure the model that a run begins with on the run's test sets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dataflex import distributed
from dataflex.config.settings import Settings
from dataflex.errors import ConfigError
from dataflex.pipelines.featurize import run_until_update
from dataflex.pipelines.measuring import measure
from dataflex.pipelines.run import open_run
from dataflex.pipelines.summary import write_summary
from dataflex.schedule import Round, Schedule
from dataflex.trainers.directing import DirectedTrainer, OwnStep
from dataflex.trainers.weighing import Weighing

log = logging.getLogger(__name__)

SUMMARY = "dataflex_evaluate.json"


def evaluate(settings: Settings) -> None:
    """Measure the model as it is before any training, with the adapter that the run file names. Call it on every rank.

    Writes `test_evaluate.parquet` and a summary into the run's folder.

    Raises:
        ConfigError: the run file names no test set.
    """
    if not settings.dataflex.test_dataset:
        raise ConfigError("dataflex.test_dataset: found none; expected registered datasets to measure the model on")
    nothing: dict[str, Any] = {"component": None, "component_name": None, "params": None, "needs": ()}
    nothing |= {"weighter": None, "weighter_params": None, "schedule": Schedule(train_step=1)}
    nothing |= {"prefilter": None, "prefilter_params": None}
    options = settings.dataflex.model_copy(update={"features": (), "weighter": None, "prefilter": None})
    settings = settings.model_copy(update={**nothing, "dataflex": options})
    run_until_update(settings, EvaluateDirector.verb, partial(EvaluateDirector, settings), measures=True)


class EvaluateDirector:
    """A `dataflex.trainers.directing.RoundDirector` that stops before the first step.

    Args:
        settings: the run file without its methods.
        trainer: which does not train.
        checkpoint: none.
    """

    verb = "evaluate"
    start: str | None = None
    weighing: Weighing | None = None
    own_step: OwnStep | None = None
    acts_from, steps_kept = 0, 0

    def __init__(self, settings: Settings, trainer: DirectedTrainer, checkpoint: str | None):
        self._run = open_run(settings, trainer, self.verb, trainer.rounds)
        self._folder = Path(settings.llamafactory["output_dir"])

    @property
    def rounds(self) -> Sequence[Round]:
        """The one round that is never begun."""
        return self._run.rounds

    def decide(self, round: Round) -> None:
        """Measure, and stop."""
        found = measure(self._run, self._folder, self.verb)
        write_summary(self._folder / SUMMARY, self.verb, replace(self._run, rounds=()), {"test": found})

    def saved(self, checkpoint: str) -> dict[str, Any]:
        """Return nothing: no checkpoint is written."""
        return {}

    def finish(self) -> None:
        """Note that nothing is in use any more."""
        if distributed.is_main():
            self._run.access.record.finish()
