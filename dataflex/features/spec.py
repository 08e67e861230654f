"""What can be asked of an example: features and their parameters. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

ENGINE_VERSION = 1
"""Version of our own numerics; part of every recipe. Raise it when values change."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Projection(_Frozen):
    """How P numbers become K: y = R g with E[R^T R] = I, entries a pure function of (seed, name, i, k)."""

    type: Literal["sjlt", "rademacher", "normal", "srht", "factorized", "identity"] = Field(
        "sjlt",
        description="sjlt: sparse Johnson-Lindenstrauss (default, linear time); rademacher, normal: dense; srht: "
        "subsampled randomised Hadamard; factorized: both factors of a linear layer projected first (SGD only, 3 to "
        "4.5 times noisier); identity: the whole gradient, K = P, for tests",
    )
    dim: int = Field(8192, ge=1, description="K, numbers kept per gradient; cosine error is about 1/sqrt(K)")
    seed: int = Field(0, ge=0, description="seed of the random entries; features are comparable only under one seed")
    sparsity: int = Field(1, ge=1, description="sjlt: non-zeros per coordinate; 4 is safer for spiky gradients")
    side: int = Field(64, ge=1, description="factorized: numbers kept per side of a linear layer")


class LossSpec(_Frozen):
    """Sum of next-token cross-entropy (nats, float64) and number of supervised tokens."""

    kind: Literal["loss"] = "loss"


class EmbeddingSpec(_Frozen):
    """A pooled hidden state."""

    kind: Literal["embedding"] = "embedding"
    pooling: Literal["mean", "last", "position_weighted"] = Field(
        "mean", description="mean over tokens; last token; or weights t / sum(t), as RDS+ (arXiv 2503.01807)"
    )
    layer: int = Field(-1, description="hidden state to pool: 0 is the embedding layer, -1 the last (after its norm)")
    embedding_model_name_or_path: str | None = Field(
        None,
        description="another model that reads the rows' text: sentence-transformers (its own pooling) or a causal LM; "
        "default: the run's model",
    )


class GradientSpec(_Frozen):
    """The projected gradient of one example's mean loss over the trainable parameters."""

    kind: Literal["gradient"] = "gradient"
    direction: Literal["sgd", "adam"] = Field(
        "sgd", description="sgd: the gradient; adam: the step Adam would take on it"
    )
    adam_variant: Literal["pytorch", "less_reference", "precond_only"] = Field(
        "pytorch", description="see dataflex.features.adam"
    )
    projection: Projection = Projection()

    def recipe(self) -> dict[str, Any]:
        """Return what determines the values; fields that do not act are left out."""
        out = self.model_dump()
        if self.direction == "sgd":
            out.pop("adam_variant")
        used = {"sjlt": {"dim", "seed", "sparsity"}, "factorized": {"dim", "seed", "side"}, "identity": set()}
        keep = {"type"} | used.get(self.projection.type, {"dim", "seed"})
        out["projection"] = {k: v for k, v in out["projection"].items() if k in keep}
        return out


FeatureSpec = Annotated[LossSpec | EmbeddingSpec | GradientSpec, Field(discriminator="kind")]


@dataclass(frozen=True)
class FeatureValues:
    """Values of one feature for R rows, in the order asked.

    Attributes:
        status: (R,) uint8 of `dataflex.rows.Status`; where it is not OK the values are zero.
        scalars: column name -> (R,) array. loss: `loss_sum` float64, `tokens` int32. embedding, gradient: `norm`
            float32, L2 norm of the vector.
        vectors: (R, D) float32, or None for a feature without vectors.
    """

    status: np.ndarray
    scalars: dict[str, np.ndarray]
    vectors: np.ndarray | None
