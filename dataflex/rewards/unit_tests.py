"""Python code passes tests."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import Field

from dataflex.rewards import sandbox
from dataflex.rewards.base import RewardParams

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def code_of(response: str) -> str:
    """Return the first fenced block of a response, or the whole response."""
    found = _FENCED.search(response)
    return found.group(1) if found else response


class UnitTests:
    """1 where the response's code followed by the reference runs to its end, else 0.

    The reference is the test: code that raises where the response is wrong, such as `assert` statements. See
    `dataflex.rewards.sandbox` for what the code is kept from, and what not.
    """

    class Params(RewardParams):
        """Parameters of `unit_tests`."""

        seconds: float = Field(3.0, gt=0, description="wall clock of one response, start of the interpreter included")
        memory_mb: int = Field(1024, ge=64, description="address space of each process, in MiB")
        include_prompt: bool = Field(False, description="the prompt is the beginning of the code, as in HumanEval")
        isolation: Literal["namespaces", "process"] = Field(
            "namespaces",
            description="namespaces: no network, nothing survives (Linux); process: limits and a process group alone",
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
        programs = [
            f"{start}{code_of(response)}\n\n{tests}"
            for start, response, tests in zip(starts, responses, references, strict=True)
        ]

        def passes(program: str) -> float:
            return float(sandbox.run(program, p.seconds, p.memory_mb, p.isolation == "namespaces"))

        with ThreadPoolExecutor(min(p.workers, os.cpu_count() or 1)) as pool:
            return list(pool.map(passes, programs))

    def identity(self) -> dict[str, Any]:
        """See `dataflex.rewards.base.Reward`."""
        fields = {"seconds", "memory_mb", "include_prompt"}
        return {"type": "unit_tests", "version": 1, **self.params.model_dump(include=fields)}
