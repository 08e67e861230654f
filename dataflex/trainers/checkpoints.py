"""What makes a checkpoint complete: a mark written last, naming every file and its size."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

FOLDER = "dataflex"
_MARK = "complete.json"


def mark_complete(checkpoint: str | os.PathLike[str], info: dict[str, Any]) -> None:
    """Declare a checkpoint complete; call it on one rank after every rank has written its files."""
    root = Path(checkpoint)
    files = {p.relative_to(root).as_posix(): p.stat().st_size for p in sorted(root.rglob("*")) if p.is_file()}
    (root / FOLDER).mkdir(exist_ok=True)
    temporary = root / FOLDER / f".{_MARK}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"version": 1, "files": files, **info}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, root / FOLDER / _MARK)


def incomplete_reason(checkpoint: str | os.PathLike[str]) -> str | None:
    """Say why a checkpoint may not be resumed from, or return None if it may."""
    root = Path(checkpoint)
    if not root.is_dir():
        return "no such folder"
    try:
        mark = json.loads((root / FOLDER / _MARK).read_text("utf-8"))
        expected: dict[str, int] = mark["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no {FOLDER}/{_MARK}: writing it was interrupted, or `dataflex train` did not write it"
    if not mark.get("is_resumable", True):
        return "save_only_model left out the optimizer's state"
    for name, size in expected.items():
        path = root / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    return None


def newest_complete(output_dir: str | os.PathLike[str]) -> tuple[str | None, list[tuple[str, str]]]:
    """Return the newest complete checkpoint of a run, and the newer ones that are not, each with the reason."""
    root = Path(output_dir)
    found = [(int(m[1]), p) for p in root.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    skipped: list[tuple[str, str]] = []
    for _, path in sorted(found, reverse=True):
        reason = incomplete_reason(path)
        if reason is None:
            return str(path), skipped
        skipped.append((str(path), reason))
    return None, skipped
