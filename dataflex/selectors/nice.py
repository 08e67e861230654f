"""NICE: rows whose training step points where the reward of the model's own answers to the targets rises."""

from __future__ import annotations

from typing import Any, ClassVar

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

        elsewhere: ClassVar[dict[str, str]] = {
            "reward_model_backend": "reward in its place: {type: judge, base_url: ..., model: ...} for a model on an "
            "OpenAI-compatible server, which `vllm serve MODEL` makes of a local one; docs/rewards.md has others",
            "reward_backend_params": "reward's own parameters in its place: base_url (api_url without "
            "/chat/completions), model (model_name, hf_model_name_or_path), api_key_env (the variable that "
            "api_key names), temperature, max_tokens",
            "reward_prompt_with_ref": "template of reward: {type: judge, ...} in its place, with {prompt}, {response}, "
            "{reference}",
            "reward_prompt_without_ref": "template of reward: {type: judge, ...} in its place, with {prompt} and "
            "{response}",
            "policy_model_path": "no such key, as the model that is trained writes the responses; for those of another "
            "one on_policy: sampled and generator: {type: openai, base_url: ..., model: ...}",
            "prompt_template": "no such key, as prompts are written by the run's own template",
            "max_prompt_length": "no such key, as cutoff_len bounds prompts",
        }
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
