"""What training rows are judged by: vectors that are compared with the targets', or one number per row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dataflex.features.spec import BASE, EmbeddingSpec, FeatureSpec, GradientSpec, LossSpec, Projection
from dataflex.rows import Status
from dataflex.selectors.base import Context, Need, View
from dataflex.selectors.checkpoints import checkpoint_weights


class Part(BaseModel):
    """Base of the parts that a method is put together from."""

    model_config = ConfigDict(frozen=True, extra="forbid")


P = TypeVar("P", bound=Part)


def part(cls: type[P], params: BaseModel, **given: Any) -> P:
    """Return a part whose fields are those of the same name among a method's parameters, or given."""
    shared = {name: getattr(params, name) for name in cls.model_fields if name in type(params).model_fields}
    return cls(**shared | given)


@dataclass(frozen=True)
class Term:
    """Vectors of one model state. A score is the sum over terms of weight times similarity.

    Attributes:
        train: feature of the training rows.
        target: feature of the targets, comparable with it.
        state: as `Need.state`.
    """

    train: FeatureSpec
    target: FeatureSpec
    state: str | None


class Vectors(Part):
    """Base of the representations that are compared with targets."""

    def terms(self) -> list[Term]:
        """Return the vectors compared, one term per model state."""
        raise NotImplementedError

    def term_weights(self) -> np.ndarray:
        """Return the weight of each term."""
        return np.ones(len(self.terms()))

    def needs(self) -> list[Need]:
        """Return the features of both sides."""
        return [n for t in self.terms() for n in (Need(t.train, "train", t.state), Need(t.target, "targets", t.state))]


class GradientFields(Part):
    """What determines gradients that are compared."""

    gradient_type: Literal["adam", "sgd"] = Field(
        "adam", description="training side: Adam's step, or the plain gradient"
    )
    adam_variant: Literal["pytorch", "less_reference", "precond_only"] = Field(
        "pytorch",
        description="pytorch: as torch.optim.AdamW; less_reference: epsilon inside the root, no bias correction; "
        "precond_only: without the momentum that all rows share",
    )
    proj_dim: int = Field(8192, ge=1, description="numbers kept per gradient; cosine error is about 1/sqrt(proj_dim)")
    seed: int = Field(0, ge=0, description="seed of the random projection")
    projection: Literal["sjlt", "rademacher", "normal", "srht", "factorized", "identity"] = Field(
        "sjlt", description="random projection; see dataflex.features.spec.Projection"
    )
    sparsity: int = Field(1, ge=1, description="sjlt: non-zeros per coordinate")
    checkpoints: tuple[str, ...] = Field(
        (), description="offline: LLaMA-Factory checkpoint folders; empty: the live model"
    )
    weights: tuple[float, ...] | None = Field(
        None, description="offline: weight of each checkpoint; default: mean learning rate of its span"
    )

    @model_validator(mode="after")
    def _weights_fit(self) -> GradientFields:
        given = self.weights
        if given is not None and (len(given) != len(self.checkpoints) or min(given) < 0 or sum(given) <= 0):
            raise ValueError("as many weights as checkpoints, each 0 or more, not all 0")
        return self

    @property
    def train_spec(self) -> GradientSpec:
        """The training side: as the optimizer would step."""
        return GradientSpec(
            direction=self.gradient_type, adam_variant=self.adam_variant, projection=self.target_spec.projection
        )

    @property
    def target_spec(self) -> GradientSpec:
        """The targets' side: the plain gradient, under the same projection."""
        projection = Projection(type=self.projection, dim=self.proj_dim, seed=self.seed, sparsity=self.sparsity)
        return GradientSpec(direction="sgd", projection=projection)


class GradientVectors(GradientFields, Vectors):
    """Projected gradients: of the training rows as the optimizer would step, of the targets plain."""

    kind: Literal["gradient"] = "gradient"

    def terms(self) -> list[Term]:
        """Return one term per checkpoint, or one of the live model."""
        return [Term(self.train_spec, self.target_spec, state) for state in self.checkpoints or (None,)]

    def term_weights(self) -> np.ndarray:
        """Return the learning-rate weight of each checkpoint."""
        return checkpoint_weights(self.checkpoints, self.weights) if self.checkpoints else np.ones(1)


class EmbeddingFields(Part):
    """What determines embeddings."""

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
        """Return the one term."""
        name = self.embedding_model_name_or_path
        spec = EmbeddingSpec(pooling=self.pooling, layer=self.layer, embedding_model_name_or_path=name)
        return [Term(spec, spec, BASE if self.model == "base" else None)]


class Numbers(Part):
    """Base of the representations that are one number per row and look at no target."""

    def needs(self) -> list[Need]:
        """Return the features of the training rows."""
        raise NotImplementedError

    def values(self, context: Context) -> tuple[np.ndarray, np.ndarray]:
        """Return (N,) float64, NaN where a row cannot be judged, and ages (N,) int32."""
        raise NotImplementedError


class Loss(Numbers):
    """The cross-entropy of a row's supervised tokens."""

    kind: Literal["loss"] = "loss"
    measure: Literal["mean", "sum", "perplexity"] = Field(
        "mean", description="nats per supervised token; nats per row; exp(mean)"
    )
    model: Literal["base", "live"] = Field("live", description="base: before any training; live: at the update")

    def needs(self) -> list[Need]:
        """Need the loss."""
        return [Need(LossSpec(), "train", BASE if self.model == "base" else None)]

    def values(self, context: Context) -> tuple[np.ndarray, np.ndarray]:
        """Return the measure; an infinite perplexity counts as not judged."""
        view = context.features(LossSpec(), state=self.needs()[0].state)
        total = losses(view, mean=self.measure != "sum")
        with np.errstate(over="ignore"):
            return (np.exp(total) if self.measure == "perplexity" else total), view.ages


class DeltaLoss(Numbers):
    """How much a row's mean loss has changed since a baseline; positive is learned."""

    kind: Literal["delta_loss"] = "delta_loss"
    baseline: str = Field(
        BASE, description="base: the model before any training; or a checkpoint folder, such as a reference model's"
    )
    score: Literal["delta", "relative_delta", "excess"] = Field(
        "delta",
        description="delta: l0 - l; relative_delta: (l0 - l) / l0; excess: l - l0, the reducible loss if the baseline "
        "was trained on clean data",
    )

    def needs(self) -> list[Need]:
        """Need the loss at the baseline and now."""
        return [Need(LossSpec(), "train", self.baseline), Need(LossSpec(), "train")]

    def values(self, context: Context) -> tuple[np.ndarray, np.ndarray]:
        """Return the score."""
        before, view = context.features(LossSpec(), state=self.baseline), context.features(LossSpec())
        first, now = losses(before), losses(view)
        formulas: dict[str, Callable[[], np.ndarray]] = {
            "delta": lambda: first - now,
            "relative_delta": lambda: np.divide(first - now, first, out=np.full_like(first, np.nan), where=first != 0),
            "excess": lambda: now - first,
        }
        return formulas[self.score](), view.ages


class InstructionDifficulty(Numbers):
    """IFD: perplexity of the response given the prompt, over its perplexity alone.

    Source: arXiv 2308.12032, 2402.00530 (a small model ranks as well). Deviation: nothing stands before the response
    alone, so its first token is not predicted there; both are means over the tokens that they predict.
    """

    kind: Literal["ifd"] = "ifd"
    model: Literal["base", "live"] = Field("base", description="base: before any training; live: at the update")
    most: float = Field(1.0, gt=0, description="rows at or above are left out: the prompt does not help them")

    def needs(self) -> list[Need]:
        """Need the loss with the prompt and without."""
        state = BASE if self.model == "base" else None
        return [Need(LossSpec(), "train", state), Need(LossSpec(given="nothing"), "train", state)]

    def values(self, context: Context) -> tuple[np.ndarray, np.ndarray]:
        """Return the ratio, NaN where the row is left out."""
        views = [context.features(need.spec, state=need.state) for need in self.needs()]
        with np.errstate(over="ignore"):
            ratio = np.exp(losses(views[0]) - losses(views[1]))
        return np.where(ratio < self.most, ratio, np.nan), views[0].ages


Representation = Annotated[
    GradientVectors | EmbeddingVectors | Loss | DeltaLoss | InstructionDifficulty, Field(discriminator="kind")
]


def losses(view: View, mean: bool = True) -> np.ndarray:
    """Return each row's loss in nats, per supervised token or summed, (N,) float64; NaN where there is none."""
    tokens, total = view.scalar("tokens"), view.scalar("loss_sum").astype(np.float64)
    usable = (view.status == Status.OK) & (tokens > 0) & np.isfinite(total)
    return np.divide(total, tokens if mean else 1, out=np.full(len(total), np.nan), where=usable)
