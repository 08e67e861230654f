"""Kept model states: folders of files that a later run loads instead of training to them.

states/<lineage>/<uuid>/…        the files
states/<lineage>/manifest.json   their sizes and SHA-256: written last, so a state is there entirely or not at all
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from dataflex.errors import CorruptionError, DataflexError, MismatchError
from dataflex.fingerprint import file_digest
from dataflex.stores.files import Files, HashingWriter, LocalFiles
from dataflex.stores.record import claim, find_record

LINEAGE = re.compile(r"[A-Za-z0-9_-]{1,128}")
_PART = re.compile(r"[A-Za-z0-9_+=@ ,()-][A-Za-z0-9_.+=@ ,()-]{0,199}")


class StateStore:
    """States by lineage, under `states/` of a root."""

    def __init__(self, files: Files):
        self.files = files

    def put(self, lineage: str, folder: str | os.PathLike[str], info: Mapping[str, Any]) -> bool:
        """Keep a copy of a folder's files; return False if another writer's copy was first and is kept instead.

        Copies, never links: trainers write into their checkpoint folders again, and that would change a linked state.

        Args:
            lineage: what the state is found by; up to 128 letters, digits, `_` and `-`.
            folder: a local folder.
            info: plain data that `find` returns.

        Raises:
            DataflexError: the folder is empty, or holds a file whose name is not portable; storage is full.
        """
        if self.manifest(lineage) is not None:
            return False
        source = Path(folder)
        names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
        if not names:
            raise DataflexError(f"{source} holds no file to keep")
        unsafe = [name for name in names if not _is_safe(name)]
        if unsafe:
            raise DataflexError(f"{source / unsafe[0]} cannot be kept under that name: use letters, digits, _.+=@,()-")
        token = uuid.uuid4().hex  # a folder for each writer: two may copy at once, and the manifest says whose counts
        paths = {name: f"{_folder(lineage)}/{token}/{name}" for name in names}
        try:
            sums = {name: self._copy(source / name, path) for name, path in paths.items()}
        except (OSError, DataflexError):
            self._discard(paths.values())
            raise
        manifest = {"lineage": lineage, "folder": token, "files": sums, "info": dict(info)}
        _, ours = claim(self.files, _folder(lineage), "manifest", manifest)
        if not ours:
            self._discard(paths.values())
        return ours

    def find(self, lineage: str) -> dict[str, Any] | None:
        """Return the info of a kept state, or None; a damaged manifest is logged and counts as none."""
        manifest = self.manifest(lineage)
        return None if manifest is None else dict(manifest["info"])

    def infos(self) -> list[dict[str, Any]]:
        """Return the info of every kept state; damaged manifests are logged and left out."""
        found = [self.find(name) for name in self.files.names("states") if LINEAGE.fullmatch(name)]
        return [info for info in found if info is not None]

    def fetch(self, lineage: str, scratch: str | os.PathLike[str]) -> Path:
        """Return a local folder with the files of a kept state, each checked against its SHA-256.

        On a local root it is the kept folder itself, not to be written to.

        Args:
            lineage: what the state is found by.
            scratch: an empty folder, which the files of a remote root are downloaded to.

        Raises:
            MismatchError: there is no such state, or there is a file beside those kept.
            CorruptionError: a file is missing or damaged, or the manifest names one outside the state's folder.
        """
        manifest = self.manifest(lineage)
        if manifest is None:
            raise MismatchError(f"{self.files.name(_folder(lineage))} holds no kept state")
        where = f"{_folder(lineage)}/{manifest['folder']}"
        if isinstance(self.files, LocalFiles):
            folder = self.files.root / where
        else:
            folder = Path(scratch)
            self._download(where, manifest["files"], folder)
        if planted := _planted(folder, manifest["files"]):
            raise MismatchError(
                f"{self.files.name(where)}/{planted} was not kept with this state; find out who put it there, remove "
                "it with `dataflex store repair`, and run again"
            )
        if fault := _fault(folder, manifest["files"]):
            raise CorruptionError(
                f"{self.files.name(where)}/{fault}; remove the state with `dataflex store repair`, and run again to "
                "train to it"
            )
        return folder

    def manifest(self, lineage: str) -> dict[str, Any] | None:
        """Return the checked manifest of a kept state, or None; a damaged one is logged and counts as none.

        Raises:
            CorruptionError: it is intact, but of another state, or names files outside its folder.
        """
        manifest = find_record(self.files, _folder(lineage), "manifest")
        if manifest is None:
            return None
        where = self.files.name(_folder(lineage))
        kinds = {"lineage": str, "folder": str, "files": dict, "info": dict}
        if any(type(manifest.get(key)) is not kind for key, kind in kinds.items()):
            raise CorruptionError(f"the manifest in {where} is no manifest of a state")
        if manifest["lineage"] != lineage:
            raise CorruptionError(f"the manifest in {where} is of the state {manifest['lineage']}")
        unsafe = [name for name in manifest["files"] if not _is_safe(name)]
        if unsafe or not re.fullmatch(r"[0-9a-f]{32}", manifest["folder"]):
            raise CorruptionError(f"the manifest in {where} names files outside its folder: {unsafe[:3]}")
        return manifest

    def _download(self, where: str, names: Iterable[str], folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (
                suppress(FileNotFoundError),
                self.files.open(f"{where}/{name}") as source,
                open(folder / name, "wb") as file,
            ):
                shutil.copyfileobj(source, file, 1 << 20)

    def _copy(self, source: Path, path: str) -> str:
        """Copy a local file and return its SHA-256."""
        with open(source, "rb") as file, self.files.output(path) as out:
            hashing = HashingWriter(out)
            shutil.copyfileobj(file, hashing, 1 << 20)
            return hashing.sha256.hexdigest()

    def _discard(self, paths: Iterable[str]) -> None:
        for path in paths:
            self.files.remove(path)


def _folder(lineage: str) -> str:
    if not LINEAGE.fullmatch(lineage):
        raise DataflexError(f"a lineage cannot be called {lineage!r}: use up to 128 letters, digits, _ and -")
    return f"states/{lineage}"


def _is_safe(name: str) -> bool:
    """Say whether a name stays inside its folder on every system."""
    return name == PurePosixPath(name).as_posix() and all(_PART.fullmatch(part) for part in name.split("/"))


def _fault(folder: Path, sums: Mapping[str, str]) -> str | None:
    """Say which file of a state is not what was kept, or None."""
    for name, expected in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing although it was kept"
        if (found := file_digest(folder / name)) != expected:
            return f"{name} is damaged: its SHA-256 is {found[:12]}…"
    return None


def _planted(folder: Path, sums: Mapping[str, str]) -> str | None:
    """Return the first file that was not kept with the state: a loader that is given the folder might read it."""
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return min(there - sums.keys(), default=None)
