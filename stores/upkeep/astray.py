"""Files, links and the like that lie where a store, state or record needs a folder: what the folder held is lost."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dataflex.stores.files import Files
from dataflex.stores.problem import Problem
from dataflex.stores.root import NAME
from dataflex.stores.runs import FOLDER, RUN_ID

_LINEAGE = re.compile(r"[0-9a-f]{32}")
_IN_A_STORE = ("log", "data", "derived", "tmp")


def astray(files: Files) -> dict[str, list[Problem]]:
    """Find what lies where a folder belongs; return the problems by the store, state or record of a run they hit."""
    found: dict[str, list[Problem]] = {}
    for part, path in _folders(files):
        if what := files.misplaced(path, "folder"):
            found.setdefault(part, []).append(Problem(path, what, aside=path))
    return found


def _folders(files: Files) -> Iterator[tuple[str, str]]:
    """Yield the paths at which there is either a folder or nothing, each with the part that it belongs to."""
    for name in files.names(""):
        if NAME.fullmatch(name):
            yield name, name
            yield from ((name, f"{name}/{inner}") for inner in _IN_A_STORE)
    for name, inner in ((FOLDER, RUN_ID), ("states", _LINEAGE)):
        yield name, name
        if not files.misplaced(name, "folder"):
            yield name, f"{name}/tmp"
            yield from ((f"{name}/{each}",) * 2 for each in files.names(name) if inner.fullmatch(each))
