"""Dynamic mixing for mixtures of experts: domains that are routed unlike the others are drawn more often.

K domains, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dataflex.errors import ConfigError, DataflexError
from dataflex.mixers.base import MixContext, NativeMixer, RoutedRows, normalised


class DynamicMoe(NativeMixer):
    """Compares which experts the tokens of held-out rows of each domain are sent to.

    w <- (1 - c) * softmax(log w + eta * delta) + c / K, where delta_i is how far domain i's shares of the experts are
    from the other domains'. It begins with the initial proportions, and acts before the first step as well.

    Source: arXiv 2406.11256. `criterion: mean` counts a domain itself, at distance 0, as the authors' code does.
    Deviations: min and max are over the other domains, as the distance to itself would make min 0; a domain without any
    routed token has delta 0 and is left out of the others' distances.

    Attributes:
        signals: what it asks of `MixContext.ask`. expert_loads: (K, E) float64, tokens of each domain's evaluation rows
            without padding that each expert of the last routed layer was sent under the live model.
    """

    interval = 100

    @property
    def signals(self) -> tuple[str, ...]:
        """How many tokens of each domain's evaluation rows every expert gets."""
        return ("expert_loads",)

    class Params(RoutedRows):
        """Parameters of `dynamic_moe`."""

        eta: float = Field(10.0, gt=0, description="step size of log w, per unit of distance")
        c: float = Field(0.05, ge=0, lt=1, description="share of the uniform proportions: w >= c / K")
        criterion: Literal["mean", "min", "max"] = Field(
            "mean", description="distance to the domains on average, itself included; to the nearest or farthest other"
        )
        distance: Literal["l2", "cosine"] = Field(
            "l2", description="of the shares of the experts: Euclidean distance; 1 - cosine"
        )

    params: Params

    def __init__(self, params: Params):
        super().__init__(params)
        self._weights = np.zeros(0)
        self._delta = np.zeros(0)

    def mix(self, model: Any, step_id: int, *, context: MixContext, **kwargs: Any) -> np.ndarray:
        """Return the proportions, moved by the loads of the experts under the live model. Collective.

        Raises:
            ConfigError: the run has no expert loads to give.
            DataflexError: the loads are malformed, or fewer than two of several domains have any.
        """
        if "expert_loads" not in context.ask:
            raise ConfigError(
                "dynamic_moe: found no expert loads; expected a model that routes tokens to experts and tells its "
                "router logits; take such a model, or a mixer that looks at losses, such as odm"
            )
        loads = _checked(context.ask["expert_loads"](), context)
        if not len(self._weights):
            self._weights = normalised(context.initial)
        self._delta = deltas(loads, self.params.criterion, self.params.distance)
        with np.errstate(divide="ignore"):  # a proportion of 0 stays so if c is 0
            moved = np.log(self._weights) + self.params.eta * self._delta
        share = normalised(np.exp(moved - moved.max()))  # the largest is 1, so none overflows
        self._weights = normalised((1 - self.params.c) * share + self.params.c / len(share))
        return self._weights.copy()

    def record(self) -> dict[str, Any]:
        """Return how far each domain was from the others."""
        return {"delta": self._delta.tolist()} if len(self._delta) else {}

    def state(self) -> dict[str, Any]:
        """Return the proportions; nothing before the first update."""
        return {"weights": self._weights.tolist()} if len(self._weights) else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the state of `state()` back."""
        if state:
            self._weights = np.asarray(state["weights"], dtype=np.float64)


def deltas(loads: np.ndarray, criterion: str, distance: str) -> np.ndarray:
    """Return how far each domain's shares of E experts are from the others', (K,) float64; 0 for a domain without load.

    Args:
        loads: (K, E), tokens that each expert was sent.
        criterion: as `DynamicMoe.Params.criterion`.
        distance: as `DynamicMoe.Params.distance`.
    """
    found = np.zeros(len(loads))
    present = np.flatnonzero(loads.sum(axis=1) > 0)
    if len(present) < 2:
        return found
    shares = loads[present] / loads[present].sum(axis=1, keepdims=True)
    if distance == "l2":
        apart = np.linalg.norm(shares[:, None] - shares[None], axis=2)
    else:
        units = shares / np.linalg.norm(shares, axis=1, keepdims=True)
        apart = np.maximum(1 - units @ units.T, 0.0)
        np.fill_diagonal(apart, 0.0)
    if criterion == "mean":
        found[present] = apart.mean(axis=1)
    else:
        others = apart[~np.eye(len(present), dtype=bool)].reshape(len(present), -1)
        found[present] = others.min(axis=1) if criterion == "min" else others.max(axis=1)
    return found


def _checked(loads: Any, context: MixContext) -> np.ndarray:
    found, count = np.asarray(loads, dtype=np.float64), len(context.domains)
    if found.ndim != 2 or len(found) != count or not np.isfinite(found).all() or (found < 0).any():
        raise DataflexError(
            f"dynamic_moe: found expert loads of shape {found.shape}; expected ({count}, experts), finite, 0 or more"
        )
    loaded = found.sum(axis=1) > 0
    if count > 1 and loaded.sum() < 2:
        names = [name for name, has in zip(context.domains.names, loaded, strict=True) if not has]
        raise DataflexError(
            f"dynamic_moe: no token of {', '.join(names)} was routed to an expert, so no two domains can be compared; "
            "give these domains rows that can be evaluated"
        )
    return found
