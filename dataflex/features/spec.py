"""What can be asked of an example: features and their parameters. Imports no torch.

P elements of all trainable parameters, K numbers kept of a gradient, C responses to a prompt, R rows, D stored width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field, field_validator, model_validator

from dataflex.components.params import Parameters
from dataflex.features.facts import Feature, Sizes
from dataflex.features.reward import RewardSpec as RewardSpec

ENGINE_VERSION = 3
"""Version of our own numerics; part of every recipe. Raise it when values change."""

MAX_COLUMNS = 1 << 21
"""Most numbers kept per gradient. A dense entry's counter is element x 2^21 + column: 2^42 elements fit into int64."""

BASE = "base"
"""The state of a model before any training: the adapter that is trained is left out."""

_LOSS_SCALARS = {"loss_sum": "float64", "tokens": "int32"}


def _refuse_former(value: Any) -> Any:
    """Refuse projections that DataFlex once had, and say what to take instead."""
    if value in ("normal", "factorized"):
        raise ValueError("sjlt or rademacher: normal and factorized were taken out, as slower or noisier than these")
    return value


ProjectionType = Annotated[Literal["sjlt", "rademacher", "srht", "identity"], BeforeValidator(_refuse_former)]


class Projection(Parameters):
    """How P numbers become K: y = R g with E[R^T R] = I, entries a pure function of (seed, name, i, k)."""

    type: ProjectionType = Field(
        "sjlt",
        description="sjlt: sparse Johnson-Lindenstrauss (default, linear time); rademacher: dense; srht: subsampled "
        "randomised Hadamard; identity: the whole gradient, K = P, for tests",
    )
    dim: int = Field(8192, ge=1, description="K, numbers kept per gradient; cosine error is about 1/sqrt(K)")
    seed: int = Field(0, ge=0, description="seed of the random entries; features are comparable only under one seed")
    sparsity: int = Field(1, ge=1, description="sjlt: non-zeros per coordinate; 4 is safer for spiky gradients")


class LossSpec(Feature):
    """Sum of next-token cross-entropy (nats, float64) and number of supervised tokens."""

    kind: Literal["loss"] = "loss"
    given: Literal["prompt", "nothing"] = Field(
        "prompt", description="nothing: of the tokens from the first supervised one on, without what stands before it"
    )
    first_token: Literal["keep", "drop"] = Field(
        "keep", description="drop: the first supervised token is not counted, as under given: nothing, where it cannot"
    )

    def describe(self) -> str:
        """Return what it is, for people."""
        if self.given == "nothing":
            return "loss (given nothing)"
        return "loss (without the first token)" if self.first_token == "drop" else "loss"

    @property
    def number(self) -> str | None:
        """None: a loss is read per token, of both its columns."""
        return None

    @property
    def scalars(self) -> Mapping[str, str]:
        """The sum and its tokens."""
        return _LOSS_SCALARS

    @property
    def has_vectors(self) -> bool:
        """False: a loss is a number."""
        return False

    @property
    def is_of_excerpt(self) -> bool:
        """True for all but the plain loss."""
        return self != LossSpec()

    def recipe(self) -> dict[str, Any]:
        """Return what determines the values; fields that do not act are left out."""
        if self.given == "nothing":
            return {"kind": self.kind, "given": self.given}
        return {"kind": self.kind} | ({"first_token": self.first_token} if self.first_token == "drop" else {})


class TokenLossSpec(Feature):
    """Next-token cross-entropy of each token (nats), 0 where there is no label, as wide as the longest row may be."""

    kind: Literal["token_loss"] = "token_loss"
    is_by_token: ClassVar[bool] = True

    @property
    def number(self) -> str | None:
        """None: there are as many as tokens."""
        return None

    @property
    def scalars(self) -> Mapping[str, str]:
        """The sum and its tokens, as of a loss."""
        return _LOSS_SCALARS

    def width(self, sizes: Sizes) -> int:
        """Return the most tokens that a row may have."""
        return sizes.cutoff_len

    def stored_as(self, storage: str) -> str:
        """Return the type that vectors are kept in: losses do not fit into eight bits or fewer."""
        return storage if storage in ("float32", "float16") else "float16"

    def recipe(self) -> dict[str, Any]:
        """Return what determines the values."""
        return {"kind": self.kind}


class EmbeddingSpec(Feature):
    """A pooled hidden state."""

    kind: Literal["embedding"] = "embedding"
    is_indexed: ClassVar[bool] = True
    has_direction: ClassVar[bool] = True
    pooling: Literal["mean", "last", "position_weighted"] = Field(
        "mean", description="mean over tokens; last token; or weights t / sum(t), as RDS+ (arXiv 2503.01807)"
    )
    layer: int = Field(-1, description="hidden state to pool: 0 is the embedding layer, -1 the last (after its norm)")
    embedding_model_name_or_path: str | None = Field(
        None,
        description="another model, which reads the rows' whole text (system prompt, tools, prompt, response): "
        "sentence-transformers (its own pooling) or a causal LM; default: the run's model",
    )

    def describe(self) -> str:
        """Return what it is, for people."""
        return f"embedding ({self.pooling}, layer {self.layer})"

    def width(self, sizes: Sizes) -> int:
        """Return the width of a hidden state of the run's model."""
        return sizes.hidden

    @property
    def encoder(self) -> str | None:
        """The other model, if one is named."""
        return self.embedding_model_name_or_path

    def recipe(self) -> dict[str, Any]:
        """Return what determines the values; the other model enters by its content elsewhere, not by its name."""
        return self.model_dump(exclude={"embedding_model_name_or_path"})


class GradientSpec(Feature):
    """The projected gradient of one example's mean loss over the trainable parameters."""

    kind: Literal["gradient"] = "gradient"
    has_direction: ClassVar[bool] = True
    direction: Literal["sgd", "adam"] = Field(
        "sgd", description="sgd: the gradient; adam: the step Adam would take on it"
    )
    adam_variant: Literal["pytorch", "less_reference", "precond_only"] = Field(
        "pytorch",
        description="adam: as torch.optim.AdamW; as LESS's own code, with epsilon inside the root and no bias "
        "correction; or without the momentum",
    )
    projection: Projection = Field(Projection(), description="how the gradient becomes K numbers")

    def describe(self) -> str:
        """Return what it is, for people."""
        to = "whole" if self.known_width is None else f"{self.projection.type} to {self.projection.dim}"
        return f"gradient ({self.direction}, {to})"

    @property
    def scalars(self) -> Mapping[str, str]:
        """The vector's norm, and beside Adam's step that of the gradient itself."""
        return {"norm": "float32"} | ({"gradient_norm": "float32"} if self.needs_moments else {})

    def width(self, sizes: Sizes) -> int:
        """Return K, or P where nothing is projected."""
        return sizes.trainable if self.known_width is None else self.known_width

    @property
    def known_width(self) -> int | None:
        """K; P is not known here."""
        return None if self.projection.type == "identity" else self.projection.dim

    @property
    def gradient(self) -> GradientSpec:
        """The specification itself."""
        return self

    @property
    def needs_moments(self) -> bool:
        """True for Adam's step."""
        return self.direction == "adam"

    @property
    def norm_column(self) -> str:
        """For Adam's steps a column of its own, as their norm says little of the gradient's."""
        return "gradient_norm" if self.needs_moments else "norm"

    def recipe(self) -> dict[str, Any]:
        """Return what determines the values; fields that do not act are left out."""
        out = self.model_dump()
        if self.direction == "sgd":
            out.pop("adam_variant")
        used = {"sjlt": {"dim", "seed", "sparsity"}, "identity": set()}
        keep = {"type"} | used.get(self.projection.type, {"dim", "seed"})
        out["projection"] = {k: v for k, v in out["projection"].items() if k in keep}
        return out


class GeneratorSpec(Parameters):
    """Who writes the responses: the model that the gradient is of, or a server (off-policy)."""

    type: Literal["model", "openai"] = Field(
        "model", description="model: the one that the gradient is of; openai: an OpenAI-compatible server"
    )
    base_url: str | None = Field(None, description="openai: address of the server, as http://localhost:8000/v1")
    model: str | None = Field(None, description="openai: the server's name of its model")
    api_key_env: str | None = Field(None, description="openai: environment variable that holds the key; none is sent")
    timeout: float = Field(120.0, gt=0, description="openai: seconds for one request")
    retries: int = Field(5, ge=0, description="openai: further attempts, after 1, 2, 4, ... seconds")
    workers: int = Field(8, ge=1, description="openai: requests at a time")

    @model_validator(mode="after")
    def _server_is_named(self) -> GeneratorSpec:
        if (self.type == "openai") != (self.base_url is not None) or (self.type == "openai") != (
            self.model is not None
        ):
            raise ValueError("both base_url and model with type: openai, and neither with type: model")
        return self

    def recipe(self) -> dict[str, Any]:
        """Return what identifies the writer; timeouts, retries and workers change no response."""
        return self.model_dump(include={"type", "base_url", "model"}, exclude_none=True)


class PolicyGradientSpec(Feature):
    """The projected gradient of one prompt's expected reward over responses that the model writes itself.

    g = sum_c w_c grad(sum_t -log pi(y_ct)): like the gradient of a loss, it points where the reward falls.
    """

    kind: Literal["policy_gradient"] = "policy_gradient"
    reward: tuple[RewardSpec, ...] = Field(min_length=1, description="one reward, or several that are added")
    estimator: Literal["vanilla", "loo_baseline", "rejection", "hard_rejection", "topk"] = Field(
        "loo_baseline",
        description="weights of the responses: their rewards; those less the mean of the others'; the mean over those "
        "with a reward above 0; over those no worse than the reference; or over the k best of them",
    )
    mc_samples: int = Field(4, ge=1, description="C, responses for each prompt; the published commands use 20 to 500")
    max_new_tokens: int = Field(512, ge=1, description="tokens of a response, at most")
    on_policy: Literal["exact", "sampled"] = Field(
        "exact",
        description="exact: responses are drawn from the model itself; sampled: from its distribution changed by "
        "temperature, top_p and top_k, or from another model, which biases the gradient",
    )
    temperature: float = Field(1.0, gt=0, description="sampled: divides the logits")
    top_p: float = Field(1.0, gt=0, le=1, description="sampled: smallest set of tokens with this probability")
    top_k: int = Field(0, ge=0, description="sampled: likeliest tokens, 0 for all")
    seed: int = Field(0, ge=0, description="seed of the responses")
    normalisation: Literal["sum", "mean"] = Field(
        "sum", description="sum: over a response's tokens, the policy gradient; mean: short responses weigh more"
    )
    k: int = Field(10, ge=1, description="topk: best responses looked at")
    generator: GeneratorSpec = Field(GeneratorSpec(), description="who writes the responses")
    projection: Projection = Field(Projection(), description="how the gradient becomes K numbers")

    @field_validator("reward", mode="before", json_schema_input_type=RewardSpec | tuple[RewardSpec, ...])
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if isinstance(value, list):  # strictly, only JSON's own may become a tuple
            return tuple(value)
        return (value,) if isinstance(value, Mapping | RewardSpec) else value

    @model_validator(mode="after")
    def _fits(self) -> PolicyGradientSpec:
        if self.estimator == "loo_baseline" and self.mc_samples < 2:
            raise ValueError("mc_samples of 2 or more, as estimator loo_baseline compares responses with each other")
        if self.on_policy == "exact":
            if (self.temperature, self.top_p, self.top_k) != (1.0, 1.0, 0):
                raise ValueError("on_policy: sampled beside temperature, top_p or top_k, which change what is drawn")
            if self.generator.type != "model":
                raise ValueError("on_policy: sampled beside another model's responses, which are off-policy")
        return self

    @property
    def number(self) -> str | None:
        """The mean reward."""
        return "reward"

    @property
    def scalars(self) -> Mapping[str, str]:
        """The vector's norm, the mean reward, and the responses that have one."""
        return {"norm": "float32", "reward": "float64", "scored": "int32"}

    def width(self, sizes: Sizes) -> int:
        """Return K, or P where nothing is projected."""
        return self.gradient.width(sizes)

    @property
    def known_width(self) -> int | None:
        """K; P is not known here."""
        return self.gradient.known_width

    @property
    def gradient(self) -> GradientSpec:
        """The gradient of one response's loss, of which the policy gradient is a weighted sum."""
        return GradientSpec(projection=self.projection)

    @property
    def rewards(self) -> Sequence[RewardSpec]:
        """Its rewards."""
        return self.reward

    def sampling(self) -> dict[str, Any]:
        """Return what determines a response beside the prompt, its number and the model."""
        fields = {"max_new_tokens", "temperature", "top_p", "top_k", "seed"}
        return {"generator": self.generator.recipe(), **self.model_dump(include=fields)}

    def recipe(self) -> dict[str, Any]:
        """Return what determines the values, the rewards as they are written; fields that do not act are left out."""
        out = {
            "kind": self.kind,
            "reward": [spec.model_dump() for spec in self.reward],
            "sampling": self.sampling(),
            "mc_samples": self.mc_samples,
            "estimator": self.estimator,
            "normalisation": self.normalisation,
            "projection": self.gradient.recipe()["projection"],
        }
        return out | ({"k": self.k} if self.estimator == "topk" else {})


FeatureSpec = Annotated[
    LossSpec | TokenLossSpec | EmbeddingSpec | GradientSpec | PolicyGradientSpec, Field(discriminator="kind")
]


@dataclass(frozen=True)
class FeatureValues:
    """Values of one feature for R rows, in the order asked.

    Attributes:
        status: (R,) uint8 of `dataflex.rows.Status`; where it is not OK the values are zero.
        scalars: column name -> (R,) array. loss: `loss_sum` float64, `tokens` int32. embedding, gradient: `norm`
            float32, L2 norm of the vector; of `direction: adam` also `gradient_norm` float32, that of the gradient
            itself, neither stepped nor projected. token_loss: as loss; position t of the vector is the loss of the
            token after it, as the logits have it. policy_gradient: `norm`; `reward` float64, mean of the rewards;
            `scored` int32, responses that have one.
        vectors: (R, D) float32, or None for a feature without vectors.
    """

    status: np.ndarray
    scalars: dict[str, np.ndarray]
    vectors: np.ndarray | None
