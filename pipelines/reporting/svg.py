"""Pictures as SVG inside a page: no style attribute, which a strict policy forbids, and no identifier twice."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"
"""The colour that becomes the text colour of the page, light or dark."""
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_KEPT = {
    "fill", "stroke", "stroke-width", "stroke-linecap", "stroke-linejoin", "stroke-dasharray", "stroke-dashoffset",
    "stroke-opacity", "fill-opacity", "opacity", "text-anchor", "font-size", "clip-rule", "fill-rule",
}  # fmt: skip
"""Properties of a style that are attributes as well; the page's own style has the fonts."""
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_NAMED = re.compile(r"url\(#([^)]+)\)")


def inline(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an SVG element.

    Args:
        figure: of matplotlib; it is closed.
        name: what its identifiers begin with, unique in the page.
        label: what it shows, for those who cannot see it.
    """
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return cleaned(written.getvalue(), name, label)


def cleaned(text: str, name: str, label: str) -> str:
    """Return matplotlib's SVG as an element of a page."""
    ElementTree.register_namespace("", _SVG[1:-1])
    root = ElementTree.fromstring(text)
    used = set(_NAMED.findall(text)) | {e.get(_LINK, "")[1:] for e in root.iter()}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("metadata", "style")):
                parent.remove(child)
    for element in root.iter():
        _plain(element, name, used)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": label, "stroke-linejoin": "round", "stroke-linecap": "butt"}
    return ElementTree.tostring(root, encoding="unicode")


def _plain(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Turn style into attributes, give identifiers a prefix, and shorten numbers."""
    for declaration in element.attrib.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key in _KEPT:
            element.set(key, value)
    own = element.attrib.pop("id", None)
    if own in used:
        element.set("id", f"{name}-{own}")
    link = element.attrib.pop(_LINK, None)
    if link is not None:
        element.set("href", f"#{name}-{link[1:]}")
    for key, value in list(element.attrib.items()):
        if value == INK:
            element.set(key, "currentColor")
        elif key in ("d", "x", "y", "transform", "width", "height"):
            element.set(key, " ".join(_NUMBER.sub(_short, value).split()))
        elif value.startswith("url("):
            element.set(key, _NAMED.sub(lambda found: f"url(#{name}-{found[1]})", value))
    if not (element.text or "").strip():
        element.text = None
    element.tail = None


def _short(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")
