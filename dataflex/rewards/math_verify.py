"""A reward for mathematical answers that the package math-verify finds equivalent to the reference."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from dataflex.components.params import Parameters
from dataflex.errors import ConfigError, DataflexError
from dataflex.rewards import sandbox
from dataflex.rewards.base import Reward

_START_SECONDS = 120.0  # importing sympy on a busy machine


class MathVerify(Reward):
    """1 where math-verify finds response and reference equivalent, else 0; None where the reference is no mathematics.

    Symbolic comparison can take forever or fill the memory, so it is done in a process that is killed then: such a
    response gets 0.
    """

    class Params(Parameters):
        """Parameters of `math_verify`."""

        seconds: float = Field(10.0, gt=0, description="time for one comparison")
        memory_mb: int = Field(2048, ge=256, description="memory of the process that compares, in MiB")

    def __init__(self, params: Params):
        self.params = params
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError("reward math_verify: needs a package that is not installed: pip install '.[rewards]'")

    def score(self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """See `dataflex.rewards.base.Reward`.

        Raises:
            DataflexError: the process that compares does not start.
        """
        pairs = list(zip(responses, references, strict=True))
        out: list[float | None] = []
        while len(out) < len(pairs):
            out += self._until_killed(pairs[len(out) :])
        return out

    def identity(self) -> dict[str, Any]:
        """See `dataflex.rewards.base.Reward`."""
        version = importlib.metadata.version("math-verify")
        return {"type": "math_verify", "package": version, **self.params.model_dump()}

    def _until_killed(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Score pairs with one process, up to and including the first that it does not survive."""
        cpu = _START_SECONDS + self.params.seconds * len(pairs)
        out: list[float | None] = []
        with (
            tempfile.TemporaryDirectory(prefix="dataflex-") as folder,
            sandbox.started(
                "math_worker.py", folder, cpu, self.params.memory_mb, isolated=False, pipes=True
            ) as process,
        ):
            if _line(process, _START_SECONDS) is None:
                raise DataflexError(
                    "reward math_verify: its process did not start; try `python -c 'import math_verify'`, and a larger "
                    f"memory_mb than {self.params.memory_mb}"
                )
            assert process.stdin is not None
            for pair in pairs:
                with contextlib.suppress(BrokenPipeError):  # it has died: then no reply comes either
                    process.stdin.write(json.dumps(pair).encode() + b"\n")
                    process.stdin.flush()
                reply = _line(process, self.params.seconds)
                if reply is None:
                    return [*out, 0.0]
                found = json.loads(reply)
                out.append(None if found is None else float(found))
        return out


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """Return a line of the process's output; None if it does not come in time, or the process has ended."""
    assert process.stdout is not None
    return (process.stdout.readline() or None) if sandbox.is_readable(process.stdout, seconds) else None
