"""A reward that calls a function of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from dataflex.components.params import Parameters
from dataflex.components.registry import import_plugin
from dataflex.components.user_code import code_digest
from dataflex.errors import ConfigError, DataflexError
from dataflex.rewards.base import Reward


class Function(Reward):
    """What `function(prompts, responses, references, **arguments)` returns: numbers, or None where it cannot say.

    The identity is the file that the function stands in, and those of yours that it imports (`code_digest`).
    """

    class Params(Parameters):
        """Parameters of `function`."""

        function: str = Field(description="module:function, or path/to/file.py:function")
        arguments: dict[str, Any] = Field({}, description="further arguments, by name")

    def __init__(self, params: Params):
        self.params = params
        module_name, _, name = params.function.rpartition(":")
        if not module_name:
            raise ConfigError(f"reward function: found {params.function!r}; expected module:function")
        module = import_plugin(module_name)
        self._function = getattr(module, name, None)
        if not callable(self._function):
            raise ConfigError(f"reward function: found no function {name} in {module_name}")
        self._module = module

    def score(self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """See `dataflex.rewards.base.Reward`.

        Raises:
            DataflexError: the function returned another number of values.
        """
        assert self._function is not None
        found = list(self._function(prompts, responses, references, **self.params.arguments))
        if len(found) != len(responses):
            raise DataflexError(
                f"reward function {self.params.function} returned {len(found)} values for {len(responses)} responses"
            )
        return [None if value is None else float(value) for value in found]

    def identity(self) -> dict[str, Any]:
        """See `dataflex.rewards.base.Reward`."""
        name = self.params.function.rpartition(":")[2]
        return {"type": "function", "function": name, "source": code_digest(self._module),
                "arguments": self.params.arguments}  # fmt: skip
