"""The page itself: the template, filled and closed against everything from outside."""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""What turns the direction of the letters that follow it."""
_FOLDER = Path(__file__).parent


def render(values: Mapping[str, Any]) -> str:
    """Return the page.

    Every text is escaped, and none but the page's own style is allowed by its policy: no script, no picture, no
    address. What rows say is anybody's.

    Args:
        values: what the template names; texts are data, pictures SVG elements of our own.
    """
    style = (_FOLDER / "page.css").read_text("utf-8").strip()
    hashed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"text": legible, "picture": _picture, "figure": _figure, "share": _share}
    template = environment.get_template("page.html")
    return template.render(**values, style=Markup(style), policy=policy)


def legible(value: Any) -> str:
    """Return a text that a browser shows as it is: control characters and broken pairs as a sign of their own."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return "".join("�" if c in _TURNING or (unicodedata.category(c) == "Cc" and c not in "\n\t") else c for c in text)


def _picture(svg: str) -> Markup:
    return Markup(svg)


def _figure(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
