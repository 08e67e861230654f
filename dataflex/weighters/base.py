"""What a weighter is given and what it returns.

A weight is relative to the plain loss: equal weights of 1 give exactly that.

B examples of a micro-batch of one rank, up to T tokens each, hidden size H; M examples of a group, which is a
micro-batch of all ranks together, or all of an optimizer step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dataflex.features.need import Need
from dataflex.params import Parameters
from dataflex.rows import Rows

if TYPE_CHECKING:  # a run file is checked without torch
    from torch import Tensor


class WeighterParams(Parameters):
    """Parameters that every weighter has."""

    normalisation: Literal["micro_batch", "batch"] = Field(
        "micro_batch",
        description="examples that are weighed against each other: those of a micro-batch on all ranks; or of the "
        "whole optimizer step, which takes a forward pass more",
    )
    reduction: Literal["token", "example"] = Field(
        "token",
        description="token: weights multiply token losses, so equal ones give the plain loss; example: they multiply "
        "the examples' mean losses, whatever their lengths",
    )


@dataclass(frozen=True)
class Examples:
    """One micro-batch of this rank, as the training forward saw it; nothing here carries a gradient.

    Attributes:
        rows: (B,) int64, positions in the training set.
        losses: (B,) float64, sum of token losses in nats.
        tokens: (B,) int64, supervised tokens.
        states: (B, T, H), last hidden states, for a weighter that wants them.
        mask: (B, T) bool, real tokens; with `states`.
    """

    rows: Tensor
    losses: Tensor
    tokens: Tensor
    states: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Group:
    """Examples that are weighed against each other, of all ranks, in one order on all of them.

    Attributes:
        rows: (M,) int64, positions in the training set.
        losses: (M,) float64, mean loss per supervised token; NaN where there is no token, or the loss is not finite.
        signal: (M,) float64, what `NativeWeighter.signal` gave; NaN without one.
        step: optimizer steps done.
        since: optimizer steps done since the weighter began to act.
        total: optimizer steps of the run.
        parts: micro-batches of single ranks that the group is put together from.
    """

    rows: Tensor
    losses: Tensor
    signal: Tensor
    step: int
    since: int
    total: int
    parts: int = 1

    @property
    def usable(self) -> Tensor:
        """(M,) bool, examples that have a loss."""
        return self.losses.isfinite()


class NativeWeighter(ABC):
    """A weighter written for DataFlex: its parameters are a model beside it, called `Params`.

    Attributes:
        wants_states: whether `signal` reads the last hidden states.
        needs_targets: whether it holds examples against the target rows.
    """

    wants_states: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = False

    class Params(WeighterParams):
        """Parameters."""

    def __init__(self, params: Any):
        self.params = params

    @property
    def compares(self) -> bool:
        """Whether an example alone always has the weight 1, or 0."""
        return False

    def needs(self) -> Sequence[Need]:
        """Return the stored features of the training rows that `prepare` will be given."""
        return ()

    def prepare(self, values: Mapping[Need, Any], *, rows: Rows) -> None:  # noqa: B027 - most take none
        """Take the features that were declared. Called once, before the first step.

        Args:
            values: need -> `dataflex.features.need.View` of the training rows.
            rows: the training rows.

        Raises:
            DataflexError: the values are not what the weighter can use.
        """

    def signal(self, examples: Examples) -> Tensor | None:
        """Return one number per example of this rank, (B,) float64, that the group is weighed by, or None."""
        return None

    @abstractmethod
    def weights(self, group: Group) -> Tensor:
        """Return the weight of each example, (M,) float64: 0 where it is not usable; no host synchronisation."""

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from: plain data, floats exact."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the state of `state()` back."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, found {sorted(state)}")
