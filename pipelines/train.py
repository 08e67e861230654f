"""`dataflex train`: LLaMA-Factory's training, with a selector, a mixer or a weighter."""

from __future__ import annotations

from typing import Any

from dataflex.llamafactory import workflow
from dataflex.pipelines.director import RoundDirector
from dataflex.pipelines.mix import MixDirector
from dataflex.pipelines.weigh import WeightDirector


def train(settings: Any) -> None:
    """Train as the run file says. Call it on every rank.

    Args:
        settings: `dataflex.config.Settings`.
    """
    directors: dict[str, Any] = {
        "dynamic_select": RoundDirector,
        "dynamic_mix": MixDirector,
        "dynamic_weight": WeightDirector,
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
