"""Weighters: what each example's loss counts. `Weighter` and `register_weighter` are for your own."""

from __future__ import annotations

from dataflex.registry import register_weighter
from dataflex.weighters.base import Weighter

__all__ = ["Weighter", "register_weighter"]
