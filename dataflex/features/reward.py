"""Which reward responses are judged by, as a run file names it."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from dataflex.components.params import Parameters


class RewardSpec(Parameters):
    """A reward by name, as `dataflex.rewards` knows it; its own parameters stand beside `type`."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="name of a reward, or module:Class")
    weight: float = Field(1.0, description="factor, where the sum of several rewards is taken")

    def params(self) -> dict[str, Any]:
        """Return the reward's own parameters."""
        return self.model_dump(exclude={"type", "weight"})
