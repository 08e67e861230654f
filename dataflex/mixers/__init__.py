"""Mixers: which share of every step each domain has. `NativeMixer` and `Mixer` are the bases of your own."""

from __future__ import annotations

from dataflex.components.params import Parameters
from dataflex.components.registry import register_mixer
from dataflex.mixers.base import MixContext, NativeMixer, RoutedRows, normalised
from dataflex.mixers.classic import Mixer

__all__ = ["MixContext", "Mixer", "NativeMixer", "Parameters", "RoutedRows", "normalised", "register_mixer"]
