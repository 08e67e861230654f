"""Rewards: how good a response is. `Reward` and `register_reward` are for your own."""

from __future__ import annotations

from dataflex.components.params import Parameters
from dataflex.rewards.base import REWARDS, Reward, build_reward, register_reward, reward_identity

__all__ = ["REWARDS", "Parameters", "Reward", "build_reward", "register_reward", "reward_identity"]
