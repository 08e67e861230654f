"""What the pages of the site have beside their Markdown: generated parts, and the tree of contents."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from docs import reference

if TYPE_CHECKING:  # tests look at pages without it
    from sphinx.application import Sphinx

INDEX = "docs/index"
_PLACE = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_LISTED = re.compile(r"^- \[([^\]]+)\]\(([^)#]+)\.md\)", re.MULTILINE)


def connect(app: Sphinx) -> None:
    """Prepare every page before it is read from now on."""
    app.connect("source-read", _prepare)


def _prepare(app: Sphinx, name: str, source: list[str]) -> None:
    source[0] = filled(source[0])
    if name == INDEX:
        source[0] += contents(source[0])


def filled(text: str) -> str:
    """Return a page with `<!-- generated: NAME -->` replaced by what the function of that name in `reference` says."""
    return _PLACE.sub(lambda match: getattr(reference, match[1])(), text)


def contents(index: str) -> str:
    """Return the tree of contents that the lists of the index make, a caption for each heading, called as there.

    On GitHub, which knows no such tree, the index has the lists alone.
    """
    _, *parts = re.split(r"^## ", index, flags=re.MULTILINE)
    trees = []
    for part in parts:
        pages = "\n".join(f"{title} <{name}>" for title, name in _LISTED.findall(part))
        trees.append(f"\n```{{toctree}}\n:hidden:\n:caption: {part.splitlines()[0]}\n\n{pages}\n```\n")
    return "".join(trees)
