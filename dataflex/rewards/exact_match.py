"""A reward for responses that equal the reference, up to case, space and punctuation."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from dataflex.components.params import Parameters
from dataflex.rewards.base import Reward


def normalised(text: str, case_sensitive: bool = False, punctuation: bool = True) -> str:
    """Return a text with Unicode compatibility forms, case, runs of space and, if asked, punctuation evened out."""
    text = unicodedata.normalize("NFKC", text)
    text = text if case_sensitive else text.casefold()
    if not punctuation:
        text = "".join(" " if unicodedata.category(c).startswith("P") else c for c in text)
    return " ".join(text.split())


class ExactMatch(Reward):
    """1 where the response equals the reference after normalisation, else 0."""

    class Params(Parameters):
        """Parameters of `exact_match`."""

        case_sensitive: bool = Field(False, description="whether case counts")
        punctuation: bool = Field(True, description="whether punctuation counts")

    def __init__(self, params: Params):
        self.params = params

    def score(self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """See `dataflex.rewards.base.Reward`."""
        options = self.params.case_sensitive, self.params.punctuation
        return [
            float(normalised(a, *options) == normalised(b, *options))
            for a, b in zip(responses, references, strict=True)
        ]

    def identity(self) -> dict[str, Any]:
        """See `dataflex.rewards.base.Reward`."""
        return {"type": "exact_match", "version": 1, **self.params.model_dump()}
