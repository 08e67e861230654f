"""A language model on an OpenAI-compatible server as the judge of a response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator

from dataflex.chat import ChatServer
from dataflex.components.params import Parameters
from dataflex.rewards.base import Reward

_TEMPLATE = """Judge how well the response answers the request.

Request:
{prompt}

Reference answer:
{reference}

Response:
{response}

Reply with one line, "Score: " and a number from 0 (useless) to 10 (perfect)."""


class Judge(Reward):
    """The number that the judge's reply gives; a reply without one cannot be scored.

    A server's replies may change from day to day, so the reply to a text is kept and never asked for again.
    """

    class Params(Parameters):
        """Parameters of `judge`."""

        base_url: str = Field(description="address of the server, as http://localhost:8000/v1")
        model: str = Field(description="the server's name of its model")
        api_key_env: str | None = Field(None, description="environment variable that holds the key; none is sent")
        template: str = Field(_TEMPLATE, description="what the judge is asked, with {prompt}, {response}, {reference}")
        pattern: str = Field(
            r"(?i)score[\s:=*]*(-?\d+(?:\.\d+)?)",
            description="regular expression whose group is the score; the last counts",
        )
        temperature: float = Field(0.0, ge=0, description="of the judge")
        max_tokens: int = Field(512, ge=1, description="tokens of a reply, at most")
        timeout: float = Field(120.0, gt=0, description="seconds for one request")
        retries: int = Field(5, ge=0, description="further attempts, after 1, 2, 4, ... seconds")
        workers: int = Field(8, ge=1, description="requests at a time")

        @field_validator("template")
        @classmethod
        def _shows_the_response(cls, template: str) -> str:
            if "{response}" not in template:
                raise ValueError("found no {response} in it; expected it where the judge must see the response")
            return template

        @field_validator("pattern")
        @classmethod
        def _has_a_group(cls, pattern: str) -> str:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"found no regular expression ({error}); expected one") from error
            if groups != 1:
                raise ValueError(f"found {groups} groups; expected one, around the number")
            return pattern

    def __init__(self, params: Params):
        self.params = params
        self._server = ChatServer(params.base_url, params.api_key_env, params.timeout, params.retries, params.workers)

    def score(self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """See `dataflex.rewards.base.Reward`."""
        p = self.params
        payloads = [
            {
                "model": p.model,
                "messages": [{"role": "user", "content": self._asked(prompt, response, reference)}],
                "temperature": p.temperature,
                "max_tokens": p.max_tokens,
            }
            for prompt, response, reference in zip(prompts, responses, references, strict=True)
        ]
        return [self._parsed(text) for text, _ in self._server.complete(payloads)]

    def identity(self) -> dict[str, Any]:
        """See `dataflex.rewards.base.Reward`."""
        fields = {"base_url", "model", "template", "pattern", "temperature", "max_tokens"}
        return {"type": "judge", "version": 1, **self.params.model_dump(include=fields)}

    def _asked(self, prompt: str, response: str, reference: str) -> str:
        """Fill the template in one go, so that a placeholder inside a text stays what it is."""
        texts = {"{prompt}": prompt, "{response}": response, "{reference}": reference}
        return re.sub(r"\{(?:prompt|response|reference)\}", lambda m: texts[m.group()], self.params.template)

    def _parsed(self, reply: str) -> float | None:
        found = re.findall(self.params.pattern, reply)  # the last: a judge may reason about scores before it gives one
        try:
            return float(found[-1]) if found else None
        except ValueError:
            return None
