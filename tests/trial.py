"""A response that is tried in the sandbox."""

from __future__ import annotations

from dataflex.rewards import sandbox

TEST = "assert double(4) == 8\nassert double(-1) == -2"


def tried(code: str, tests: str = TEST, seconds: float = 20) -> tuple[float | None, str]:
    return sandbox.trial(code, tests, seconds, 1024, isolated=True)
