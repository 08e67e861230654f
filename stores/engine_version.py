"""Which version of the feature engine computed a store or a kept state; values of another version are not reused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex.errors import CorruptionError, MismatchError
from dataflex.stores.files import Files
from dataflex.stores.record import find_record
from dataflex.stores.root import NAME
from dataflex.stores.runs import Used


def engine_of(described: Mapping[str, Any]) -> int | None:
    """Return the version in a store's recipe or in the record of how a kept state came about; None if there is none."""
    origin = described.get("parent", described)
    numerics = origin.get("numerics") if isinstance(origin, Mapping) else None
    if isinstance(numerics, Mapping):
        return numerics.get("engine") if isinstance(numerics.get("engine"), int) else None
    return 1 if "encoder" in described else None  # version 1 did not name itself where another model embeds


def older(files: Files, engine: int) -> dict[Used, int]:
    """Return the stores and kept states that a version below `engine` computed, each with that version.

    Those that cannot be read are left out: `store verify` tells of them.
    """
    found: dict[Used, int] = {}
    for folder in files.names(""):
        if NAME.fullmatch(folder):
            _note(found, ("store", folder), _body(files, folder, "recipe", "recipe"), engine)
    for lineage in files.names("states"):
        _note(found, ("state", lineage), _body(files, f"states/{lineage}", "manifest", "info"), engine)
    return found


def _note(found: dict[Used, int], used: Used, described: Any, engine: int) -> None:
    version = engine_of(described) if isinstance(described, Mapping) else None
    if version is not None and version < engine:
        found[used] = version


def _body(files: Files, folder: str, stem: str, part: str) -> Any:
    try:
        document = find_record(files, folder, stem)
    except (CorruptionError, MismatchError):
        return None
    return None if document is None else document.get(part)
