"""Mixers: which share of every step each domain has. `Mixer` and `register_mixer` are for your own."""

from __future__ import annotations

from dataflex.mixers.base import Mixer
from dataflex.registry import register_mixer

__all__ = ["Mixer", "register_mixer"]
