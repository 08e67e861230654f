"""What is to be known of any feature without computing it. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from dataflex.components.params import Parameters
from dataflex.features.reward import RewardSpec


class Sizes(Protocol):
    """What the width of a vector may follow from; each is looked for when it is asked for."""

    @property
    def hidden(self) -> int:
        """Numbers of a hidden state."""
        ...

    @property
    def trainable(self) -> int:
        """Numbers of all trainable parameters."""
        ...

    @property
    def cutoff_len(self) -> int:
        """Tokens of a row, at most."""
        ...


class Feature(Parameters):
    """Base of specifications: a kind of feature says here all that others ask, and only engines ask which it is.

    Attributes:
        kind: its name, also in the names of stores.
        is_indexed: whether a FAISS index is built of its vectors ahead.
        has_direction: whether the direction of its vectors says something, so that rows can be compared by it.
        is_by_token: whether the vector has a number for each token, in the width of `cutoff_len`.
    """

    kind: Any
    is_indexed: ClassVar[bool] = False
    has_direction: ClassVar[bool] = False
    is_by_token: ClassVar[bool] = False

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """Return what determines the values, plain data; fields that do not act are left out."""

    def describe(self) -> str:
        """Return what it is, for people."""
        return str(self.kind)

    @property
    def scalars(self) -> Mapping[str, str]:
        """Scalar columns, each with its NumPy type."""
        return {"norm": "float32"}

    def width(self, sizes: Sizes) -> int:
        """Return the numbers of a vector, 0 for a feature without one."""
        return 0

    @property
    def known_width(self) -> int | None:
        """The numbers of a vector as far as the specification says; None: the model does."""
        return None

    @property
    def has_vectors(self) -> bool:
        """Whether there are vectors, which move with the model."""
        return True

    @property
    def gradient(self) -> Feature | None:
        """The gradient whose rules and projection it is computed by; None: it needs no backward pass."""
        return None

    @property
    def needs_moments(self) -> bool:
        """Whether it depends on Adam's moments."""
        return False

    @property
    def is_of_excerpt(self) -> bool:
        """Whether it is taken of a part of the example, so that the example is run for it alone."""
        return False

    @property
    def encoder(self) -> str | None:
        """Folder or name of the model that it is computed by; None: the run's own."""
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
        """Return the type that vectors are kept in, where the run file asks for `storage`."""
        return storage
