"""Representations that are compared with targets: gradients, policy gradients, embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

from dataflex.errors import ConfigError
from dataflex.features.spec import (
    BASE,
    MAX_COLUMNS,
    EmbeddingSpec,
    GeneratorSpec,
    GradientSpec,
    PolicyGradientSpec,
    Projection,
    ProjectionType,
    RewardSpec,
)
from dataflex.rewards import build_reward
from dataflex.selectors.parts.checkpoints import checkpoint_weights
from dataflex.selectors.parts.representation import Acts, Part, Term, Vectors


class GradientFields(Part):
    """Parameters of gradients that are compared: direction of the training side, and projection of both sides."""

    only: ClassVar[Acts] = {"adam_variant": ("gradient_type", ("adam",)), "sparsity": ("projection", ("sjlt",))}

    gradient_type: Literal["adam", "sgd"] = Field(
        "adam", description="training side: Adam's step, or the plain gradient"
    )
    adam_variant: Literal["pytorch", "less_reference", "precond_only"] = Field(
        "pytorch",
        description="pytorch: as torch.optim.AdamW; less_reference: epsilon inside the root, no bias correction; "
        "precond_only: without the momentum that all rows share",
    )
    proj_dim: int = Field(
        8192, ge=1, le=MAX_COLUMNS, description="numbers kept per gradient; cosine error is about 1/sqrt(proj_dim)"
    )
    seed: int = Field(0, ge=0, description="seed of the random projection")
    projection: ProjectionType = Field(
        "sjlt",
        description="random projection: sparse Johnson-Lindenstrauss, in linear time; dense; subsampled randomised "
        "Hadamard; or none, for tests",
    )
    sparsity: int = Field(1, ge=1, description="sjlt: non-zeros per coordinate")

    @model_validator(mode="after")
    def _sparsity_fits(self) -> GradientFields:
        if self.sparsity > self.proj_dim:
            raise ValueError(f"sparsity of at most proj_dim, {self.proj_dim}")
        return self

    @property
    def train_spec(self) -> GradientSpec:
        """The feature of the training rows: by default the step that the optimizer would take."""
        return GradientSpec(
            direction=self.gradient_type, adam_variant=self.adam_variant, projection=self.target_spec.projection
        )

    @property
    def target_spec(self) -> GradientSpec:
        """The feature of the target rows: the plain gradient, under the same projection."""
        projection = Projection(type=self.projection, dim=self.proj_dim, seed=self.seed, sparsity=self.sparsity)
        return GradientSpec(direction="sgd", projection=projection)


class CheckpointFields(GradientFields):
    """Gradients of the live model, or a sum over given checkpoints."""

    checkpoints: tuple[str, ...] = Field(
        (), description="offline: LLaMA-Factory checkpoint folders; empty: the live model"
    )
    weights: tuple[float, ...] | None = Field(
        None, description="offline: weight of each checkpoint; default: mean learning rate of its span"
    )

    @model_validator(mode="after")
    def _weights_fit(self) -> CheckpointFields:
        given = self.weights
        if given is not None and (len(given) != len(self.checkpoints) or min(given, default=0) < 0 or sum(given) <= 0):
            raise ValueError("as many weights as checkpoints, each 0 or more, not all 0")
        return self

    def term_weights(self) -> np.ndarray:
        """Return the learning-rate weight of each checkpoint."""
        return checkpoint_weights(self.checkpoints, self.weights) if self.checkpoints else np.ones(1)


class TargetFields(CheckpointFields):
    """Parameters of gradients of the targets' loss."""

    added: ClassVar[Mapping[str, Any]] = {"target_direction": "sgd"}

    target_direction: Literal["sgd", "precond_only"] = Field(
        "sgd",
        description="targets' side: the plain gradient; or divided by the root of Adam's second moment, without "
        "momentum: the step that the target itself would make",
    )

    @property
    def target_spec(self) -> GradientSpec:
        """The feature of the target rows, under the projection of the training rows."""
        plain = super().target_spec
        if self.target_direction == "sgd":
            return plain
        return GradientSpec(direction="adam", adam_variant=self.target_direction, projection=plain.projection)


class GradientVectors(TargetFields, Vectors):
    """Projected gradients: of the training rows as the optimizer would step, of the targets plain by default."""

    kind: Literal["gradient"] = "gradient"

    def terms(self) -> list[Term]:
        """Return one term per checkpoint, or one of the live model."""
        return [Term(self.train_spec, self.target_spec, state) for state in self.checkpoints or (None,)]


class PolicyFields(CheckpointFields):
    """Parameters of the gradient of the targets' expected reward."""

    only: ClassVar[Acts] = {**CheckpointFields.only, "k": ("estimator", ("topk",))}

    reward: tuple[RewardSpec, ...] = Field(
        (), description="{type: name, ...}, or a list that is added; docs/rewards.md"
    )
    estimator: Literal["vanilla", "loo_baseline", "rejection", "hard_rejection", "topk"] = Field(
        "loo_baseline", description="weights of the responses; loo_baseline: reward less the mean of the others"
    )
    mc_samples: int = Field(4, ge=1, description="responses to each target; the published commands use 20 to 500")
    max_new_tokens: int = Field(512, ge=1, description="tokens of a response, at most")
    on_policy: Literal["exact", "sampled"] = Field(
        "exact", description="exact: drawn from the model; sampled: by temperature, top_p, top_k, or by a server"
    )
    generation_temperature: float = Field(1.0, gt=0, description="sampled: divides the logits")
    top_p: float = Field(1.0, gt=0, le=1, description="sampled: smallest set of tokens with this probability")
    top_k: int = Field(0, ge=0, description="sampled: likeliest tokens, 0 for all")
    generation_seed: int = Field(0, ge=0, description="seed of the responses")
    normalisation: Literal["sum", "mean"] = Field("sum", description="over a response's tokens")
    k: int = Field(10, ge=1, description="topk: best responses looked at")
    generator: GeneratorSpec = Field(GeneratorSpec(), description="the model, or {type: openai, base_url, model}")

    @field_validator("reward", mode="before", json_schema_input_type=RewardSpec | tuple[RewardSpec, ...])
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        if isinstance(value, list):  # strictly, only JSON's own may become a tuple
            return tuple(value)
        return (value,) if isinstance(value, Mapping | RewardSpec) else value

    @model_validator(mode="after")
    def _rewards_are_right(self) -> PolicyFields:
        if not self.reward:
            raise ValueError("a reward, such as {type: exact_match}; docs/rewards.md lists them")
        try:
            for spec in self.reward:
                build_reward(spec.type, spec.params())
            self.policy_spec  # noqa: B018  (checks what does not fit each other)
        except ConfigError as error:
            raise ValueError(f"rewards that can be built: {error}") from error
        except ValidationError as error:  # said as if it were of these parameters, which it is
            raise ValueError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error
        return self

    @property
    def policy_spec(self) -> PolicyGradientSpec:
        """The feature of the target rows, under the projection of the training rows."""
        shared = PolicyGradientSpec.model_fields.keys() & type(self).model_fields.keys() - {"projection", "seed"}
        return PolicyGradientSpec(
            projection=self.target_spec.projection,
            temperature=self.generation_temperature,
            seed=self.generation_seed,
            **{name: getattr(self, name) for name in shared},
        )


class PolicyVectors(PolicyFields, Vectors):
    """Gradients of the training rows, compared with those of the targets' expected reward."""

    kind: Literal["policy_gradient"] = "policy_gradient"

    def terms(self) -> list[Term]:
        """Return one term per checkpoint, or one of the live model."""
        return [Term(self.train_spec, self.policy_spec, state) for state in self.checkpoints or (None,)]


class EmbeddingFields(Part):
    """Parameters of embeddings."""

    pooling: Literal["mean", "last", "position_weighted"] = Field(
        "mean", description="over a row's tokens; position_weighted as in RDS+"
    )
    layer: int = Field(-1, description="hidden state that is pooled")
    embedding_model_name_or_path: str | None = Field(
        None, description="another encoder (sentence-transformers or causal LM); default: the run's model"
    )
    model: Literal["base", "live"] = Field("base", description="base: before any training; live: at the update")


class EmbeddingVectors(EmbeddingFields, Vectors):
    """Pooled hidden states of the base model, which never grow old, of the live one, or of another encoder."""

    kind: Literal["embedding"] = "embedding"

    def terms(self) -> list[Term]:
        """Return the single term."""
        name = self.embedding_model_name_or_path
        spec = EmbeddingSpec(pooling=self.pooling, layer=self.layer, embedding_model_name_or_path=name)
        is_frozen = self.model == "base" or name is not None  # another encoder is not what is trained
        return [Term(spec, spec, BASE if is_frozen else None)]
