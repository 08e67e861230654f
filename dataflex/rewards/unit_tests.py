"""A reward for Python code that passes the tests in the reference."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import Field

from dataflex.components.params import Parameters
from dataflex.rewards import sandbox
from dataflex.rewards.base import Reward

log = logging.getLogger(__name__)

_REASONS = 5  # said of a batch of responses
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def code_of(response: str) -> str:
    """Return the first fenced block of a response, or the whole response."""
    found = _FENCED.search(response)
    return found.group(1) if found else response


class UnitTests(Reward):
    """1 where the reference, run with the names that the response's code defines, comes to its end; else 0.

    The reference is the test: code that raises where the response is wrong, such as `assert` statements, or functions
    and classes as pytest and unittest run them. It runs in a process of its own; the response's names stand for calls
    to another, and arguments and results are JSON-like literals (`dataflex.rewards.isolated`). None where the reference
    is no Python, tests nothing, gives what is no such literal, or uses several names and all are Python's own.
    """

    class Params(Parameters):
        """Parameters of `unit_tests`."""

        seconds: float = Field(3.0, gt=0, description="wall clock of one response, once the interpreters have started")
        memory_mb: int = Field(1024, ge=64, description="address space of each process, in MiB")
        include_prompt: bool = Field(False, description="the prompt is the beginning of the code, as in HumanEval")
        isolation: Literal["namespaces", "process"] = Field(
            "namespaces",
            description="namespaces: no network, no files but 64 MiB of its own (Linux); process: limits alone",
        )
        workers: int = Field(4, ge=1, description="responses run at a time")

    def __init__(self, params: Params):
        self.params = params
        if params.isolation == "namespaces":
            sandbox.namespaces()

    def score(self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """See `dataflex.rewards.base.Reward`."""
        p = self.params
        starts = prompts if p.include_prompt else [""] * len(prompts)
        codes = [f"{start}{code_of(response)}" for start, response in zip(starts, responses, strict=True)]

        def tried(code: str, tests: str) -> tuple[float | None, str]:
            return sandbox.trial(code, tests, p.seconds, p.memory_mb, p.isolation == "namespaces")

        # No more than there are cores: `seconds` is wall clock, of which trials would take each other's.
        with ThreadPoolExecutor(min(p.workers, os.cpu_count() or 1)) as pool:
            found = list(pool.map(tried, codes, references))
        for reason, count in Counter(reason for _, reason in found if reason).most_common(_REASONS):
            log.info("unit_tests: no reward for %d of %d responses: %s", count, len(found), reason)
        return [reward for reward, _ in found]

    def identity(self) -> dict[str, Any]:
        """See `dataflex.rewards.base.Reward`."""
        fields = {"seconds", "memory_mb", "include_prompt"}
        return {"type": "unit_tests", "version": 4, **self.params.model_dump(include=fields)}
