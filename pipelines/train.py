"""`dataflex train`: LLaMA-Factory's training, with the rows of every round chosen by a selector."""

from __future__ import annotations

from typing import Any

from dataflex.llamafactory import workflow
from dataflex.pipelines.director import RoundDirector


def train(settings: Any) -> None:
    """Train as the run file says. Call it on every rank.

    Args:
        settings: `dataflex.config.Settings`.
    """
    director = None if settings.train_type == "static" else RoundDirector(settings)
    workflow.run(settings.llamafactory, director, settings.early_stopping_min_delta)
