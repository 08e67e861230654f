"""A reward for responses whose last number equals the last number of the reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from pydantic import Field

from dataflex.components.params import Parameters
from dataflex.rewards.base import Reward

_NUMBER = re.compile(
    r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\d))?|(?<![\w.])-?\.\d+"
)


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, with thousands separated by commas or not, or None."""
    found = _NUMBER.findall(text.replace("−", "-"))  # the minus of typeset text, U+2212
    return Decimal(found[-1].replace(",", "")) if found else None


class Number(Reward):
    """1 where the last numbers of response and reference are equal up to a tolerance, else 0.

    A response without a number gets 0; with a reference without one, nothing can be scored.
    """

    class Params(Parameters):
        """Parameters of `number`."""

        tolerance: float = Field(1e-6, ge=0, description="largest difference, relative to the reference or to 1")

    def __init__(self, params: Params):
        self.params = params

    def score(self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """See `dataflex.rewards.base.Reward`."""
        return [self._one(last_number(a), last_number(b)) for a, b in zip(responses, references, strict=True)]

    def identity(self) -> dict[str, Any]:
        """See `dataflex.rewards.base.Reward`."""
        return {"type": "number", "version": 1, **self.params.model_dump()}

    def _one(self, found: Decimal | None, expected: Decimal | None) -> float | None:
        if expected is None:
            return None
        if found is None:
            return 0.0
        return float(abs(found - expected) <= Decimal(self.params.tolerance) * max(Decimal(1), abs(expected)))
