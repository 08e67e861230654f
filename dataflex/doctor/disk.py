"""Free disk space at the places that a run writes to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from dataflex.doctor.finding import Finding, Level
from dataflex.errors import DataflexError

LEAST = 200e6
"""Bytes under which not even a small run's stores and checkpoints fit."""

LITTLE = 10e9
"""Bytes that a model of some billion parameters, its checkpoints and its features easily fill."""


def hub_cache() -> str:
    """Return where Hugging Face keeps models and datasets, by its environment variables."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def room(places: Mapping[str, str]) -> Iterator[Finding]:
    """Yield what is free at each place, which need not exist yet.

    Args:
        places: what it is for -> folder, or the URL of an object store, which tells nothing of its room.
    """
    for use, place in places.items():
        if "://" in place:
            yield _looked_at(use, place)
            continue
        folder = Path(os.path.abspath(os.path.expanduser(place)))
        there = next((f for f in (folder, *folder.parents) if f.exists()), Path(folder.anchor))
        advice = "name another folder, or change the owner or mode of this one"
        if not there.is_dir():
            yield Finding("error", use, f"{there} is a file, not a folder", advice)
            continue
        if not os.access(there, os.W_OK | os.X_OK):
            yield Finding("error", use, f"{there} cannot be written to", advice)
            continue
        free = shutil.disk_usage(there).free
        level: Level = "error" if free < LEAST else "warning" if free < LITTLE else "ok"
        advice = "" if free >= LITTLE else "make room (`dataflex store gc` names what is not used), or use another disk"
        yield Finding(level, use, f"{free / 1e9:.1f} GB free at {folder}", advice)


def _looked_at(use: str, url: str) -> Finding:
    from dataflex.stores.root import refuse_unusable  # pyarrow, which may be what is broken

    try:
        refuse_unusable(url)
    except DataflexError as error:
        found, _, advice = str(error).partition("\n")
        return Finding("error", use, found, " ".join(advice.split()))
    return Finding("ok", use, f"{url} answers; it is no disk of this machine")
