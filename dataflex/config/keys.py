"""DataFlex's own keys: the flat ones that stand beside LLaMA-Factory's, and the `dataflex:` mapping."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dataflex.components.params import Parameters
from dataflex.features.reward import RewardSpec
from dataflex.features.spec import FeatureSpec, PolicyGradientSpec
from dataflex.schedule import MOST_STEPS, Schedule
from dataflex.selectors.base import RefreshPolicy


class FlatKeys(Parameters):
    """Keys at the top level of the run file. Steps are optimizer steps."""

    train_type: Literal["static", "dynamic_select", "dynamic_mix", "dynamic_weight"] = Field(
        "static",
        description="static: LLaMA-Factory untouched; dynamic_select: a selector chooses the rows of every round; "
        "dynamic_mix: a mixer sets the share of each dataset; dynamic_weight: a weighter weighs each example's loss",
    )
    components_cfg_file: str | None = Field(
        None,
        description="YAML with the parameters of components, relative to the working folder, then to the run file; "
        "configs/components.yaml is read if it exists and nothing is given",
    )
    component_name: str | None = Field(
        None, description="selector, mixer or weighter: a registered name, or module:Class"
    )
    warmup_step: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="steps before the method acts: at the head of every flex epoch, on rows drawn at random (select); "
        "once, at init_mixture_proportions (mix); once, on the plain loss (weight)",
    )
    update_step: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="steps from one update to the next; 0: one selection per flex epoch (select), the mixer's own "
        "interval (mix)",
    )
    update_times: int = Field(
        1,
        le=MOST_STEPS,
        description="updates per flex epoch; 0 or less: a flex epoch is one pass over the data; weight: not read",
    )
    train_step: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="total steps; 0: they follow from the keys above and num_train_epochs",
    )
    static_mix: bool = Field(False, description="mix: short for the mixer static")
    mixture_sample_rule: Literal["mixture", "stratified", "uniform"] | None = Field(
        None, description="mix: mixture leaves the shares to the mixer; stratified and uniform name a mixer themselves"
    )
    init_mixture_proportions: tuple[float, ...] | None = Field(
        None, description="mix: shares before the first update, in the order of dataset; default: by size"
    )
    mixer_eval_dataset: str | None = Field(
        None, description="mix, dynamic_moe: a held-out dataset for each domain; default: rows of the domains"
    )
    freeze_gate: bool = Field(False, description="mix: do not train the routers of a mixture of experts")
    early_stopping_min_delta: float = Field(
        0.0, ge=0, description="least improvement that early_stopping_steps counts, in units of metric_for_best_model"
    )


MIX_ONLY = ("static_mix", "mixture_sample_rule", "init_mixture_proportions", "mixer_eval_dataset", "freeze_gate")


class Refresh(Parameters):
    """What is computed anew at an update, where the model has changed since the last one."""

    policy: RefreshPolicy = Field(
        "full", description="full: every row; rotating: a share of the pool, the age of the rest known; static: nothing"
    )
    refresh_fraction: float = Field(0.1, gt=0, le=1, description="rotating: share of the pool computed at each update")
    max_age: int | None = Field(None, ge=1, description="rotating: updates after which a value is always computed anew")

    @model_validator(mode="after")
    def _acts(self) -> Refresh:
        if self.policy != "rotating" and self.model_fields_set - {"policy"}:
            raise ValueError("policy: rotating beside refresh_fraction and max_age, which no other policy reads")
        return self


class Mixture(Parameters):
    """How the rows of a mixture are drawn, whichever mixer sets the shares."""

    unit: Literal["rows", "tokens"] = Field(
        "rows", description="what proportions are shares of; tokens: by the mean length of a domain's rows"
    )
    draws: Literal["greedy", "random"] | None = Field(
        None,
        description="greedy: within a few rows of the shares; random: independent draws; default: the mixer's",
    )
    exhausted: Literal["cycle", "renormalise", "stop"] = Field(
        "cycle",
        description="a domain that has been passed through: begin anew in another order; give its share to the others; "
        "end the run",
    )
    passes: float | None = Field(
        None, gt=0, description="passes over a domain, at most; cycle: none; otherwise 1 by default"
    )

    @model_validator(mode="after")
    def _acts(self) -> Mixture:
        if self.exhausted == "cycle" and self.passes is not None:
            raise ValueError("exhausted: renormalise or stop beside passes; cycle has no limit")
        return self


class WeighterChoice(Parameters):
    """A weighter beside a mixer: the factors of both are multiplied."""

    name: str = Field(description="a registered weighter, or module:Class")


class DataflexKeys(Parameters):
    """The `dataflex:` mapping. The parameters of the component, `params`, are checked by its own model."""

    store: str | None = Field(
        None,
        min_length=1,
        description="root of the stores, a path or an fsspec URL; default: DATAFLEX_HOME, else dataflex/ under Hugging "
        "Face's assets cache if that is configured, else the user's cache folder",
    )
    on_missing: Literal["compute", "error"] = Field(
        "compute", description="features that no store has: compute them, or refuse and name the fields that differ"
    )
    refresh: Refresh = Field(Refresh(), description="what is computed anew at an update")
    mixture: Mixture = Field(Mixture(), description="dynamic_mix: how rows are drawn")
    weighter: WeighterChoice | None = Field(
        None, description="dynamic_mix: a weighter beside the mixer, {name, params}; warmup_step holds for both"
    )
    keep_warmup: bool = Field(
        True,
        description="train keeps the state at the end of a warm-up, its optimizer too, beside the features, for the "
        "runs that begin alike; featurize always does",
    )
    warmup_split: Literal["any", "exact"] = Field(
        "any",
        description="kept states that a run takes: of any division of the global batch over processes, devices and "
        "accumulation, which moves the masks of dropout and the last bits; or of its own alone",
    )
    checkpoint_on_signal: bool = Field(
        True,
        description="train writes a checkpoint at the end of the step in which SIGTERM or SIGUSR1 stops it, so that no "
        "step is done twice; false: it stops there without one",
    )
    features: tuple[FeatureSpec, ...] = Field(
        (), description="features that featurize computes beside the method's own"
    )
    plugins: tuple[str, ...] = Field(
        (), description="modules, or paths of .py files, always imported; what they register wins over what is built in"
    )
    storage: Literal["float32", "float16", "int8", "int4", "int1"] = Field(
        "float16",
        description="type that stored vectors are rounded to; float16 halves float32 at an error of 0.05 %; int8, int4 "
        "and int1 (signs) take less and lose more",
    )
    token_budget: int = Field(
        8192, ge=1, description="tokens per feature batch, padding included; lower it if memory runs out"
    )
    fragment_rows: int = Field(
        2048,
        ge=1,
        description="rows per commit, at most: what a crash can cost each process; a dataset has 128 commits at least, "
        "of no fewer than 64 rows",
    )
    leases: bool = Field(
        True,
        description="launches that share a store tell each other which rows they are at; false: two may compute the "
        "same, of which the first is kept",
    )
    exclude_targets: bool = Field(
        False, description="leave training rows out that are identical to a row of a target set, as the model is fed it"
    )
    target_rows: int | None = Field(
        None, ge=1, description="rows of each target set that methods are shown, drawn once; default: all"
    )
    target_seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of that draw, apart from the training's seed")
    test_dataset: tuple[str, ...] = Field(
        (),
        description="registered datasets on which the model is measured when the training is over: loss per token; no "
        "row of them may stand in the training set or a target set",
    )
    test_reward: RewardSpec | None = Field(
        None, description="what the likeliest response to each prompt of them is worth as well, {type: exact_match}"
    )
    test_reward_dataset: tuple[str, ...] = Field(
        (), description="those of test_dataset whose prompts are responded to, for test_reward; default: all"
    )
    test_tokens: int = Field(512, ge=1, description="tokens of such a response, at most")
    keep_texts: int = Field(
        500,
        ge=0,
        description="rows of each round, at most, whose text is kept beside it for `dataflex show` and `report`; 0: of "
        "none",
    )
    arms: dict[str, dict[str, Any]] = Field(
        {}, description="variants of this run for `dataflex compare`: name -> the (dotted) keys that differ"
    )
    nonfinite_limit: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of a dataset's distinct rows that may be NaN or infinite; more end it",
    )

    @field_validator("test_dataset", "test_reward_dataset", mode="before", json_schema_input_type=str | tuple[str, ...])
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Take names as LLaMA-Factory writes them, between commas, or as a list."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(","))
        return tuple(value) if isinstance(value, list) else value  # strictly, only JSON's own may become a tuple

    @property
    def test_responses(self) -> PolicyGradientSpec | None:
        """How responses to test prompts are written and judged, as a feature says it; None where none are."""
        if self.test_reward is None:
            return None
        return PolicyGradientSpec(
            reward=(self.test_reward,),
            max_new_tokens=self.test_tokens,
            on_policy="sampled",
            top_k=1,  # the likeliest token
            mc_samples=1,
            estimator="vanilla",
        )

    @property
    def responded_tests(self) -> tuple[str, ...]:
        """Names of the test sets whose prompts are responded to."""
        return () if self.test_reward is None else self.test_reward_dataset or self.test_dataset

    def must_write(self, schedule: Schedule, is_live: bool) -> bool:
        """Say whether the run is certain to compute something and write it into the stores.

        Args:
            schedule: of the run.
            is_live: whether its methods ask for features of the live model.
        """
        has_several_updates = schedule.update_step > 0 and (schedule.update_times != 1 or schedule.num_train_epochs > 1)
        is_refreshed = is_live and self.refresh.policy != "static" and has_several_updates
        return bool(self.test_dataset) or (self.on_missing == "compute" and is_refreshed)
