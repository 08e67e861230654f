"""Weighters: what each example's loss counts. `NativeWeighter` and `Weighter` are the bases of your own."""

from __future__ import annotations

from dataflex.components.registry import register_weighter
from dataflex.weighters.base import Examples, Group, NativeWeighter, WeighterParams
from dataflex.weighters.classic import Weighter

__all__ = ["Examples", "Group", "NativeWeighter", "Weighter", "WeighterParams", "register_weighter"]
