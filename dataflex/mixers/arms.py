"""What a bandit has learned of its arms, the K domains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

_ARRAYS = ("estimates", "known", "warmup_loss", "warmup_weight")


@dataclass
class Arms:
    """State of a bandit; arrays are (K,) in domain order.

    Attributes:
        estimates: float64, running reward.
        known: bool, arms whose estimate has begun.
        warmup_loss: float64, sum of the losses of the warm-up, in nats.
        warmup_weight: float64, tokens or micro-batches that they are of.
        epsilon: exploration rate of the proportions in force.
        rewards: those last taken; None where an arm was not seen.
        begun: whether the warm-up is over.
        updates: how often rewards were taken.
    """

    estimates: np.ndarray
    known: np.ndarray
    warmup_loss: np.ndarray
    warmup_weight: np.ndarray
    epsilon: float
    rewards: list[float | None]
    begun: bool = False
    updates: int = 0

    @classmethod
    def new(cls, count: int) -> Arms:
        """Return arms of which nothing is known."""
        zeros = np.zeros(count)
        return cls(zeros, zeros > 0, zeros, zeros, 1 / count, [None] * count)

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Arms:
        """Return the arms that `plain` described.

        Raises:
            ValueError: the state is that of another mixer.
        """
        names = sorted(f.name for f in fields(cls))
        if sorted(state) != names:
            raise ValueError(f"found a state of {sorted(state)}; expected {names}")
        found: dict[str, Any] = {name: np.array(value) if name in _ARRAYS else value for name, value in state.items()}
        return cls(**found)

    def plain(self) -> dict[str, Any]:
        """Return all of it as plain data, floats exact."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.tolist() if name in _ARRAYS else value for name, value in found.items()}

    def warm_up(self, loss: np.ndarray, weight: np.ndarray) -> None:
        """Add mean losses (K,), NaN where not seen, to the warm-up; `weight` (K,) is how much they are means of."""
        weight = np.where(np.isnan(loss), 0.0, weight)
        self.warmup_loss = self.warmup_loss + np.nan_to_num(loss) * weight
        self.warmup_weight = self.warmup_weight + weight

    def warmup_mean(self, otherwise: np.ndarray) -> np.ndarray:
        """Return the mean loss over the warm-up, (K,) float64, where there is one, and else what is given."""
        return np.divide(self.warmup_loss, self.warmup_weight, out=otherwise.copy(), where=self.warmup_weight > 0)

    def take(self, rewards: np.ndarray, kept: float, weight: float) -> None:
        """Move estimates to `kept` times the old plus `weight` times rewards (K,).

        The first reward of an arm is taken whole; an arm that was not seen (NaN) keeps its estimate.
        """
        seen = np.isfinite(rewards)
        new = np.where(self.known, kept * self.estimates + weight * rewards, rewards)
        self.estimates = np.where(seen, new, self.estimates)
        self.known = self.known | seen
        self.updates += 1
        self.rewards = [float(r) if s else None for r, s in zip(rewards, seen, strict=True)]
