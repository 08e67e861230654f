"""The verdict of `dataflex doctor --gradients`, and the words for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dataflex.config.settings import Settings
from dataflex.doctor.finding import Finding
from dataflex.errors import DataflexError
from dataflex.features.invariance import CONDITIONS, Moved
from dataflex.pipelines.invariance import Invariance, asks_for_gradients, look

TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 5e-2}
"""Precision of the forward pass -> how far a gradient or a loss may move, relative to its size (docs/stores.md).

Where kernels do not mix rows, rounding alone moves them by 1e-6 in float32 and by 1e-2 in bfloat16.
"""


def report(settings: Settings) -> tuple[list[Finding], dict[str, Any]]:
    """Look at a run's gradients; return what is found, and the same as plain data. Call it on every rank."""
    if not asks_for_gradients(settings):
        said = "the run asks for no gradients of single examples, so no kernel can move them"
        return [Finding("ok", "gradients", said)], {"asked_for": False, "within": True}
    found = look(settings)
    tolerance = TOLERANCES.get(found.precision, TOLERANCES["float16"])
    within = _most(found.moved) <= tolerance
    plain = {
        "asked_for": True,
        "within": within,
        "tolerance": tolerance,
        "precision": found.precision,
        "attention": found.attention,
        "tokens": found.lengths,
        "moved": _plain(found.moved),
        "under_eager": _plain(found.under_eager) or None,
    }
    return _findings(found, tolerance, within), plain


def refuse(findings: list[Finding]) -> None:
    """End with an error if gradients move.

    Raises:
        DataflexError: they do, beyond the tolerance.
    """
    if wrong := next((finding for finding in findings if finding.level == "error"), None):
        error = DataflexError(f"gradients depend on what a row is computed with ({wrong.about}); {wrong.advice}")
        error.everywhere = True
        raise error


def _findings(found: Invariance, tolerance: float, within: bool) -> list[Finding]:
    rows = f"{len(found.lengths)} rows of {min(found.lengths)} to {max(found.lengths)} tokens"
    head = f"{rows}, attention {found.attention}, {found.precision}; a row alone against"
    out = [Finding("ok", "gradients", head)]
    for name, moved in found.moved.items():
        is_right = moved.most <= tolerance
        said = f"gradient {moved.gradient:.1e}, loss {moved.loss:.1e} (at most {tolerance:.0e})"
        advice = "" if is_right else _advice(found, tolerance)
        out.append(Finding("ok" if is_right else "error", CONDITIONS[name], said, advice))
    if within and found.under_eager:
        said = f"at most {_most(found.under_eager):.1e} there; nothing is to be done"
        out.append(Finding("ok", "flash_attn: disabled", said))
    return out


def _advice(found: Invariance, tolerance: float) -> str:
    if found.under_eager and _most(found.under_eager) <= tolerance:
        return f"set flash_attn: disabled, under which they move by {_most(found.under_eager):.1e} at most"
    if found.under_eager or found.attention == "eager":
        more = f" ({_most(found.under_eager):.1e} under flash_attn: disabled)" if found.under_eager else ""
        return f"it is not the attention{more}: a layer mixes rows or sees padding, or the precision is too low"
    return "this model's attention cannot be switched to try; set flash_attn: disabled and look again"


def _most(moved: Mapping[str, Moved]) -> float:
    return max((each.most for each in moved.values()), default=0.0)


def _plain(moved: Mapping[str, Moved]) -> dict[str, Any]:
    """Return it as plain data; null stands for infinity, which JSON does not know."""
    return {
        name: {key: value if math.isfinite(value) else None for key, value in vars(each).items()}
        for name, each in moved.items()
    }
