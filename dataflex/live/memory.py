"""What was found out about files and is not found out again while they are the same.

A file up to `SMALL` bytes is the same if its content is. A larger one is the same if its size, its inode, and the times
of its last change of content and of status are: nobody but the kernel sets the last of these. What has changed within
`_SETTLED` seconds is not remembered, as a clock may be too coarse to show that it changes once more.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dataflex.errors import CorruptionError, MismatchError
from dataflex.fingerprint import canonical, digest, file_digest
from dataflex.stores.record import seal, unseal
from dataflex.whole import replacing

log = logging.getLogger(__name__)

SMALL = 1 << 20
_SETTLED = 2.0
"""Seconds: the coarsest clock of a file system in use."""


class Memory:
    """Plain data by what it is about.

    Args:
        folder: where it lies; made when there is something to keep. None: nothing is remembered.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder

    def recall(self, about: Mapping[str, Any]) -> Any:
        """Return what was kept about something, None where nothing was, or where it is damaged."""
        if self._folder is None:
            return None
        path = self._path(about)
        try:
            found = unseal(path.read_bytes(), str(path))
        except (OSError, CorruptionError, MismatchError):
            return None
        return found["value"] if canonical(found["about"]) == canonical(about) else None

    def keep(self, about: Mapping[str, Any], value: Any) -> None:
        """Keep something. A folder that cannot be written to costs time, and no more."""
        if self._folder is None:
            return
        try:
            with replacing(self._path(about)) as temporary:
                temporary.write_bytes(seal({"about": about, "value": value}))
        except OSError as error:
            log.warning("what is known of the model is not kept in %s: %s", self._folder, error)

    def _path(self, about: Mapping[str, Any]) -> Path:
        assert self._folder is not None
        return self._folder / f"{digest(about)}.json"


def contents(folder: Path) -> dict[str, Any]:
    """Return what tells whether the files under a folder are the same, by path; those of hidden names are left out."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if name.name.startswith("."):
            continue
        with suppress(FileNotFoundError):  # gone by now
            about = path.stat()
            if path.is_file():
                times = [about.st_mtime_ns, about.st_ctime_ns]
                found[name.as_posix()] = (
                    file_digest(path) if about.st_size <= SMALL else [about.st_size, about.st_ino, *times]
                )
    return found


def is_settled(files: Mapping[str, Any]) -> bool:
    """Say whether files, as `contents` tells of them, have not changed for long enough to be remembered."""
    newest = max((max(about[2:]) for about in files.values() if isinstance(about, list)), default=0)
    return newest < (time.time() - _SETTLED) * 1e9


def default_folder() -> Path | None:
    """Return where this user's memory lies: beside the cache that `DATAFLEX_CACHE` names; None without a cache."""
    if os.environ.get("DATAFLEX_CACHE_GB") == "0":
        return None
    named = os.environ.get("DATAFLEX_CACHE")
    if named:
        return Path(named).expanduser().absolute() / "models"
    import platformdirs  # only where nothing else names a place

    return Path(platformdirs.user_cache_dir("dataflex-models"))
