"""Weighters: what each example's loss counts. `Weighter` and `register_weighter` are for your own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dataflex.registry import register_weighter

if TYPE_CHECKING:
    from dataflex.weighters.documented import Weighter

__all__ = ["Weighter", "register_weighter"]


def __getattr__(name: str) -> Any:
    """Import `Weighter` when it is asked for: it needs torch, and a run file is checked without."""
    if name != "Weighter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dataflex.weighters.documented import Weighter

    return Weighter
