"""NICE: rows whose training step points where the reward of the model's own answers to the targets rises."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from dataflex.components.compatibility import accepted
from dataflex.selectors.composed import Aggregation, Composed, Composition, over_sets
from dataflex.selectors.parts.representation import part
from dataflex.selectors.parts.vectors import PolicyFields, PolicyVectors


class Nice(Composed):
    """LESS, but the targets' gradient is that of the expected reward of the responses that the live model writes.

    Source: NICE, ICML 2025 (PMLR 267:63662); estimators in `dataflex.features.policy`. Deviations: `loo_baseline` is
    the default, since a constant offset of the reward then changes nothing (`vanilla` is the paper's); responses are
    drawn from the model itself and kept as token ids; 4 of them (published commands use 20 to 500).
    """

    class Params(PolicyFields):
        """Parameters of `nice`."""

        reward_model_path: str | None = Field(None, description="short for reward: {type: reward_model, path: ...}")
        aggregation: Aggregation = Field(
            "max", description="over target sets: best set, mean of sets, or sets taking turns"
        )
        save_interval: int = accepted("save_interval", 16, ge=1)
        cache_dir: str | None = Field(
            None, description="root of the stores where neither dataflex.store nor DATAFLEX_HOME is set"
        )

        @model_validator(mode="before")
        @classmethod
        def _reward_model(cls, values: Any) -> Any:
            path = values.get("reward_model_path") if isinstance(values, dict) else None
            if path is None:
                return values
            if values.get("reward"):
                raise ValueError("reward or reward_model_path, not both")
            return values | {"reward": [{"type": "reward_model", "path": path}]}

    def composition(self, params: Params) -> Composition:
        """Return the parts."""
        return Composition(
            representation=part(PolicyVectors, params),
            **over_sets(params.aggregation),
        )
