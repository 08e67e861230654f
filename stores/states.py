"""Kept model states: folders of files that a later run loads instead of training to them.

states/<lineage>/<uuid>/…        the files
states/<lineage>/manifest.json   their sizes and SHA-256: written last, so a state is there entirely or not at all
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dataflex.errors import CorruptionError, DataflexError, MismatchError
from dataflex.stores.files import Files, LocalFiles
from dataflex.stores.record import claim, find_record

_LINEAGE = re.compile(r"[A-Za-z0-9_-]{1,128}")
_PART = re.compile(r"[A-Za-z0-9_+=@ ,()-][A-Za-z0-9_.+=@ ,()-]{0,199}")


class StateStore:
    """States by lineage, under `states/` of a root."""

    def __init__(self, files: Files):
        self.files = files

    def put(self, lineage: str, folder: str | os.PathLike[str], info: Mapping[str, Any]) -> bool:
        """Keep a copy of a folder's files; say whether it was kept, not another writer's.

        Copies, never links: trainers write into their checkpoint folders again, and that would change a linked state.

        Args:
            lineage: what the state is found by; up to 128 letters, digits, `_` and `-`.
            folder: a local folder.
            info: plain data that `find` returns.

        Raises:
            DataflexError: the folder is empty, or holds a file whose name is not portable; storage is full.
        """
        if find_record(self.files, _folder(lineage), "manifest") is not None:
            return False
        source = Path(folder)
        names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
        if not names:
            raise DataflexError(f"{source} holds no file to keep")
        token = uuid.uuid4().hex
        sums = {}
        for name in names:
            if not _is_safe(name):
                raise DataflexError(
                    f"{source / name} cannot be kept under that name: use letters, digits and _.+=@,()-"
                )
            path = f"{_folder(lineage)}/{token}/{name}"
            with open(source / name, "rb") as file, self.files.output(path) as out:
                shutil.copyfileobj(file, out, 1 << 20)
            # Of what was read back, not of the source: the source may change while it is copied.
            sums[name] = self.files.sha256(path)
        manifest = {"lineage": lineage, "folder": token, "files": sums, "info": dict(info)}
        _, ours = claim(self.files, _folder(lineage), "manifest", manifest)
        if not ours:
            for name in names:
                self.files.remove(f"{_folder(lineage)}/{token}/{name}")
        return ours

    def find(self, lineage: str) -> dict[str, Any] | None:
        """Return the info of a kept state, or None; a damaged manifest is logged and counts as none."""
        manifest = find_record(self.files, _folder(lineage), "manifest")
        return None if manifest is None else dict(manifest["info"])

    def fetch(self, lineage: str) -> Path:
        """Return a local folder with the files of a kept state, each checked against its SHA-256.

        On a local root it is the kept folder itself, not to be written to; else a new temporary one, the caller's.

        Raises:
            MismatchError: there is no such state.
            CorruptionError: a file is missing or damaged, or the manifest names one outside the state's folder.
        """
        manifest = find_record(self.files, _folder(lineage), "manifest")
        if manifest is None:
            raise MismatchError(f"{self.files.name(_folder(lineage))} holds no kept state")
        where = f"{_folder(lineage)}/{manifest['folder']}"
        unsafe = [name for name in manifest["files"] if not _is_safe(name)]
        if unsafe or not re.fullmatch(r"[0-9a-f]{32}", manifest["folder"]):
            raise CorruptionError(
                f"the manifest of {self.files.name(where)} names files outside its folder: {unsafe[:3]}"
            )
        cure = f"remove {self.files.name(_folder(lineage))} and run again to train to that state"
        for name, expected in manifest["files"].items():
            path = f"{where}/{name}"
            try:
                found = self.files.sha256(path)
            except FileNotFoundError as error:
                raise CorruptionError(f"{self.files.name(path)} is missing although it was kept; {cure}") from error
            if found != expected:
                raise CorruptionError(f"{self.files.name(path)} is damaged: its SHA-256 is {found[:12]}…; {cure}")
        if isinstance(self.files, LocalFiles):
            return self.files.root / where
        local = Path(tempfile.mkdtemp(prefix="dataflex-state-"))
        for name in manifest["files"]:
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            with self.files.open(f"{where}/{name}") as source, open(local / name, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
        return local


def _folder(lineage: str) -> str:
    if not _LINEAGE.fullmatch(lineage):
        raise DataflexError(f"a lineage cannot be called {lineage!r}: use up to 128 letters, digits, _ and -")
    return f"states/{lineage}"


def _is_safe(name: str) -> bool:
    """Say whether a name stays inside its folder on every system."""
    return name == PurePosixPath(name).as_posix() and all(_PART.fullmatch(part) for part in name.split("/"))
