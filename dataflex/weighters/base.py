"""What a weighter is given and what it returns.

A weight is relative to the plain loss: equal weights of 1 give exactly that.

B examples of a micro-batch of one rank, up to T tokens each, hidden size H; M examples of a group, which is a
micro-batch of all ranks together, or all of an optimizer step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from dataflex.components.params import Parameters
from dataflex.errors import DataflexError
from dataflex.features.need import Need
from dataflex.method import Method, default
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


class NativeWeighter(Method):
    """Base of weighters: override `weights`, and of the rest what differs. See also `dataflex.method.Method`.

    Attributes:
        wants_states: whether `signal` reads the last hidden states.
        acts_alone: whether it trains by `own_step` in place of the trainer's, so that it cannot stand beside a mixer.
    """

    Params: ClassVar[type[BaseModel]] = WeighterParams
    wants_states: ClassVar[bool] = False
    acts_alone: ClassVar[bool] = False

    @default
    def anchor_batch_size(self) -> int:
        """Target rows embedded at a time, if the weighter needs targets."""
        return 8

    @default
    def compares(self) -> bool:
        """Whether weights depend on the other examples, so that a group of one is pointless."""
        return False

    def due(self, step: int) -> bool:
        """Say whether the target rows have to be embedded anew, after `step` optimizer steps and before the next one.

        Asked of weighters with `needs_targets`; one that returns True overrides `set_anchors` too.
        """
        return False

    def set_anchors(self, mean: Tensor, step: int) -> None:
        """Take the mean of the target rows' unit vectors, (H,), embedded after `step` steps.

        Raises:
            DataflexError: the weighter asks for them by `due`, and has no such method of its own.
        """
        raise DataflexError(f"{type(self).__name__}: found no set_anchors; expected one, as due asks for anchors")

    def prepare(self, values: Mapping[Need, Any], *, rows: Rows) -> None:
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

    def own_step(self, ctx: Any, model: Any, inputs: Any, num_items_in_batch: Any, use_weighter: bool) -> Tensor:
        """Train on a micro-batch; return its part of the step's loss, without gradient. For one that `acts_alone`.

        Args:
            ctx: the trainer.
            model: as the trainer wraps it.
            inputs: the micro-batch.
            num_items_in_batch: the step's supervised tokens over the accumulation steps; None where they do not count.
            use_weighter: False in the warm-up.

        Raises:
            DataflexError: the weighter says that it acts alone, and has no step.
        """
        raise DataflexError(f"{type(self).__name__}: found no own_step; expected it beside acts_alone")

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs to go on the same: plain data, floats exact."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state()` returned."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, found {sorted(state)}")
