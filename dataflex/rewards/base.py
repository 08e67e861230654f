"""The interface of rewards, and how a reward is made from its name and parameters."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError

from dataflex.components.adapter import adapted
from dataflex.components.params import Parameters
from dataflex.components.registry import Registry
from dataflex.components.user_code import code_digest
from dataflex.errors import ConfigError


class Reward(ABC):
    """Base of rewards: override `score` and `identity`, and `prepare` if something has to be loaded.

    Attributes:
        Params: its parameters, a frozen model.
    """

    Params: ClassVar[type[BaseModel]] = Parameters

    def __init__(self, params: Any = None):
        self.params = params

    def prepare(self) -> None:  # noqa: B027 - most have nothing to load
        """Load what it needs, before the first step.

        Raises:
            DataflexError: something cannot be loaded.
        """

    @abstractmethod
    def score(self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """Return the reward of each response, larger is better; None where it cannot be scored.

        Raises:
            UnavailableError: what scores is not there now; what was scored before is kept.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return plain data that names everything a score depends on beside the texts."""


def adapted_reward(cls: type[Any]) -> type[Reward]:
    """Make a user's class a `Reward`: itself, or a class that inherits from both."""
    found: type[Reward] = adapted(cls, Reward)
    return found


log = logging.getLogger(__name__)

REWARDS: Registry[Reward] = Registry(
    "reward",
    "dataflex.rewards",
    {
        "exact_match": "dataflex.rewards.exact_match:ExactMatch",
        "regex": "dataflex.rewards.regex:Regex",
        "number": "dataflex.rewards.number:Number",
        "math_verify": "dataflex.rewards.math_verify:MathVerify",
        "unit_tests": "dataflex.rewards.unit_tests:UnitTests",
        "reward_model": "dataflex.rewards.reward_model:RewardModel",
        "judge": "dataflex.rewards.judge:Judge",
        "function": "dataflex.rewards.function:Function",
    },
    ("score",),
    "dataflex.rewards.base:adapted_reward",
)

register_reward = REWARDS.register


def build_reward(name: str, params: Mapping[str, Any], plugins: Iterable[str] = ()) -> Reward:
    """Make a reward; models are loaded when it is first asked for a score.

    Args:
        name: a registered name or `module:Class`.
        params: its parameters.
        plugins: modules or files that may register it.

    Raises:
        ConfigError: there is none of that name, a parameter is wrong, or a package that it needs is missing.
    """
    cls = REWARDS.load(name, plugins)
    if said := REWARDS.override(name, cls):
        log.info("%s", said)
    try:
        checked = cls.Params(**params)
    except ValidationError as error:
        faults = (
            f"{'.'.join(map(str, e['loc'])) or 'parameters'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        )
        known = ", ".join(cls.Params.model_fields) or "none"
        raise ConfigError(f"reward {name}: {'; '.join(faults)}. Its parameters: {known}") from error
    return cls(checked)


def reward_identity(reward: Reward) -> dict[str, Any]:
    """Return what stored rewards are found by: the reward's own identity and, for a class of the user's, its code.

    Raises:
        ConfigError: that code stands in no file.
    """
    code = code_digest(type(reward))
    return reward.identity() if code is None else {**reward.identity(), "code": code}
