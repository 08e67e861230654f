"""A reward for responses in which a regular expression finds the same as in the reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from dataflex.components.params import Parameters
from dataflex.rewards.base import Reward
from dataflex.rewards.exact_match import normalised


class Regex(Reward):
    r"""1 where the answer extracted from the response equals the reference's, after normalisation, else 0.

    The answer is the first group, or the whole match where there is no group. A reference in which nothing is found is
    the answer itself; a response in which nothing is found gets 0. An expression can take exponential time, so write
    one without nested repetition.
    """

    class Params(Parameters):
        """Parameters of `regex`."""

        pattern: str = Field(description=r"regular expression of the answer, as \\boxed{(.*?)} or Answer: ([A-D])")
        which: Literal["first", "last"] = Field("last", description="match that counts")
        case_sensitive: bool = Field(False, description="whether case counts in the comparison")

        @field_validator("pattern")
        @classmethod
        def _compiles(cls, pattern: str) -> str:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"found no regular expression ({error}); expected one") from error
            return pattern

    def __init__(self, params: Params):
        self.params = params
        self._pattern = re.compile(params.pattern)

    def score(self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """See `dataflex.rewards.base.Reward`."""
        out: list[float | None] = []
        for response, reference in zip(responses, references, strict=True):
            expected, found = self._extract(reference), self._extract(response)
            expected = normalised(reference if expected is None else expected, self.params.case_sensitive)
            out.append(float(found is not None and normalised(found, self.params.case_sensitive) == expected))
        return out

    def identity(self) -> dict[str, Any]:
        """See `dataflex.rewards.base.Reward`."""
        return {"type": "regex", "version": 1, **self.params.model_dump()}

    def _extract(self, text: str) -> str | None:
        found = list(self._pattern.finditer(text))
        if not found:
            return None
        match = found[0 if self.params.which == "first" else -1]
        return (match.group(1) or "") if self._pattern.groups else match.group()
