"""Selectors: which rows the next round is trained on. `Selector` and `register_selector` are for your own."""

from __future__ import annotations

from dataflex.registry import register_selector
from dataflex.selectors.base import Context, Need, Selection, Selector

__all__ = ["Context", "Need", "Selection", "Selector", "register_selector"]
