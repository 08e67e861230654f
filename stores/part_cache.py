"""A cache on this machine's disk of what was read from an object store, so that nothing is read from there twice.

What is cached is named by its content: a data file is a file here of the same name, with holes where nothing was read.
What is taken from it is held against the digests of the log, as if it came from the store, so whatever else lies there,
a hole, half a write, or a flipped bit, is no more than missing. Any number of processes share it without locks.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import stat
from pathlib import Path

from dataflex.errors import ConfigError, CorruptionError

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[0-9a-f]{64}")
_ODD = (errno.ELOOP, errno.EISDIR, errno.ENXIO)
"""What opening a link, a folder, a socket or a pipe without a reader ends in."""
_KEPT = 0.9
"""Share of the limit that is left when the oldest files have been removed."""


class PartCache:
    """Parts of files, by the SHA-256 of the file.

    Args:
        folder: where they lie; made when there is something to keep.
        limit: bytes on disk, at most, give or take what the processes that share it write between two looks.
    """

    def __init__(self, folder: Path, limit: int):
        self._folder = folder
        self._limit = limit
        self._is_off = False
        self._unseen = limit  # bytes written since the last look at the folder; the first write looks
        self._used: set[str] = set()

    def read(self, sha256: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return what is kept of bytes `start` to `stop` of a file: zeros where nothing is, and less beyond its end."""
        try:
            handle = self._opened(sha256, os.O_RDONLY)
            if handle is None:
                return b""
            with open(handle, "rb") as file:
                file.seek(start)
                found = file.read(None if stop is None else stop - start)
        except OSError:
            return b""
        self._use(sha256)
        return found

    def keep(self, sha256: str, start: int, data: bytes) -> None:
        """Keep bytes of a file from `start` on. A disk that is full or read-only ends the caching, and no more."""
        if self._is_off:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._unseen += len(data)
            if self._unseen > self._limit // 20:
                self._make_room()
            handle = self._opened(sha256, os.O_WRONLY | os.O_CREAT)
            if handle is None:
                return
            try:
                os.pwrite(handle, data, start)
            finally:
                os.close(handle)
        except OSError as error:
            self._is_off = True
            _log.warning("what is read from the object store is not kept in %s: %s", self._folder, error)
            return
        self._use(sha256)

    def _opened(self, sha256: str, flags: int) -> int | None:
        """Open a file of the cache; None where something else has its name, which is left alone.

        No link is followed, nor a file written to that has another name as well: where the folder is others' too, it
        could be any file of this user. And nobody is waited for at the other end of a pipe.
        """
        try:
            handle = os.open(self._path(sha256), flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        except OSError as error:
            if error.errno in _ODD:
                return None
            raise
        about = os.fstat(handle)
        if stat.S_ISREG(about.st_mode) and about.st_nlink == 1:
            return handle
        os.close(handle)
        return None

    def _path(self, sha256: str) -> Path:
        if not _NAME.fullmatch(sha256):  # it becomes a part of a path
            raise CorruptionError(f"{sha256!r} names no file of the cache: it is no SHA-256")
        return self._folder / sha256

    def _use(self, sha256: str) -> None:
        if sha256 not in self._used:  # once for each process: the oldest go first, and to the hour is enough
            with contextlib.suppress(OSError):
                os.utime(self._path(sha256))
            self._used.add(sha256)

    def _make_room(self) -> None:
        """Remove the oldest files; what is called otherwise than ours is not ours."""
        self._unseen = 0
        about = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # another process makes room too
                    if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        about[entry.name] = entry.stat(follow_symlinks=False)
        held = sum(512 * each.st_blocks for each in about.values())
        if held <= self._limit:
            return
        for name in sorted(about, key=lambda name: about[name].st_mtime):
            if held <= _KEPT * self._limit:
                break
            with contextlib.suppress(OSError):  # gone by now, or another user's
                os.unlink(self._folder / name)
                held -= 512 * about[name].st_blocks


def part_cache() -> PartCache | None:
    """Return the cache that `DATAFLEX_CACHE` (a folder) and `DATAFLEX_CACHE_GB` (its limit; 0: none) ask for.

    Raises:
        ConfigError: the limit is no number.
    """
    said = os.environ.get("DATAFLEX_CACHE_GB") or "50"
    try:
        limit = float(said)
        if not 0 <= limit < float("inf"):
            raise ValueError
    except ValueError as error:
        raise ConfigError(f"DATAFLEX_CACHE_GB: found {said!r}; expected gigabytes, 0 for no cache") from error
    if not limit:
        return None
    folder = os.environ.get("DATAFLEX_CACHE")
    if not folder:
        import platformdirs  # only where nothing else names a place

        folder = os.path.join(platformdirs.user_cache_dir("dataflex"), "parts")
    return PartCache(Path(folder).expanduser().absolute(), int(limit * 1e9))
