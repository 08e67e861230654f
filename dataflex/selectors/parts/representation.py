"""What training rows are judged by: vectors that are compared with the targets', or one number per row.

N training rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
from pydantic import BaseModel, model_validator

from dataflex.components.params import Parameters
from dataflex.features.need import StateName
from dataflex.features.spec import FeatureSpec
from dataflex.selectors.base import Context, Need

Acts = Mapping[str, tuple[str, tuple[str, ...]]]
"""Field -> (another field, the values of the other under which the first one has an effect)."""


class Part(Parameters):
    """Base of the parts that a method is put together from."""

    only: ClassVar[Acts] = {}

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> Part:
        for name, (other, values) in self.only.items():
            # By value, not by whether it was written: a method hands its parameters on, defaults among them.
            is_given = getattr(self, name) != type(self).model_fields[name].default
            if is_given and getattr(self, other) not in values:
                raise ValueError(f"no {name}: it acts with {other}: {' or '.join(values)} alone")
        return self


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
    state: StateName


class Vectors(Part):
    """Base of the representations that are compared with targets."""

    @abstractmethod
    def terms(self) -> list[Term]:
        """Return the vectors compared, one term per model state."""

    def term_weights(self) -> np.ndarray:
        """Return the weight of each term."""
        return np.ones(len(self.terms()))

    def needs(self) -> list[Need]:
        """Return the features of both sides."""
        return [n for t in self.terms() for n in (Need(t.train, "train", t.state), Need(t.target, "targets", t.state))]


class Numbers(Part):
    """Base of the representations that are one number per row and look at no target."""

    @abstractmethod
    def needs(self) -> list[Need]:
        """Return the features of the training rows."""

    @abstractmethod
    def values(self, context: Context) -> tuple[np.ndarray, np.ndarray]:
        """Return (N,) float64, NaN where a row cannot be judged, and ages (N,) int32."""
