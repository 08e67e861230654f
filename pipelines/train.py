"""`dataflex train`: LLaMA-Factory's training, with a selector, a mixer or a weighter."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from dataflex import distributed
from dataflex.config.settings import Settings
from dataflex.llamafactory import workflow
from dataflex.pipelines.measuring import measure
from dataflex.pipelines.mixing.director import MixingDirector
from dataflex.pipelines.recording import record_untouched
from dataflex.pipelines.selecting.director import directed
from dataflex.pipelines.summary import TRAINED
from dataflex.pipelines.weighing.director import WeighingDirector
from dataflex.results import opening
from dataflex.trainers.directing import DirectedTrainer, Directing
from dataflex.whole import replacing


def train(settings: Settings) -> None:
    """Train as the run file says, and measure what came out on its test sets. Call it on every rank.

    Args:
        settings: the validated run file.
    """
    made: list[Any] = []

    def begin(director: Any, trainer: DirectedTrainer, checkpoint: str | None) -> Any:
        made.append(director(settings, trainer, checkpoint))
        return made[-1]

    directing = {
        "static": None,
        "dynamic_select": Directing(partial(begin, directed), settings.schedule, interrupts=True),
        "dynamic_mix": Directing(partial(begin, MixingDirector), settings.schedule),
        "dynamic_weight": Directing(partial(begin, WeighingDirector)),
    }[settings.train_type]
    arguments = dict(settings.llamafactory)
    if settings.train_type == "dynamic_weight" and settings.keys.train_step:
        arguments["max_steps"] = settings.keys.train_step
    with opening.beginning():
        if directing is None:
            record_untouched(settings)
        workflow.run(
            arguments,
            directing,
            settings.keys.early_stopping_min_delta,
            settings.dataflex.checkpoint_on_signal,
            options=settings.dataflex,
        )
    if made and settings.dataflex.test_dataset:  # only now: the model is saved, whatever becomes of the measuring
        run = made[-1].run
        measured = measure(run, run.trainer.output_dir)
        if distributed.is_main():
            run.access.record.finish()
            path = run.trainer.output_dir / TRAINED
            _add(path, {"test": measured})


def _add(path: Path, more: dict[str, Any]) -> None:
    """Add to a summary."""
    found = json.loads(path.read_text("utf-8"))
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found | more, indent=1) + "\n", "utf-8")
