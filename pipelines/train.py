"""`dataflex train`: LLaMA-Factory's training, with a selector, a mixer or a weighter."""

from __future__ import annotations

from typing import Any

from dataflex.llamafactory import workflow
from dataflex.pipelines.mixing.director import MixingDirector
from dataflex.pipelines.selecting.director import SelectingDirector
from dataflex.pipelines.weighing.director import WeighingDirector


def train(settings: Any) -> None:
    """Train as the run file says. Call it on every rank.

    Args:
        settings: `dataflex.config.Settings`.
    """
    directors: dict[str, Any] = {
        "dynamic_select": SelectingDirector,
        "dynamic_mix": MixingDirector,
        "dynamic_weight": WeighingDirector,
    }
    made = directors.get(settings.train_type)
    arguments = dict(settings.llamafactory)
    if settings.train_type == "dynamic_weight" and settings.keys.train_step:
        arguments["max_steps"] = settings.keys.train_step
    workflow.run(
        arguments,
        made(settings) if made else None,
        settings.keys.early_stopping_min_delta,
        settings.dataflex.checkpoint_on_signal,
        exclude_targets=settings.dataflex.exclude_targets,
    )
