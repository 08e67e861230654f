"""`dataflex train`: LLaMA-Factory's training, with a selector, a mixer or a weighter."""

from __future__ import annotations

from functools import partial

from dataflex.config.settings import Settings
from dataflex.llamafactory import workflow
from dataflex.pipelines.mixing.director import MixingDirector
from dataflex.pipelines.selecting.director import directed
from dataflex.pipelines.weighing.director import WeighingDirector
from dataflex.trainers.directing import Directing


def train(settings: Settings) -> None:
    """Train as the run file says. Call it on every rank.

    Args:
        settings: the validated run file.
    """
    directing = {
        "static": None,
        "dynamic_select": Directing(partial(directed, settings), settings.schedule, interrupts=True),
        "dynamic_mix": Directing(partial(MixingDirector, settings), settings.schedule),
        "dynamic_weight": Directing(partial(WeighingDirector, settings)),
    }[settings.train_type]
    arguments = dict(settings.llamafactory)
    if settings.train_type == "dynamic_weight" and settings.keys.train_step:
        arguments["max_steps"] = settings.keys.train_step
    workflow.run(
        arguments,
        directing,
        settings.keys.early_stopping_min_delta,
        settings.dataflex.checkpoint_on_signal,
        options=settings.dataflex,
    )
