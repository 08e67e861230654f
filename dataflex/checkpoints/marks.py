"""The mark of a whole checkpoint: a file, written last, with the size and SHA-256 of every other one."""

from __future__ import annotations

import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dataflex import distributed
from dataflex.errors import CorruptionError
from dataflex.fingerprint import digest, file_digest
from dataflex.whole import replacing

log = logging.getLogger(__name__)

FOLDER = "dataflex"
_MARK = "complete.json"
_VERSION = 2  # 1 had sizes alone
_LOADED = (".safetensors", ".bin", ".pt", ".pth")
"""Loaders look for such files by name, and would read one that was added later in place of those of the checkpoint."""


def mark_complete(checkpoint: str | os.PathLike[str], info: dict[str, Any]) -> None:
    """Declare a checkpoint complete; call it on one process after every one has written its files."""
    root = Path(checkpoint)
    (root / FOLDER).mkdir(exist_ok=True)
    mine = (_MARK, f".{_MARK}")  # one that a kill has left is not of the checkpoint
    paths = [
        p
        for p in sorted(root.rglob("*"))
        if p.is_file() and not (p.parent == root / FOLDER and p.name.startswith(mine))
    ]
    sums = _sums(root, [path.relative_to(root).as_posix() for path in paths])
    files = {
        name: {"bytes": path.stat().st_size, "sha256": found}
        for path, (name, found) in zip(paths, sums.items(), strict=True)
    }
    mark = {"version": _VERSION, "files": files, **info}
    with replacing(root / FOLDER / _MARK) as path:
        path.write_text(json.dumps({**mark, "digest": digest(mark)}, indent=1), "utf-8")


def unmark(checkpoint: str | os.PathLike[str]) -> None:
    """Remove the mark of a checkpoint, whose files are about to be written again."""
    (Path(checkpoint) / FOLDER / _MARK).unlink(missing_ok=True)


def is_marked(checkpoint: str | os.PathLike[str]) -> bool:
    """Say whether a folder was written as a checkpoint by `dataflex train`, whole or not any more."""
    return (Path(checkpoint) / FOLDER / _MARK).is_file()


def recorded(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what was noted in a checkpoint's mark; empty for a checkpoint that `dataflex train` did not write."""
    return (_read(Path(checkpoint)) if is_marked(checkpoint) else None) or {}


def incomplete_reason(checkpoint: str | os.PathLike[str], contents: bool = True) -> str | None:
    """Say why a checkpoint may not be resumed from, or return None if it may.

    Args:
        checkpoint: its folder.
        contents: whether every byte is read and hashed; else only names and sizes of the files are compared.
    """
    root = Path(checkpoint)
    if not root.is_dir():
        return "no such folder"
    if not is_marked(root):
        return f"it has no {FOLDER}/{_MARK}: writing it was interrupted, or `dataflex train` did not write it"
    mark = _read(root)
    if mark is None:
        return f"{FOLDER}/{_MARK} is damaged"
    if not mark.get("is_resumable", True):
        return "save_only_model left out the optimizer's state"
    return _fault(root, mark, contents) or _renamed(root)


def _renamed(root: Path) -> str | None:
    """Say that the step in a checkpoint's name is not the step of its state, or return None."""
    # The newest checkpoint is found by its folder's name, so a renamed one would pass for that of another step.
    if not re.fullmatch(r"checkpoint-\d+", root.name):
        return None  # whoever names a folder otherwise says nothing of its step
    try:
        step = json.loads((root / "trainer_state.json").read_text("utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # the trainer says what is wrong with it
    if step == step_of(root):
        return None
    return f"its trainer_state.json is of step {step}: was the folder renamed? Call it checkpoint-{step} again"


def require_whole(checkpoint: str | os.PathLike[str]) -> None:
    """Compare the files of a checkpoint with its mark before its weights are used.

    A folder without a mark, which Transformers or LLaMA-Factory alone has written, passes: nothing is known of it.

    Raises:
        CorruptionError: a file is missing or damaged, or was put there afterwards.
    """
    root = Path(checkpoint)
    if not is_marked(root):
        return
    mark = _read(root)
    fault = f"{FOLDER}/{_MARK} is damaged" if mark is None else _fault(root, mark, contents=True)
    if fault is not None:
        raise CorruptionError(f"{root} is damaged: {fault}; restore it, or name another checkpoint")


def newest_complete(
    output_dir: str | os.PathLike[str], contents: bool = True
) -> tuple[str | None, list[tuple[str, str]]]:
    """Return the newest complete checkpoint of a run, and the newer ones that are not, each with the reason."""
    skipped: list[tuple[str, str]] = []
    for path in newest_first(output_dir):
        reason = incomplete_reason(path, contents)
        if reason is None:
            return str(path), skipped
        skipped.append((str(path), reason))
    return None, skipped


def newest_first(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoint folders of a run in the order of the steps in their names, the last first."""
    root = Path(output_dir)
    found = [path for path in root.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def agreed(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest checkpoint that is whole on every node, None if there is none. Collective.

    One process of each node reads, since nodes need not share a disk; what is skipped is said, with the file at fault.
    """
    reads = distributed.local_rank() == 0
    mine = [path.name for path in newest_first(output_dir)] if reads else []
    every = {name for names in distributed.gather(mine) for name in names}
    # One after the other, by all processes together: which one is skipped is then the same everywhere.
    for name in sorted(every, key=step_of, reverse=True):
        path = Path(output_dir) / name
        reasons = distributed.gather(incomplete_reason(path) if reads else None)
        reason = next((found for found in reasons if found is not None), None)
        if reason is None:
            return str(path)
        if distributed.is_main():
            log.warning("skipping the checkpoint %s: %s", path, reason)
    return None


def step_of(checkpoint: str | os.PathLike[str]) -> int:
    """Return the step in a checkpoint's name."""
    return int(os.fspath(checkpoint).rpartition("-")[2])


def _read(root: Path) -> dict[str, Any] | None:
    """Return a mark, or None if it is not what was written."""
    try:
        mark = json.loads((root / FOLDER / _MARK).read_text("utf-8"))
        if mark["version"] == 1:
            return mark if _has_files(mark, int) else None
        expected = mark.pop("digest")
        is_whole = expected == digest(mark) and mark["version"] == _VERSION and _has_files(mark, dict)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return mark if is_whole else None


def _has_files(mark: dict[str, Any], kind: type) -> bool:
    """Say whether a mark names files: with their size, or with a mapping of size and digest."""
    files = mark["files"]
    if not isinstance(files, dict) or not files or not all(isinstance(about, kind) for about in files.values()):
        return False
    kinds = {"bytes": int, "sha256": str}
    return kind is int or all(isinstance(about.get(k), of) for about in files.values() for k, of in kinds.items())


def _fault(root: Path, mark: dict[str, Any], contents: bool) -> str | None:
    """Say which file is not what was marked, or None."""
    has_sums = mark["version"] != 1
    for name, about in mark["files"].items():
        size = about["bytes"] if has_sums else about
        path = root / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    there = (path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.suffix in _LOADED)
    added = next((name for name in there if name not in mark["files"]), None)
    if added is not None:
        return f"{added} was put there after the checkpoint was complete; move it elsewhere"
    if not contents:
        return None
    if not has_sums:
        log.warning("%s: its mark has the sizes of its files alone, so their contents are not checked", root)
        return None
    for name, found in _sums(root, list(mark["files"])).items():
        if found != mark["files"][name]["sha256"]:
            return f"{name} is damaged: its SHA-256 is {found[:12]}…, not {mark['files'][name]['sha256'][:12]}…"
    return None


def _sums(root: Path, names: list[str]) -> dict[str, str]:
    """Return the SHA-256 of files, read in threads: hashing and reading leave the interpreter's lock."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: file_digest(root / name), names), strict=True))
