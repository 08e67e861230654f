"""Selectors: which rows the next round is trained on. `NativeSelector` and `Selector` are the bases of your own."""

from __future__ import annotations

from dataflex.components.params import Parameters
from dataflex.components.registry import register_selector
from dataflex.features.spec import EmbeddingSpec, GradientSpec, LossSpec
from dataflex.selectors.base import Context, NativeSelector, Need, Selection
from dataflex.selectors.classic import Selector

__all__ = [
    "Context",
    "EmbeddingSpec",
    "GradientSpec",
    "LossSpec",
    "NativeSelector",
    "Need",
    "Parameters",
    "Selection",
    "Selector",
    "register_selector",
]
