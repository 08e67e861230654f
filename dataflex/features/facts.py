"""What can be told of any feature without computing it: width, columns, what it needs. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from dataflex.components.params import Parameters
from dataflex.features.reward import RewardSpec


class Sizes(Protocol):
    """Sizes of the run that widths of vectors follow from; each is looked up only when it is asked for."""

    @property
    def hidden(self) -> int:
        """Width of the model's hidden states."""
        ...

    @property
    def trainable(self) -> int:
        """Elements of all trainable parameters together."""
        ...

    @property
    def cutoff_len(self) -> int:
        """Most tokens that a row may have."""
        ...


class Feature(Parameters):
    """Base of all specifications. The rest of the code asks it for facts; only engines ask which kind it is.

    Attributes:
        kind: name of the kind of feature, with which the names of its stores begin.
        is_indexed: whether featurize builds a FAISS index of a small store ahead of the run that searches it.
        has_direction: whether rows can be compared by the direction of their vectors.
        is_by_token: whether the vector has one number per token, padded to `cutoff_len`.
    """

    kind: Any
    is_indexed: ClassVar[bool] = False
    has_direction: ClassVar[bool] = False
    is_by_token: ClassVar[bool] = False

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """Return all that determines the values, as plain data.

        Fields that do not act are left out, or equal values would have two names and be computed twice.
        """

    def describe(self) -> str:
        """Name the feature for people."""
        return str(self.kind)

    @property
    def scalars(self) -> Mapping[str, str]:
        """Scalar columns, each with its NumPy type."""
        return {"norm": "float32"}

    @property
    def number(self) -> str | None:
        """The scalar column that stands for a row by default; None: none does alone."""
        return "norm"

    def width(self, sizes: Sizes) -> int:
        """Return the width of a vector, 0 for a feature without vectors."""
        return 0

    @property
    def known_width(self) -> int | None:
        """The width of a vector if the specification alone tells it; None if it depends on the model."""
        return None

    @property
    def has_vectors(self) -> bool:
        """Whether rows have vectors, which a rotating refresh can shift where it does not compute them anew."""
        return True

    @property
    def gradient(self) -> Feature | None:
        """The per-example gradient that it is made of; None if it needs no backward pass."""
        return None

    @property
    def needs_moments(self) -> bool:
        """Whether values depend on Adam's moments, so that a warm-up has to come first."""
        return False

    @property
    def is_of_excerpt(self) -> bool:
        """Whether it is of a part of the example, which then needs a forward pass of its own."""
        return False

    @property
    def encoder(self) -> str | None:
        """Folder or name of the other model that computes it; None for the run's own model."""
        return None

    @property
    def rewards(self) -> Sequence[RewardSpec]:
        """The rewards of responses that it depends on."""
        return ()

    @property
    def norm_column(self) -> str | None:
        """The scalar column with the norm of the example's gradient, if there is one."""
        return None

    def stored_as(self, storage: str) -> str:
        """Return the type that vectors are kept in if the run file asks for `storage`."""
        return storage
