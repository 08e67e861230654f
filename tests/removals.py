"""What a removal leaves and takes, and the content of a folder."""

from __future__ import annotations

from pathlib import Path

from dataflex.stores.files import Files
from dataflex.stores.upkeep.gc import Item, Scope, plan
from dataflex.stores.upkeep.removal import carry_out


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def going(items: list[Item]) -> set[tuple[str, str]]:
    return {(item.kind, item.name) for item in items if item.goes}


def staying(items: list[Item]) -> dict[str, str]:
    return {item.name: item.why for item in items if not item.goes}


def collect(files: Files, scope: Scope) -> list[Item]:
    return carry_out(files, plan(files, scope), scope)
