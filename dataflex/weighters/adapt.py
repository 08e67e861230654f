"""Examples by how near they are to the target rows in the live model's last hidden states.

B examples of up to T tokens, hidden size H; M examples of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from dataflex.errors import DataflexError
from dataflex.weighters.base import Examples, Group, NativeWeighter, WeighterParams
from dataflex.weighters.relative import mean_one

if TYPE_CHECKING:  # a run file is checked without torch
    from torch import Tensor


class Adapt(NativeWeighter):
    """Weighs by sigmoid(s / tau), where s is the mean cosine of an example's pooled state with those of the anchors.

    Anchors are the target rows under the live model, embedded anew every so many steps. The mean of cosines is the
    product with the mean of the anchors' unit vectors, so that one vector is kept.

    Source: ADAPT, arXiv 2605.05227, in the form of the weighter `adapt` of DataFlex (arXiv 2603.26164). Deviations: the
    weights do not sum a batch's losses by default, so that the learning rate does not depend on the batch size; padding
    on the left does not count as tokens in the pooling.
    """

    wants_states = True
    needs_targets = True

    class Params(WeighterParams):
        """Parameters of `adapt`."""

        tau: float = Field(
            1.0, gt=0, description="temperature; cosines lie close together, so 1 gives near-equal weights"
        )
        refresh_interval: int = Field(50, ge=1, description="optimizer steps after which the anchors are embedded anew")
        anchor_batch_size: int = Field(8, ge=1, description="target rows embedded at a time")
        clip: float | None = Field(None, gt=0, lt=1, description="largest value of the sigmoid")
        form: Literal["absolute", "relative", "documented"] = Field(
            "absolute",
            description="absolute: the sigmoid, so the loss is below the plain one; relative: scaled to mean 1 over "
            "the group; documented: the mean losses of a process's micro-batch are summed, not averaged, so reduction "
            "is example",
        )

        @model_validator(mode="before")
        @classmethod
        def _documented(cls, values: Any) -> Any:
            if isinstance(values, dict) and values.get("form") == "documented":
                return {"reduction": "example"} | values
            return values

        @model_validator(mode="after")
        def _sums_means(self) -> Adapt.Params:
            if self.form == "documented" and self.reduction != "example":
                raise ValueError("reduction: example with form: documented, which sums the examples' mean losses")
            return self

    params: Params

    def __init__(self, params: Params):
        super().__init__(params)
        self._mean: Tensor | None = None
        self._refreshed = 0

    @property
    def compares(self) -> bool:
        """True for the relative form, whose weights have the mean 1 over the group."""
        return self.params.form == "relative"

    @property
    def anchor_batch_size(self) -> int:
        """Target rows embedded at a time."""
        return self.params.anchor_batch_size

    def due(self, step: int) -> bool:
        """Say whether the anchors have to be embedded anew, after `step` optimizer steps and before the next one.

        True until `set_anchors` is called, so that several micro-batches of a step embed them once.
        """
        return self._mean is None or step - self._refreshed >= self.params.refresh_interval

    def set_anchors(self, mean: Tensor, step: int) -> None:
        """Take the anchors, embedded after `step` steps: the mean of `unit(exact_pool(...))` over them, (H,).

        Raises:
            DataflexError: a number is not finite, as the mean of no anchors.
        """
        if not bool(mean.isfinite().all()):
            raise DataflexError(
                "adapt: the mean of the anchors is not finite; expected one target row or more with finite hidden "
                "states; look at eval_dataset, or at the model's numbers"
            )
        self._mean, self._refreshed = mean.detach().double(), step

    def signal(self, examples: Examples) -> Tensor:
        """Return the mean cosine with the anchors, (B,) float64: 0 of a zero vector, NaN of one with NaN.

        Raises:
            DataflexError: there are no anchors or no hidden states yet.
        """
        if self._mean is None or examples.states is None or examples.mask is None:
            missing = "anchors" if self._mean is None else "hidden states"
            raise DataflexError(f"adapt: found no {missing}; expected set_anchors and states before the first signal")
        self._mean = self._mean.to(examples.states.device)
        from dataflex.features.pooling import exact_pool

        # The mean is not made unit: so the product is the mean of cosines, not the cosine with the mean.
        return unit(exact_pool(examples.states, examples.mask)) @ self._mean

    def weights(self, group: Group) -> Tensor:
        """Return the weights, (M,) float64; 0 where there is no loss or no finite signal."""
        usable = group.usable
        found = (group.signal.double() / self.params.tau).sigmoid()
        if self.params.clip is not None:
            found = found.clamp(max=self.params.clip)
        found = found.where(usable & group.signal.isfinite(), 0.0)  # not the product: 0 x NaN would be NaN
        if self.params.form == "absolute":
            return found
        return mean_one(found, usable) if self.params.form == "relative" else found * usable.sum() / group.parts

    def state(self) -> dict[str, Any]:
        """Return the anchors' mean and the step that they were embedded at; nothing before the first."""
        return {} if self._mean is None else {"mean": self._mean.tolist(), "refreshed": self._refreshed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the state of `state()` back."""
        if state:
            import torch

            self._mean = torch.tensor(state["mean"], dtype=torch.float64)
            self._refreshed = int(state["refreshed"])


def unit(vectors: Tensor) -> Tensor:
    """Return vectors (B, H) divided by their norms; zeros stay zeros, NaN stays NaN."""
    norm = vectors.norm(dim=1, keepdim=True)
    return vectors / norm.where(norm != 0, 1.0)
